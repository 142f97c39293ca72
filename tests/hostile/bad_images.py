"""Hostile PNG, ICO, GIF, WebP and JPEG files."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random

from PIL import Image, features

from tests.hostile.bad_media import damaged, register, zeros

LARGEST = 10_900
"""Pixels per side: its square is a little less than the 120 million that an image may have by default."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def saved(format: str, size: tuple[int, int] = (48, 32), mode: str = "RGB", **options: object) -> bytes:
    """A small valid image in a format."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, format, **options)
    return file.getvalue()


# PNG


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, depth: int = 8, color: int = 0, *, interlace: int = 0, before: bytes = b"",
    pixels: bytes | None = None, after: bytes = b"",
) -> bytes:  # fmt: skip
    """A black PNG; ``before`` and ``after`` are chunks around its pixels."""
    if pixels is None:
        passes = [(width, height)]
        if interlace:  # more than enough: each of seven passes has at most so many rows and bytes
            passes = [
                (-(-width // x), -(-height // y)) for x, y in ((8, 8), (8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (1, 2))
            ]
        pixels = zeros(sum(h * (1 + (w * depth * _CHANNELS[color] + 7) // 8) for w, h in passes))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    palette = chunk(b"PLTE", bytes(768)) if color == 3 else b""
    parts = (chunk(b"IHDR", header), palette, before, chunk(b"IDAT", pixels), after, chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@register(
    "image", (1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)
)  # fmt: skip
def png_bomb(chance: Random, depth: int, color: int) -> bytes:
    """The maximum number of pixels; of 16 bits and with transparency they take 8 bytes each."""
    return png(LARGEST, LARGEST - chance.randrange(50), depth, color)


@register("image", 1, 8, 16)
def png_interlaced_bomb(chance: Random, depth: int) -> bytes:
    return png(LARGEST, LARGEST - chance.randrange(50), depth, 0, interlace=1)


@register("image", "wide", "high", "above", "most", "zero", "negative", refused=True)
def png_sides(chance: Random, which: str) -> bytes:
    """Images of one row or column, and sizes beyond any limit without a byte behind them."""
    wide = 119_000_000 + chance.randrange(999)
    sides = {
        "wide": (wide, 2), "high": (2, wide), "above": (11_000, 11_000), "most": (2**31 - 1, 2**31 - 1),
        "zero": (0, 16), "negative": (2**32 - 1, 2),
    }  # fmt: skip
    return png(*sides[which], 1, 0, pixels=zeros(1000 + chance.randrange(99)))


@register("image", (b"aaAa", 400_000), (b"tEXt", 200_000), (b"IDAT", 400_000), (b"tRNS", 100_000), (b"eXIf", 100_000))
def png_chunks(chance: Random, kind: bytes, count: int) -> bytes:
    """Hundreds of thousands of empty chunks."""
    body = {b"tEXt": b"a\0b", b"eXIf": b"MM\0*\0\0\0\x08\0\0"}.get(kind, b"")
    return png(16, 16 + chance.randrange(99), before=chunk(kind, body) * count)


@register("image", heavy=True)
def png_chunks_millions(chance: Random) -> bytes:
    return png(16, 16 + chance.randrange(99), before=chunk(b"aaAa") * 4_500_000)


@register("image", "iCCP", "zTXt", "iTXt")
def png_inflating(chance: Random, kind: str) -> bytes:
    """A profile, or texts, that inflate to gigabytes."""
    head = {"iCCP": b"p\0\0", "zTXt": b"Raw profile type exif\0\0", "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}[kind]
    bombs = [chunk(kind.encode(), head + zeros((1 << 28) + chance.randrange(99))) for _ in range(4)]
    return png(16, 16, before=b"".join(bombs))


@register("image", "count", "frames", "shuffled", also=("video",))
def png_animated(chance: Random, which: str) -> bytes:
    """Animations of a billion frames, of large frames, and with their parts out of order."""
    side = 64 if which != "frames" else 5000
    frame = [
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * n, side, side, 0, 0, 1, 1000, 0, 0))
        + chunk(b"fdAT", struct.pack(">I", 2 * n + 1) + zeros(side * (side + 1)))
        for n in range(400)
    ]
    if which == "shuffled":
        chance.shuffle(frame)
    count = 2**31 - 1 if which == "count" else 400
    head = chunk(b"acTL", struct.pack(">II", count, 0))
    return png(
        side,
        side,
        before=head,
        after=b"".join(frame[: 20 if which == "count" else 400]) + chunk(b"teXt", chance.randbytes(4)),
    )


@register("image", *range(6))
def png_mutant(chance: Random, _: int) -> bytes:
    """Chunks of random contents whose checksums are right."""
    kinds = [b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"pHYs", b"acTL", b"fcTL", b"eXIf", b"cICP"]
    extra = [chunk(chance.choice(kinds), chance.randbytes(chance.choice((0, 1, 2, 9, 26, 300)))) for _ in range(9)]
    return png(64, 64, chance.choice((8, 16)), chance.choice((0, 2, 3, 4, 6)), before=b"".join(extra))


@register("image", "filter", "early", "more")
def png_pixels(chance: Random, which: str) -> bytes:
    """Filters that do not exist, pixels that end early, and far more of them than the image has."""
    rows = b"".join(bytes([chance.randrange(256)]) + chance.randbytes(64) for _ in range(64))
    stream = {"filter": zlib.compress(rows), "early": zlib.compress(rows[:900]), "more": zeros(1 << 30)}[which]
    return png(64, 64, pixels=stream, after=chunk(b"teXt", chance.randbytes(4)))


# ICO


def ico(*images: bytes) -> bytes:
    """An icon of several images."""
    at, entries = 6 + 16 * len(images), []
    for image in images:
        entries.append(struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), at))
        at += len(image)
    return struct.pack("<HHH", 0, 1, len(images)) + b"".join(entries) + b"".join(images)


@register("image", (13_000, 1, 0), (13_000, 8, 6), (20_000, 1, 0), (10_900, 16, 6))
def ico_bomb(chance: Random, side: int, depth: int, color: int) -> bytes:
    """An icon of 16 pixels per side, whose image is another image of more than a hundred million."""
    return ico(png(side, side - chance.randrange(50), depth, color))


@register("image", "itself", "entries", "bitmap")
def ico_directory(chance: Random, which: str) -> bytes:
    """Entries that lead to the directory itself, 65,535 of them, and a bitmap whose header lies."""
    if which == "bitmap":
        header = struct.pack("<IiiHHIIiiII", 40, 30_000, -60_000, 1, 32, 0, 0, 0, 0, 0, 0)
        return ico(header + chance.randbytes(2000))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 1 << 20 if which == "entries" else 100, 0)
    return struct.pack("<HHH", 0, 1, 65_535) + entry * (65_535 if which == "entries" else 9) + chance.randbytes(9)


# GIF


def gif(width: int, height: int, blocks: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3 + blocks + b";"


def gif_frame(width: int, height: int, data: bytes = b"\x02\x44\x01", left: int = 0, disposal: int = 1) -> bytes:
    """A frame of one code, whose pixels beyond it are missing."""
    control = b"\x21\xf9\x04" + struct.pack("<BHB", disposal << 2, 1, 0) + b"\0"
    pieces = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    return control + b"," + struct.pack("<HHHHB", left, 0, width, height, 0) + b"\x02" + pieces + b"\0"


@register("image", 10_900, 65_535, also=("video",))
def gif_bomb(chance: Random, side: int) -> bytes:
    """A large screen, and a frame of the same size that holds one pixel."""
    return gif(side, side - chance.randrange(50), gif_frame(side, side))


@register("image", also=("video",))
def gif_filled(chance: Random) -> bytes:
    """All pixels of a large frame, in codes that double the pixels they stand for."""
    file = io.BytesIO()
    Image.new("P", (8000, 8000 - chance.randrange(50))).save(file, "GIF")
    return file.getvalue()


@register("image", 300_000, also=("video",))
def gif_frames(chance: Random, count: int) -> bytes:
    return gif(1 + chance.randrange(99), 1, gif_frame(1, 1) * count)


@register("video", heavy=True)
def gif_frames_million(chance: Random) -> bytes:
    return gif(1 + chance.randrange(99), 1, gif_frame(1, 1) * 1_000_000)


@register("video", 1, 2, 3)
def gif_large_frames(chance: Random, disposal: int) -> bytes:
    """Thousands of frames of some bytes, each of which changes a canvas of 36 million pixels."""
    return gif(5990, 5990 - chance.randrange(50), gif_frame(5990, 5900, disposal=disposal) * 3000)


@register("image", b"\xfe", b"\xff", b"\x01", b"\xf9", also=("video",))
def gif_extensions(chance: Random, label: bytes) -> bytes:
    """Endless extensions: comments, applications, texts and controls."""
    head = b"!" + label + (b"\x0bNETSCAPE2.0" if label == b"\xff" else b"")
    return gif(9, 9 + chance.randrange(99), (head + b"\x01x" * 9 + b"\0") * 200_000 + gif_frame(9, 9))


@register("image", also=("video",))
def gif_codes(chance: Random) -> bytes:
    """Codes at random, of sizes that LZW does not have."""
    frame = bytearray(gif_frame(200, 200, chance.randbytes(5000), left=chance.choice((0, 65_000))))
    frame[18] = chance.randrange(14)
    return gif(200, 200, bytes(frame) * 3)


# WebP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless(width: int, height: int, alpha: int = 0) -> bytes:
    """The body of a lossless WebP of one colour: every code has one symbol, so that pixels take no bits at all."""
    bits = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (alpha, 1), (0, 3), (0, 1), (0, 1), (0, 1)]
    for _ in range(5):  # green, red, blue, alpha, distance: a simple code with one symbol of one bit, 0
        bits += [(1, 1), (0, 1), (0, 1), (0, 1)]
    number = place = 0
    for value, size in bits:
        number |= value << place
        place += size
    return number.to_bytes((place + 7) // 8 + 1, "little")


def tiny_webp(width: int, height: int) -> bytes:
    """Any number of pixels in some thirty bytes."""
    return riff((b"VP8L", lossless(width, height)))


@register("image", (10_900, 10_900), (16_383, 7_300), (16_384, 16_384), (12_000, 12_000))
def webp_bomb(chance: Random, width: int, height: int) -> bytes:
    """Thirty bytes that are an image of a hundred million pixels."""
    return riff((b"VP8L", lossless(width, height - chance.randrange(50))), (b"JUNK", chance.randbytes(3)))


def animated_webp(side: int, frames: int, frame_side: int, milliseconds: int = 20, extra: bytes = b"") -> bytes:
    size = (side - 1).to_bytes(3, "little") * 2
    frame = b"VP8L" + struct.pack("<I", 20) + lossless(frame_side, frame_side).ljust(20, b"\0")
    place = bytes(6) + (frame_side - 1).to_bytes(3, "little") * 2 + milliseconds.to_bytes(3, "little") + b"\0"
    head = ((b"VP8X", b"\x12\0\0\0" + size), (b"ANIM", bytes(4) + b"\0\0"))
    return riff(*head, *[(b"ANMF", place + frame)] * frames, (b"JUNK", extra))


@register("video", (5990, 4000, 5990), (16, 300_000, 16), (16_000, 3, 16), (64, 500, 4096), also=("image",))
def webp_animated(chance: Random, side: int, frames: int, frame_side: int) -> bytes:
    """Large frames of thirty bytes, hundreds of thousands of small ones, frames larger than their canvas."""
    return animated_webp(side, frames, frame_side, extra=chance.randbytes(3))


@register("video", also=("image",))
def webp_long(chance: Random) -> bytes:
    """An animation of weeks."""
    return animated_webp(64, 900, 64, milliseconds=2**24 - 1, extra=chance.randbytes(3))


@register("image", "canvas", "alpha", "profile", "nested")
def webp_lies(chance: Random, which: str) -> bytes:
    """A canvas of other sizes than its image, and chunks that declare more than there is."""
    body = {"canvas": lossless(64, 64), "alpha": b"\x1d" + chance.randbytes(99), "profile": b"x" * 99, "nested": b""}[
        which
    ]
    kind = {"canvas": b"VP8L", "alpha": b"ALPH", "profile": b"ICCP", "nested": b"ANMF" * 50}[which][:4]
    file = riff((b"VP8X", b"\x3e\0\0\0" + b"\xff" * 6), (kind, body), (b"JUNK", chance.randbytes(3)))
    return file if which == "canvas" else file[:34] + b"\xff\xff\xff\x7f" + file[38:]


# JPEG


def segment(marker: int, body: bytes = b"") -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def scans_of(data: bytes) -> tuple[bytes, list[bytes]]:
    """A JPEG's headers, and its scans with the tables in front of each."""
    at, head, pending, scans = 2, b"", b"", []
    while data[at + 1] != 0xD9:
        marker, start = data[at + 1], at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            while data[at] != 0xFF or data[at + 1] in (0, *range(0xD0, 0xD8)):
                at += 1
            scans.append(pending + data[start:at])
            pending = b""
        elif marker == 0xC4:
            pending += data[start:at]
        else:
            head += data[start:at]
    return head, scans


