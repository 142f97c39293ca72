"""Hostile PDFs by what they draw: forms, images, patterns, shadings, fonts, masks."""

from __future__ import annotations

from random import Random

from tests.hostile.bad_documents import document, salt, stream
from tests.hostile.bad_images import progressive, saved
from tests.hostile.bad_media import register, repeated, zeros
from tests.hostile.bad_rasters import jpeg_2000

FORM = b"/Type/XObject/Subtype/Form/BBox[0 0 100 100]"


@register("document", (9, 10), (24, 2), (5, 100))
def nested_forms(chance: Random, levels: int, calls: int) -> bytes:
    """Forms that draw the next one several times: thousands of millions of times in all."""
    more = [stream(b"/F Do " * calls, FORM + b"/Resources<</XObject<</F %d 0 R>>>>" % (6 + n)) for n in range(levels)]
    more.append(stream(b"0 0 10 10 re f ", FORM))
    return document(b"/F Do " * calls, *more, resources=b"<</XObject<</F 5 0 R>>>>") + salt(chance)


@register("document", "itself", "group", "mask", "matrix")
def form_keys(chance: Random, which: str) -> bytes:
    """Forms that draw themselves, transparent groups in groups, masks made of masks."""
    group = b"/Group<</S/Transparency/I true/K true>>"
    state = b"/ExtGState<</G<</SMask<</S/Luminosity/G %d 0 R>>/ca .5/BM/Luminosity>>>>"
    if which == "itself":
        more = [stream(b"q /F Do Q " * 9, FORM + b"/Resources<</XObject<</F 5 0 R>>>>")]
    elif which == "matrix":
        more = [stream(b"0 0 1 1 re f", FORM + b"/Matrix[1e30 1e30 -1e30 1e30 1e38 1e38]")]
    else:
        more = []
        for n in range(14):
            inner = b"/XObject<</F %d 0 R>>" % (6 + n) + (state % (6 + n) if which == "mask" else b"")
            content = b"q /G gs /F Do Q " * 2 if which == "mask" else b"/F Do " * 2
            more.append(stream(content, FORM.replace(b"100 100]", b"2900 2900]") + group + b"/Resources<<%b>>" % inner))
        more.append(stream(b"0 0 2900 2900 re f", FORM + group))
    return document(b"/F Do", *more, box=b"0 0 2900 2900", resources=b"<</XObject<</F 5 0 R>>>>") + salt(chance)


CONTENTS = {
    "states": b"q Q ",
    "saves": b"q ",
    "clips": b"0 0 1000 1000 re W n ",
    "paths": b"0 0 m 999 999 l 0 999 l 999 0 l h f ",
    "lines": b"999 999 l 1 1 l ",
    "curves": b"0 0 m 9 999 999 9 5 5 c S ",
    "text": b"BT /F 9 Tf (AAAAAAAAAAAAAAAA) Tj ET ",
    "inline": b"BI /W 9 /H 9 /BPC 8 /CS /G ID " + bytes(81) + b" EI ",
    "marks": b"/P <</MCID 0>> BDC EMC ",
    "brackets": b"[ ",
    "operands": b"1 ",
    "matrices": b"1.0001 0 0 1.0001 0 0 cm ",
    "colors": b"1 0 0 rg 0 1 0 RG ",
    "unknown": b"x ",
}


