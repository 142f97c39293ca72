"""Hostile PDFs by their structure: pages, trees, references, streams, encryption, scripts."""

from __future__ import annotations

import struct
import zlib
from random import Random

from tests.hostile.bad_media import damaged, register, repeated, zeros


def stream(body: bytes, keys: bytes = b"", *, coded: bool = True) -> bytes:
    """A stream object, deflated unless its ``keys`` say how it is coded."""
    if coded:
        body, keys = zlib.compress(body, 6), keys + b"/Filter/FlateDecode"
    return b"<<%b/Length %d>>stream\n%b\nendstream" % (keys, len(body), body)


def pdf(*objects: bytes, trailer: bytes = b"", start: int | None = None) -> bytes:
    """Objects numbered from 1, the first of which is the catalog; ``start`` is where the table is said to be."""
    out, places = [b"%PDF-1.7\n"], []
    at = len(out[0])
    for number, body in enumerate(objects, 1):
        places.append(at)
        out.append(b"%d 0 obj\n%b\nendobj\n" % (number, body))
        at += len(out[-1])
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer<</Size %d/Root 1 0 R%b>>\nstartxref\n%d\n%%%%EOF\n"
    return b"".join(out) + table + end % (len(objects) + 1, trailer, at if start is None else start)


def page(box: bytes = b"0 0 100 100", keys: bytes = b"", resources: bytes = b"<<>>") -> bytes:
    return b"<</Type/Page/Parent 2 0 R/MediaBox[%b]/Contents 4 0 R/Resources %b%b>>" % (box, resources, keys)


def document(
    content: bytes = b"",
    *more: bytes,
    box: bytes = b"0 0 100 100",
    resources: bytes = b"<<>>",
    catalog: bytes = b"",
    keys: bytes = b"",
    trailer: bytes = b"",
    pages: int = 1,
    count: int | None = None,
) -> bytes:
    """A document whose pages are all the same object: its content is 4, further objects begin at 5."""
    kids = b"3 0 R " * pages
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R%b>>" % catalog,
        b"<</Type/Pages/Count %d/Kids[%b]>>" % (pages if count is None else count, kids),
        page(box, keys, resources),
        stream(content),
        *more,
        trailer=trailer,
    )


def salt(chance: Random) -> bytes:
    """A comment at the end, so that no two files are the same."""
    return b"%" + chance.randbytes(6).hex().encode()


@register("document", 2, 16, 64)
def large_pages(chance: Random, count: int) -> bytes:
    """Pages of 36 million pixels each in some kilobytes, which are objects of their own."""
    kids = b"".join(b"%d 0 R " % (number + 4) for number in range(count))
    pages = [b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 2999 %d]>>" % (2999 - n % 9) for n in range(count)]
    return pdf(
        b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count %d/Kids[%b]>>" % (count, kids), b"null", *pages
    ) + salt(chance)


BOXES = {
    "huge": b"0 0 1000000 1000000",
    "infinite": b"0 0 1e38 1e38",
    "digits": b"0 0 " + b"9" * 5000 + b" 9",
    "none": b"5 5 5 5",
    "negative": b"0 0 -500 -500",
    "thin": b"0 0 .0001 17000000",
    "names": b"/a /b /c /d",
    "nan": b"0 0 nan inf",
    "few": b"0 0",
    "far": b"2147483000 2147483000 2147483600 2147483600",
    "nested": b"[" * 500 + b"]" * 500,
}


@register("document", *BOXES)
def boxes(chance: Random, which: str) -> bytes:
    """Pages of impossible sizes."""
    return document(box=BOXES[which]) + salt(chance)


@register("document", "unit", "rotation", "crop", "view")
def page_keys(chance: Random, which: str) -> bytes:
    """Keys that multiply a page's size, or turn it by odd angles."""
    keys = {
        "unit": b"/UserUnit 1000000",
        "rotation": b"/Rotate 9999999999999999999",
        "crop": b"/CropBox[-1e30 -1e30 1e30 1e30]",
        "view": b"/VP[" + b"<</BBox[0 0 1 1]>>" * 50_000 + b"]",
    }[which]
    return document(keys=keys) + salt(chance)