def progressive(side: int, scans: int) -> bytes:
    """A progressive JPEG whose shortest scan comes again and again: a pass over all blocks for some bytes each."""
    head, found = scans_of(saved("JPEG", (side, side), "L", progressive=True, quality=1))
    return b"\xff\xd8" + head + b"".join(found) + min(found, key=len) * scans + b"\xff\xd9"


@register("image", (1500, 400), (300, 20_000))
def jpeg_scans(chance: Random, side: int, scans: int) -> bytes:
    return progressive(side - chance.randrange(9), scans)


@register("image", heavy=True)
def jpeg_scans_thousands(chance: Random) -> bytes:
    return progressive(4000 - chance.randrange(9), 3006)


@register("image", 500_000)
def jpeg_comments(chance: Random, count: int) -> bytes:
    data = saved("JPEG", (32 + chance.randrange(99), 32))
    return data[:2] + segment(0xFE) * count + data[2:]


@register("image", heavy=True)
def jpeg_comments_millions(chance: Random) -> bytes:
    return jpeg_comments(chance, 12_000_000)


@register("image", "profile", "exif", "tables", "restarts", "photoshop", "mpf")
def jpeg_segments(chance: Random, which: str) -> bytes:
    """Hundreds of thousands of segments that are read: parts of a profile, metadata, tables of codes."""
    data = saved("JPEG", (32 + chance.randrange(99), 32))
    loop = b"MM\0*\0\0\0\x08" + b"\0\x02" + b"\x87\x69\0\4\0\0\0\1\0\0\0\x08" * 2 + b"\0\0\0\x08"
    mpf = b"MPF\0MM\0*\0\0\0\x08\0\x03\xb0\x00\0\7\0\0\0\x040100"
    mpf += b"\xb0\x01\0\4\0\0\0\1\x7f\xff\xff\xff\xb0\x02\0\7\0\0\x40\0\0\0\0\x40"
    one = {
        "profile": segment(0xE2, b"ICC_PROFILE\0\x01\x01" + chance.randbytes(2)) * 200_000,
        "exif": segment(0xE1, b"Exif\0\0" + loop) * 20_000,
        "tables": segment(0xDB, b"\0" + b"\x01" * 64) * 100_000 + segment(0xC4, b"\0" + bytes(16)) * 100_000,
        "restarts": segment(0xDD, b"\0\1") * 300_000,
        "photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff\xff\xff" * 30) * 20_000,
        "mpf": segment(0xE2, mpf),
    }[which]
    return data[:2] + one + data[2:]