@register("document", *CONTENTS)
def contents(chance: Random, which: str) -> bytes:
    """A hundred megabytes and more of one operator, from some hundred kilobytes."""
    body = repeated(CONTENTS[which], (150 << 20) // len(CONTENTS[which]))
    fonts = b"<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    data = document(box=b"0 0 1000 1000", resources=fonts)
    return data.replace(stream(b""), stream(body, b"/Filter/FlateDecode", coded=False)) + salt(chance)


@register("document", "array", "same")
def content_arrays(chance: Random, which: str) -> bytes:
    """A page whose contents are one stream a hundred thousand times."""
    one = stream(b"0 0 999 999 re f " * (1000 if which == "same" else 1))
    return document(b"", one).replace(b"/Contents 4 0 R", b"/Contents[" + b"5 0 R " * 100_000 + b"]") + salt(chance)


def image(
    width: int,
    height: int,
    body: bytes,
    filter: bytes = b"FlateDecode",
    bits: int = 1,
    space: bytes = b"DeviceGray",
    keys: bytes = b"",
) -> bytes:
    head = b"/Type/XObject/Subtype/Image/Width %d/Height %d/BitsPerComponent %d/ColorSpace/%b/Filter/%b%b"
    return stream(body, head % (width, height, bits, space, filter, keys), coded=False)


@register(
    "document",
    "bits",
    "grey",
    "color",
    "deep",
    "most",
    "fax",
    "fax-rows",
    "jpeg-scans",
    "jpeg-sides",
    "jpx",
    "jbig2",
    "masks",
    "decode",
    "thousand",
    "interpolated",
    "indexed",
)
def images(chance: Random, which: str) -> bytes:
    """Images of hundreds of millions of pixels in every coding, drawn once or a thousand times."""
    side = 30_000 - chance.randrange(99)
    made = {
        "bits": lambda: image(side, side, zeros(side * side // 8)),
        "grey": lambda: image(side, side, zeros(side * side), bits=8),
        "color": lambda: image(16_000, 16_000, zeros(16_000 * 16_000 * 3), bits=8, space=b"DeviceRGB"),
        "deep": lambda: image(16_000, 16_000, zeros(16_000 * 16_000 * 8), bits=16, space=b"DeviceCMYK"),
        "most": lambda: image(2**31 - 1, 2**31 - 1, zeros(99)),
        "fax": lambda: image(
            side,
            side,
            b"\xff" * 4000,
            b"CCITTFaxDecode",
            keys=b"/DecodeParms<</K -1/Columns %d/Rows %d>>" % (side, side),
        ),
        "fax-rows": lambda: image(
            60_000, 60_000, b"\0", b"CCITTFaxDecode", keys=b"/DecodeParms<</K 0/Columns 65535/Rows 2147483647>>"
        ),
        "jpeg-scans": lambda: image(1500, 1500, progressive(1500, 2000), b"DCTDecode", 8),
        "jpeg-sides": lambda: image(65_500, 65_500, saved("JPEG", mode="L"), b"DCTDecode", 8),
        "jpx": lambda: image(10_900, 10_900, jpeg_2000((10_900, 10_900, 0, 0, 10_900, 10_900)), b"JPXDecode", 8),
        "jbig2": lambda: image(
            side, side, bytes.fromhex("00000000300001000000137530000075300000000000000000000000") * 9, b"JBIG2Decode"
        ),
        "masks": lambda: image(9000, 9000, zeros(9000 * 9000), bits=8, keys=b"/SMask 6 0 R"),
        "decode": lambda: image(9000, 9000, zeros(9000 * 9000), bits=8, keys=b"/Decode[" + b"0 1 " * 100_000 + b"]"),
        "thousand": lambda: image(5000, 5000, zeros(5000 * 5000), bits=8),
        "interpolated": lambda: image(1, 1, zeros(1), bits=8, keys=b"/Interpolate true"),
        "indexed": lambda: image(9000, 9000, zeros(9000 * 9000), bits=8).replace(
            b"/DeviceGray", b"[/Indexed/DeviceRGB 255 <00>]"
        ),
    }[which]()
    mask = image(20_000, 20_000, zeros(20_000 * 20_000), bits=8, keys=b"/SMask 6 0 R/Matte[1 1 1]")
    content = b"q 2900 0 0 2900 0 0 cm /I Do Q " * (1000 if which == "thousand" else 1)
    return document(content, made, mask, box=b"0 0 2900 2900", resources=b"<</XObject<</I 5 0 R>>>>") + salt(chance)


@register("document", "cells", "itself", "thin", "zero", "negative", "text")
def patterns(chance: Random, which: str) -> bytes:
    """Patterns of cells far smaller than a pixel, of no size, and patterns painted with themselves."""
    step = {"cells": b".01", "thin": b"1e-30", "zero": b"0", "negative": b"-1e9"}.get(which, b"1")
    keys = b"/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 %b %b]/XStep %b/YStep %b" % ((step,) * 4)
    inner = b"/Resources<</Pattern<</P 5 0 R>>>>" if which == "itself" else b"/Resources<<>>"
    cell = b"/Pattern cs /P scn 0 0 1 1 re f" if which == "itself" else b"0 0 .001 .001 re f"
    paint = b"/Pattern cs /P scn 0 0 2900 2900 re f "
    content = paint * (500 if which == "text" else 1)
    return document(
        content, stream(cell, keys + inner), box=b"0 0 2900 2900", resources=b"<</Pattern<</P 5 0 R>>>>"
    ) + salt(chance)


@register(
    "document",
    "calculator",
    "stitched",
    "sampled",
    "exponential",
    "axial",
    "radial",
    "free",
    "lattice",
    "coons",
    "function",
)
def shadings(chance: Random, which: str) -> bytes:
    """Colours that take a program, a table of gigabytes or a tree of functions for each pixel."""
    ramp = b"/ColorSpace/DeviceRGB/Domain[0 1 0 1]/Extend[true true]"
    kind, keys, body = {
        "calculator": (1, b"/Function 6 0 R", b""),
        "function": (1, b"/Function 7 0 R", b""),
        "stitched": (2, b"/Coords[0 0 2900 2900]/Domain[0 1]/Function 8 0 R", b""),
        "sampled": (1, b"/Function 9 0 R", b""),
        "exponential": (2, b"/Coords[0 0 1 1]/Domain[0 1]/Function 10 0 R", b""),
        "axial": (2, b"/Coords[0 0 1e-30 1e-30]/Domain[0 1e30]/Function 10 0 R", b""),
        "radial": (3, b"/Coords[0 0 0 1e9 1e9 1e30]/Domain[0 1]/Function 10 0 R", b""),
        "free": (4, b"/BitsPerFlag 8/BitsPerCoordinate 8/BitsPerComponent 8/Decode[0 2900 0 2900 0 1 0 1 0 1]", 6),
        "lattice": (
            5,
            b"/VerticesPerRow 2147483647/BitsPerCoordinate 8/BitsPerComponent 8/Decode[0 2900 0 2900 0 1 0 1 0 1]",
            5,
        ),
        "coons": (6, b"/BitsPerFlag 8/BitsPerCoordinate 8/BitsPerComponent 8/Decode[0 2900 0 2900 0 1 0 1 0 1]", 37),
    }[which]
    data = chance.randbytes(body * 999) * 50 if body else b""
    shading = (
        stream(data, b"/ShadingType %d" % kind + ramp + keys)
        if body
        else b"<</ShadingType %d%b%b>>" % (kind, ramp, keys)
    )
    program = b"{" + b"sin cos exch sin exch " * 20_000 + b"0}"
    unending = b"{" * 50_000 + b"}" * 50_000
    calculator = b"/FunctionType 4/Domain[0 1 0 1]/Range[0 1 0 1 0 1]"
    more = [
        shading,
        stream(program, calculator),
        stream(unending, calculator),
        b"<</FunctionType 3/Domain[0 1]/Bounds[.5]/Encode[0 1 0 1]/Functions[8 0 R 8 0 R]>>",
        stream(bytes(999), b"/FunctionType 0/Domain[0 1 0 1]/Range[0 1 0 1 0 1]/Size[65535 65535]/BitsPerSample 32"),
        b"<</FunctionType 2/Domain[0 1]/N 1e308/C0[0 0 0]/C1[1e308 1 1]>>",
    ]
    return document(b"/S sh " * 20, *more, box=b"0 0 2900 2900", resources=b"<</Shading<</S 5 0 R>>>>") + salt(chance)


@register("document", "dashes", "wide", "joins", "clipped", "text-clip")
def strokes(chance: Random, which: str) -> bytes:
    """Lines of billions of dashes, lines wider than any page, clips of text in text."""
    content = {
        "dashes": b"[.0001 .0001] 0 d .001 w " + b"0 0 m 2900 2900 l S " * 200,
        "wide": b"1e30 w " + b"0 0 m 2900 2900 l S " * 5000,
        "joins": b"1 j 1 J 900 w 0 0 m " + b"9 9 l 2000 5 l " * 20_000 + b"S",
        "clipped": b"".join(b"%d 0 m 2900 %d l 0 2900 l h W n " % (n % 2900, n % 1450) for n in range(20_000))
        + b"0 0 2900 2900 re f",
        "text-clip": b"BT /F 2000 Tf 7 Tr " + b"(WWWWWWWWWWWW) Tj " * 2000 + b"ET 0 0 2900 2900 re f",
    }[which]
    fonts = b"<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    return document(content, box=b"0 0 2900 2900", resources=fonts) + salt(chance)


@register("document", "type3", "glyphs", "truetype", "cff", "widths", "cmap", "large", "composite", "descendants")
def fonts(chance: Random, which: str) -> bytes:
    """Fonts whose letters draw text in the same font, damaged programs, maps of millions of codes."""
    embedded = b"<</Type/Font/Subtype/TrueType/BaseFont/A/FirstChar 0/LastChar 255/Widths 6 0 R"
    embedded += b"/FontDescriptor<</Type/FontDescriptor/FontName/A/Flags 4/FontFile%b 7 0 R>>>>"
    type3 = b"<</Type/Font/Subtype/Type3/FontBBox[0 0 1 1]/FontMatrix[1 0 0 1 0 0]/FirstChar 65/LastChar 65/Widths[1]"
    type3 += b"/CharProcs<</A 7 0 R>>/Encoding<</Differences[65/A]>>/Resources<</Font<</F 5 0 R>>>>>>"
    composite = b"<</Type/Font/Subtype/Type0/BaseFont/A/Encoding 7 0 R/DescendantFonts[%b]>>"
    tables = (
        b"\0\1\0\0\0\x20"
        + bytes(6)
        + b"".join(
            name + bytes(4) + chance.randbytes(2).rjust(4, b"\0") + b"\0\0\xff\xff"
            for name in (b"glyf", b"head", b"loca", b"maxp", b"cmap", b"fpgm", b"prep")
        )
    )
    font, program = {
        "type3": (type3, b"1 0 d0 BT /F 1 Tf (AAAAAAAAAA) Tj ET"),
        "glyphs": (type3, b"1 0 d0 0 0 1 1 re f " * 200_000),
        "truetype": (embedded % b"2", tables + chance.randbytes(20_000)),
        "cff": (embedded % b"3", b"\1\0\4\4\xff\xff\4" + chance.randbytes(20_000)),
        "widths": (embedded % b"2", b""),
        "cmap": (composite % b"8 0 R", b"begincmap " + b"1 begincidrange <0000><ffff> 0 endcidrange " * 60_000),
        "large": (embedded % b"", b"%!PS-AdobeFont-1.0: A\n" + b"/CharStrings 65535 dict dup begin " * 50_000),
        "composite": (composite % b"5 0 R", b""),
        "descendants": (composite % (b"8 0 R " * 100_000), b""),
    }[which]
    descendant = b"<</Type/Font/Subtype/CIDFontType2/BaseFont/A/DW 1000/W[" + b"0 65535 9 " * 30_000 + b"]>>"
    more = (font, b"[" + b"9 " * (1_000_000 if which == "widths" else 256) + b"]", stream(program), descendant)
    return document(b"BT /F 20 Tf (AAAAAAAAAA) Tj ET " * 20, *more, resources=b"<</Font<</F 5 0 R>>>>") + salt(chance)


@register("document", "icc", "separation", "devicen", "indexed", "lab")
def color_spaces(chance: Random, which: str) -> bytes:
    """Colour spaces that are based on themselves, have thousands of inks, or profiles of gigabytes."""
    space = {
        "icc": b"[/ICCBased 6 0 R]",
        "separation": b"[/Separation/A 5 0 R 7 0 R]",
        "indexed": b"[/Indexed 5 0 R 2147483647 (x)]",
        "devicen": b"[/DeviceN[" + b"/A" * 60_000 + b"]/DeviceRGB 7 0 R]",
        "lab": b"[/Lab<</WhitePoint[0 0 0]/Range[1e38 -1e38 0 0]>>]",
    }[which]
    profile = stream(zeros(1 << 28), b"/N 3/Alternate 5 0 R/Filter/FlateDecode", coded=False)
    function = b"<</FunctionType 2/Domain[0 1]/N 1>>"
    content = b"/C cs 1 scn 0 0 99 99 re f " * 5000
    return document(content, space, profile, function, resources=b"<</ColorSpace<</C 5 0 R>>>>") + salt(chance)