@register("document", "count", "loop", "itself", "deep", "wide", "negative", "other", "parents")
def trees(chance: Random, which: str) -> bytes:
    """Trees of pages that declare billions, hold themselves, or are tens of thousands deep."""
    catalog = b"<</Type/Catalog/Pages 2 0 R>>"
    match which:
        case "count":
            data = document(count=1_000_000_000)
        case "loop":
            data = pdf(
                catalog, b"<</Type/Pages/Count 100/Kids[3 0 R 3 0 R]>>", b"<</Type/Pages/Count 100/Kids[2 0 R 2 0 R]>>"
            )
        case "itself":
            data = pdf(catalog, b"<</Type/Pages/Count 64/Parent 2 0 R/Kids[" + b"2 0 R " * 64 + b"]>>")
        case "deep":
            levels = [
                b"<</Type/Pages/Count 1/Parent %d 0 R/Kids[%d 0 R]>>" % (max(n + 1, 2), n + 3) for n in range(20_000)
            ]
            data = pdf(catalog, *levels, b"<</Type/Page/MediaBox[0 0 100 100]>>")
        case "wide":
            data = document(pages=300_000)
        case "negative":
            data = document(pages=3, count=-5)
        case "other":
            data = pdf(catalog, b"<</Type/Pages/Count 3/Kids[1 0 R 99 0 R (text)]>>")
        case _:
            data = document(keys=b"/Parent 3 0 R/Parent 3 0 R").replace(b"/Parent 2 0 R", b"", 1)
    return data + salt(chance)


@register("document", "arrays", "dictionaries", "closing", "strings", "names", "numbers", "hex", "comments")
def syntax(chance: Random, which: str) -> bytes:
    """Arrays in arrays, endless strings, names of megabytes."""
    many = 200_000
    value = {
        "arrays": b"[" * many + b"]" * many,
        "dictionaries": b"<</a" * many + b" 0" + b">>" * many,
        "closing": b"[" * many,
        "strings": b"(" * many + b")" * many,
        "names": b"/" + b"#41" * 1_000_000,
        "numbers": b"[" + b"9" * 3_000_000 + b"]",
        "hex": b"<" + b"4 " * 2_000_000 + b">",
        "comments": b"%x\n" * 1_000_000 + b"0",
    }[which]
    return document(catalog=b"/X " + value) + salt(chance)