@register("image", (65_500, 65_500), (10_900, 10_900), (65_500, 1_800))
def jpeg_sides(chance: Random, width: int, height: int) -> bytes:
    """A small image whose header says that it is large: all but its beginning is missing."""
    data = bytearray(saved("JPEG", (32, 32), "L"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height - chance.randrange(50), width)
    return bytes(data)


@register("image")
def jpeg_large_progressive(chance: Random) -> bytes:
    """A progressive JPEG without pixels of its own keeps all coefficients, 6 bytes per pixel, until its end."""
    data = bytearray(saved("JPEG", (32, 32), "RGB", progressive=True))
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", 10_900 - chance.randrange(50), 10_900)
    return bytes(data)


@register("image", *range(4))
def jpeg_mutant(chance: Random, _: int) -> bytes:
    """Frames of odd components and samplings, arithmetic coding, lossless processes."""
    data = bytearray(saved("JPEG", (40, 40)))
    at = data.index(b"\xff\xc0")
    data[at + 1] = chance.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB, 0xCF))
    data[at + 4] = chance.choice((8, 12, 16, 2))
    for component in range(3):
        data[at + 11 + 3 * component] = chance.choice((0x11, 0x44, 0x41, 0x14, 0x00, 0xFF, 0x21))
    return bytes(data)