@register("document", "loop", "itself", "chain", "sizes", "far", "overlap", "missing", "entries")
def tables(chance: Random, which: str) -> bytes:
    """Tables of references that lead to themselves, tables of billions of entries, and none at all."""
    body = document()
    at = body.rindex(b"xref\n0")
    match which:
        case "loop":
            data = document(trailer=b"/Prev %d" % at)
        case "itself":
            data = pdf(b"1 0 R", b"2 0 R", b"3 0 R", trailer=b"/Prev 0")
        case "chain":
            data, before = body, body.rindex(b"xref\n0")
            for _ in range(20_000):
                here = len(data)
                data += b"xref\n0 0\ntrailer<</Size 5/Root 1 0 R/Prev %d>>\n" % before
                before = here
            data += b"startxref\n%d\n%%%%EOF\n" % before
        case "sizes":
            data = body.replace(b"xref\n0 5", b"xref\n0 2147483647").replace(b"/Size 5", b"/Size 2147483647")
        case "far":
            data = pdf(b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Count 1/Kids[4194303 0 R]>>", start=2**40)
        case "overlap":
            data = body.replace(b"0000000000 65535 f ", b"0000000009 65535 n ") * 20
        case "missing":
            data = b"%PDF-1.7\n" + b"".join(
                b"%d 0 obj<</Type/Catalog/Pages %d 0 R>>endobj\n" % (n, n + 1) for n in range(100_000)
            )
        case _:
            data = body[:at] + b"xref\n" + b"0 1\n0000000000 65535 f \n" * 60_000 + body[body.rindex(b"trailer") :]
    return data + salt(chance)


def reference_stream(entries: bytes, widths: bytes, size: int, keys: bytes = b"") -> bytes:
    """A document whose table of references is a stream."""
    body = b"%PDF-1.7\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    head = b"/Type/XRef/Root 1 0 R/Size %d/W[%b]%b" % (size, widths, keys)
    return body + b"9 0 obj" + stream(entries, head, coded=False) + b"endobj\nstartxref\n%d\n%%%%EOF\n" % len(body)


@register("document", "widths", "index", "bomb", "predictor")
def reference_streams(chance: Random, which: str) -> bytes:
    """References in streams: fields of gigabytes, ranges of billions, contents that inflate."""
    flate = b"/Filter/FlateDecode"
    data = {
        "widths": lambda: reference_stream(bytes(99), b"2147483647 2147483647 2147483647", 9),
        "index": lambda: reference_stream(bytes(99), b"1 2 1", 9, b"/Index[" + b"0 2147483647 " * 9999 + b"]"),
        "bomb": lambda: reference_stream(zeros(1 << 30), b"1 2 1", 1 << 28, flate),
        "predictor": lambda: reference_stream(
            zeros(1 << 20),
            b"1 2 1",
            9,
            flate + b"/DecodeParms<</Predictor 12/Columns 2147483647/Colors 32/BitsPerComponent 16>>",
        ),
    }[which]()
    return data + salt(chance)


@register("document", "bomb", "count", "itself", "extends")
def object_streams(chance: Random, which: str) -> bytes:
    """Objects in streams: that inflate to gigabytes, declare billions, or lie in themselves."""
    keys = {
        "bomb": b"/N 9/First 99",
        "count": b"/N 2147483647/First 2147483647",
        "itself": b"/N 1/First 4/Extends 1 0 R",
        "extends": b"/N 1/First 4/Extends 4 0 R",
    }[which]
    content = zeros(1 << 30) if which == "bomb" else zlib.compress(b"4 0 <<>>")
    objects = stream(content, b"/Type/ObjStm%b/Filter/FlateDecode" % keys, coded=False)
    body = b"%PDF-1.7\n4 0 obj" + objects + b"endobj\n"
    # Objects 1 to 3 are said to lie in the stream, which is object 4.
    rows = b"\0\0\0\0" + b"".join(b"\2\0\4" + bytes([n]) for n in range(3)) + b"\1\0\x09\0"
    return (
        body
        + b"9 0 obj"
        + stream(rows, b"/Type/XRef/Root 1 0 R/Size 5/W[1 2 1]")
        + b"endobj\nstartxref\n%d\n%%%%EOF\n" % len(body)
        + salt(chance)
    )


FILTERS = ("FlateDecode", "LZWDecode", "RunLengthDecode", "ASCIIHexDecode", "ASCII85Decode", "Crypt", "Unknown")


@register("document", *FILTERS, "layers", "same", "lengths", "predictor")
def filters(chance: Random, which: str) -> bytes:
    """Contents that inflate to gigabytes, in one layer and in several."""
    one = {
        "FlateDecode": zeros(1 << 31),
        "LZWDecode": b"\x80\x0b\x60\x50\x22\x0c\x0c\x85\x01" * 100_000,
        "RunLengthDecode": b"\x81q" * 2_000_000,
        "ASCIIHexDecode": b"71 " * 2_000_000,
        "ASCII85Decode": b"z" * 3_000_000,
        "predictor": zeros(1 << 26),
    }.get(which, b"q Q " * 1000)
    keys = b"/Filter/" + which.encode()
    if which == "layers":
        one = zlib.compress(zlib.compress(zlib.compress(repeated(b"q Q ", 100_000_000), 9), 9), 9)
        keys = b"/Filter[" + b"/FlateDecode" * 4 + b"]"
    elif which == "same":
        one, keys = zlib.compress(b"q Q " * 99), b"/Filter[" + b"/FlateDecode" * 5000 + b"]"
    elif which == "lengths":
        keys = b"/Length 2147483647/DL 2147483647"
    elif which == "predictor":
        keys = b"/Filter/FlateDecode/DecodeParms<</Predictor 15/Columns 1/Colors 1/BitsPerComponent 1>>"
    body = document().replace(stream(b""), stream(one, keys, coded=False))
    return body + salt(chance)


@register("document", "rc4", "aes", "public", "rounds", "lies")
def encrypted(chance: Random, which: str) -> bytes:
    """Encryption with passwords that nobody has, of kinds that do not exist, of keys of all lengths."""
    keys = {
        "rc4": b"/Filter/Standard/V 1/R 2/P -4",
        "aes": b"/Filter/Standard/V 5/R 6/Length 256/P -4",
        "public": b"/Filter/Adobe.PubSec/V 4/SubFilter/adbe.pkcs7.s5",
        "rounds": b"/Filter/Standard/V 99/R 99/P -4",
        "lies": b"/Filter/Standard/V 2/R 3/Length 2147483640/P 99999999999",
    }[which]
    texts = b"".join(
        b"/%b<%b>" % (name, chance.randbytes(48).hex().encode()) for name in (b"O", b"U", b"OE", b"UE", b"Perms")
    )
    identity = chance.randbytes(16).hex().encode()
    return document(trailer=b"/Encrypt<<%b%b>>/ID[<%b><%b>]" % (keys, texts, identity, identity)) + salt(chance)


@register("document", "script", "launch", "additional", "names", "timer", "embedded", "richmedia")
def actions(chance: Random, which: str) -> bytes:
    """Scripts and programs that a document asks for as soon as it is opened."""
    script = b"<</S/JavaScript/JS(while(true){app.alert(1)})>>"
    catalog = {
        "script": b"/OpenAction" + script,
        "launch": b"/OpenAction<</S/Launch/Win<</F(cmd.exe)>>/F(/bin/sh)>>",
        "additional": b"/AA<</WC" + script + b"/WS" + script + b"/DP" + script + b">>",
        "names": b"/Names<</JavaScript<</Names[" + b"(a)" + script * 1 + b"]>>>>",
        "timer": b"/OpenAction<</S/JavaScript/JS(app.setInterval('1',1))/Next[" + script * 5000 + b"]>>",
        "embedded": b"/Names<</EmbeddedFiles<</Names[(x)<</EF<</F 4 0 R>>>>]>>>>/Collection<<>>",
        "richmedia": b"/Extensions<</ADBE<</BaseVersion/1.7>>>>/OpenAction<</S/RichMediaExecute/CMD<</C(x)>>>>",
    }[which]
    return document(catalog=catalog, keys=b"/AA<</O%b>>" % script) + salt(chance)


@register("document", "flat", "deep", "loop", "calculated", "xfa", "texts")
def forms(chance: Random, which: str) -> bytes:
    """Forms of tens of thousands of fields, fields in each other, fields that compute each other."""
    many = 30_000
    field = b"<</FT/Tx/T(a)/Subtype/Widget/Type/Annot/Rect[0 0 9 9]/V(x)/DA(/Helv 0 Tf)%b>>"
    match which:
        case "flat":
            more = [field % b""] * many
            fields = b"".join(b"%d 0 R " % (5 + n) for n in range(many))
        case "deep":
            more = [b"<</T(a)/FT/Tx/Kids[%d 0 R]>>" % (6 + n) for n in range(many)] + [field % b""]
            fields = b"5 0 R"
        case "loop":
            more = [b"<</T(a)/FT/Tx/Parent 6 0 R/Kids[6 0 R 6 0 R]>>", b"<</T(b)/Parent 5 0 R/Kids[5 0 R 5 0 R]>>"]
            fields = b"5 0 R 6 0 R"
        case "calculated":
            more = [field % b"/AA<</C<</S/JavaScript/JS(while(1);)>>/F<</S/JavaScript/JS(while(1);)>>>>"] * 50
            fields = b"".join(b"%d 0 R " % (5 + n) for n in range(50))
        case "xfa":
            inner = b"<xdp:xdp xmlns:xdp='http://ns.adobe.com/xdp/'><template>" + b"<subform>" * 100_000
            more, fields = [stream(inner)], b"]/XFA[(template)5 0 R"
        case _:
            more, fields = [field % (b"/V(" + b"word " * 400_000 + b")/Ff 4096")], b"5 0 R"
    annots = b"/Annots[%b]" % (fields if which not in ("xfa", "loop") else b"")
    form = b"/AcroForm<</NeedAppearances true/Fields[%b]/CO[%b]>>" % (fields, b"5 0 R" * (which == "calculated"))
    return document(b"", *more, catalog=form, keys=annots) + salt(chance)


@register("document", "many", "appearance", "popup", "loop")
def annotations(chance: Random, which: str) -> bytes:
    """Annotations by the hundred thousand, and ones whose looks contain themselves."""
    keys = {
        "many": b"/Annots["
        + b"<</Type/Annot/Subtype/Square/Rect[0 0 99 99]/C[1 0 0]/IC[0 1 0]/BS<</W 9>>>>" * 60_000
        + b"]",
        "appearance": b"/Annots[" + b"<</Type/Annot/Subtype/Stamp/Rect[0 0 99 99]/AP<</N 5 0 R>>>>" * 20_000 + b"]",
        "popup": b"/Annots[<</Subtype/Text/Rect[0 0 9 9]/Contents(" + b"x" * 3_000_000 + b")/Popup 5 0 R>>]",
        "loop": b"/Annots 5 0 R",
    }[which]
    look = b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Matrix[1e-9 0 0 1e9 0 0]/Resources<</XObject<</F 5 0 R>>>>"
    more = b"[" + b"5 0 R " * 500 + b"]" if which == "loop" else stream(b"/F Do " * 50, look)
    return document(b"", more, keys=keys) + salt(chance)


@register("document", "outlines", "names", "destinations", "layers", "structure", "labels", "metadata")
def catalogs(chance: Random, which: str) -> bytes:
    """Outlines, name trees and labels that are circular or endless."""
    catalog = {
        "outlines": b"/Outlines 5 0 R/PageMode/UseOutlines",
        "names": b"/Names<</Dests 5 0 R>>",
        "destinations": b"/Dests 5 0 R",
        "layers": b"/OCProperties<</OCGs["
        + b"5 0 R " * 100_000
        + b"]/D<</Order["
        + b"[" * 9000
        + b"]" * 9000
        + b"]>>>>",
        "structure": b"/StructTreeRoot 5 0 R/MarkInfo<</Marked true>>",
        "labels": b"/PageLabels 5 0 R",
        "metadata": b"/Metadata 6 0 R",
    }[which]
    node = b"<</Type/Outlines/First 5 0 R/Last 5 0 R/Next 5 0 R/Prev 5 0 R/Parent 5 0 R"
    node += b"/Count -2147483648/Kids[5 0 R 5 0 R]/K 5 0 R/Nums[0 5 0 R]>>"
    xml = b"<?xpacket?>" + b"<a>" * 200_000
    return document(b"", node, stream(xml, b"/Type/Metadata/Subtype/XML"), catalog=catalog) + salt(chance)


@register("document", *range(8))
def damaged_document(chance: Random, _: int) -> bytes:
    content = b"1 0 0 rg 10 10 50 50 re f BT /F 24 Tf 10 70 Td (Hello) Tj ET"
    fonts = b"<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    return damaged(document(content, resources=fonts, pages=3), chance)


@register("document", "linearized", "header", "binary", "twice", "junk")
def beginnings(chance: Random, which: str) -> bytes:
    """Odd beginnings: a hint of parts that are not there, kilobytes of other bytes, another PDF."""
    data = document()
    linear = (
        b"%%PDF-1.7\n99 0 obj<</Linearized 1/L %d/H[2147483647 99]/O 3/E 2147483647/N 2147483647/T 9>>endobj\n"
        % len(data)
    )
    return {
        "linearized": linear + data[9:],
        "header": b"%PDF-9.9999999999\n" + data[9:],
        "binary": chance.randbytes(1000) + data,
        "twice": data * 2000,
        "junk": data + chance.randbytes(500_000) + struct.pack(">Q", 1),
    }[which] + salt(chance)