# Damage

HONEST = {
    "PNG": lambda: saved("PNG"), "PNG-16": lambda: saved("PNG", mode="I;16"), "PNG-P": lambda: saved("PNG", mode="P"),
    "ICO": lambda: saved("ICO"), "GIF": lambda: saved("GIF", mode="P"), "JPEG": lambda: saved("JPEG"),
    "JPEG-progressive": lambda: saved("JPEG", progressive=True), "WEBP": lambda: saved("WEBP"),
    "WEBP-lossless": lambda: saved("WEBP", lossless=True), "WEBP-animated": lambda: moving("WEBP"),
    "GIF-animated": lambda: moving("GIF"), "PNG-animated": lambda: moving("PNG"),
}  # fmt: skip
if features.check("avif"):
    HONEST["AVIF-animated"] = lambda: moving("AVIF")


def moving(format: str) -> bytes:
    """A small valid animation."""
    frames = [Image.new("RGB", (32, 32), (40 * n, 255 - 40 * n, 90)) for n in range(6)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


@register("image", *HONEST)
def damaged_image(chance: Random, format: str) -> bytes:
    return damaged(HONEST[format](), chance)


@register("video", *[name for name in HONEST if name.endswith("animated")])
def damaged_animation(chance: Random, format: str) -> bytes:
    return damaged(HONEST[format](), chance)


@register("image", "empty", "byte", "magic", "text", "zeros", refused=True, also=("video", "document"))
def nothing(chance: Random, which: str) -> bytes:
    """Data that no decoder should accept as an image, a clip or a document."""
    starts = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\xff\xff\xff\xffWEBP", b"BM")
    starts += (b"\0\0\0\x20ftypavif", b"%PDF-1.7\n", b"\x1aE\xdf\xa3")
    return {
        "empty": b"", "byte": chance.randbytes(1), "magic": chance.choice(starts) + chance.randbytes(40),
        "text": b"<!doctype html><script>alert(1)</script>" + chance.randbytes(4).hex().encode(),
        "zeros": bytes(100_000 + chance.randrange(9999)),
    }[which]  # fmt: skip
