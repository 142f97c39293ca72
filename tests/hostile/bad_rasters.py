"""Hostile TIFF, BMP, TGA, PPM, JPEG 2000 and AVIF files, and formats that are not read at all."""

from __future__ import annotations

import struct
from random import Random

from PIL import features

from tests.hostile.bad_images import LARGEST, saved, segment
from tests.hostile.bad_media import damaged, register, zeros

# TIFF

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, COUNTS = (
    256,
    257,
    258,
    259,
    262,
    273,
    277,
    278,
    279,
)
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_COUNTS, SUB, EXIF, SAMPLE_FORMAT, PREDICTOR = (
    322,
    323,
    324,
    325,
    330,
    34665,
    339,
    317,
)
NONE, LZW, JPEG, DEFLATE, PACKBITS, GROUP_4, ZSTD, WEBP_COMPRESSION = 1, 5, 7, 8, 32773, 4, 50000, 50001


def longs(*values: int) -> tuple[int, bytes]:
    return 4, struct.pack(f"<{len(values)}I", *values)


def shorts(*values: int) -> tuple[int, bytes]:
    return 3, struct.pack(f"<{len(values)}H", *values)


def directory(
    tags: dict[int, tuple[int, bytes]], at: int, following: int = 0, claims: dict[int, int] | None = None
) -> bytes:
    """A directory that lies at ``at``, with its values behind it; ``claims`` are counts that are not true."""
    entries, values = [], b""
    behind = at + 2 + 12 * len(tags) + 4
    for tag, (kind, data) in sorted(tags.items()):
        count = (claims or {}).get(tag, len(data) // _SIZES[kind])
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", behind + len(values))
        values += data if len(data) > 4 else b""
        entries.append(struct.pack("<HHI", tag, kind, count) + place)
    return struct.pack("<H", len(tags)) + b"".join(entries) + struct.pack("<I", following) + values


def tiff(tags: dict[int, tuple[int, bytes]], data: bytes = b"", claims: dict[int, int] | None = None) -> bytes:
    """A TIFF with its pixels at 8 and its directory behind them."""
    at = 8 + len(data) + len(data) % 2
    return b"II*\0" + struct.pack("<I", at) + data.ljust(at - 8, b"\0") + directory(tags, at, claims=claims)


def strip_tags(
    width: int, height: int, data: bytes, *, bits: int = 8, samples: int = 1, compression: int = DEFLATE, form: int = 1
) -> dict[int, tuple[int, bytes]]:
    """Tags of an image that is one strip."""
    return {
        WIDTH: longs(width), HEIGHT: longs(height), BITS: shorts(*[bits] * samples), COMPRESSION: shorts(compression),
        PHOTOMETRIC: shorts(2 if samples >= 3 else 1), STRIPS: longs(8), SAMPLES: shorts(samples), ROWS: longs(height),
        COUNTS: longs(len(data)), SAMPLE_FORMAT: shorts(*[form] * samples),
    }  # fmt: skip


@register(
    "image",
    (1, 1, 1),
    (8, 1, 1),
    (16, 1, 1),
    (32, 1, 1),
    (32, 1, 2),
    (32, 1, 3),
    (64, 1, 3),
    (8, 3, 1),
    (16, 3, 1),
    (8, 4, 1),
    (16, 4, 1),
)
def tiff_bomb(chance: Random, bits: int, samples: int, form: int) -> bytes:
    """The maximum number of pixels of each depth: integers without and with a sign, and floating ones."""
    height = LARGEST - chance.randrange(50)
    data = zeros(height * ((LARGEST * bits * samples + 7) // 8))
    return tiff(strip_tags(LARGEST, height, data, bits=bits, samples=samples, form=form), data)


@register("image", "lzw", "packbits", "group4", "jpeg", "zstd", "webp")
def tiff_compressed(chance: Random, which: str) -> bytes:
    """Other ways to make little of much, and codes that end early."""
    height = LARGEST - chance.randrange(50)
    data, bits, code = {
        "lzw": (b"\x80\x00" + b"\xff" * 99_999, 8, LZW),
        "packbits": (b"\x81\0" * (LARGEST * LARGEST // 128 + 9), 8, PACKBITS),
        "group4": (b"\xff" * (height // 8 + 1), 1, GROUP_4),  # a bit for each row that is as the one before
        "jpeg": (saved("JPEG", mode="L"), 8, JPEG),
        "zstd": (chance.randbytes(999), 8, ZSTD),
        "webp": (chance.randbytes(999), 8, WEBP_COMPRESSION),
    }[which]
    return tiff(strip_tags(LARGEST, height, data, bits=bits, compression=code), data)


@register("image", 16, 256, 65_520)
def tiff_tiles(chance: Random, side: int) -> bytes:
    """Half a million tiles at the same place, or one that is far larger than the image."""
    data = zeros(min(side, 4096) ** 2)
    width, height = (LARGEST, LARGEST - chance.randrange(50)) if side < 300 else (64, 64)
    count = -(-width // side) * -(-height // side)
    tags = strip_tags(width, height, data)
    for tag in (STRIPS, ROWS, COUNTS):
        del tags[tag]
    tags |= {
        TILE_WIDTH: longs(side),
        TILE_HEIGHT: longs(side),
        TILES: longs(*[8] * count),
        TILE_COUNTS: longs(*[len(data)] * count),
    }
    return tiff(tags, data)


@register("image", "same", "large", "beyond", "rows", "none")
def tiff_strips(chance: Random, which: str) -> bytes:
    """Strips that lie in the same place, beyond the end, or declare gigabytes."""
    data = zeros(LARGEST * 8)
    height = LARGEST - chance.randrange(50)
    tags = strip_tags(LARGEST, height, data)
    count = -(-height // 8)
    tags |= {
        "same": {ROWS: longs(8), STRIPS: longs(*[8] * count), COUNTS: longs(*[len(data)] * count)},
        "large": {ROWS: longs(8), STRIPS: longs(*[8] * count), COUNTS: longs(*[2**31] * count)},
        "beyond": {STRIPS: longs(2**32 - 9)},
        "rows": {ROWS: longs(0)},
        "none": {STRIPS: longs(0), COUNTS: longs(0)},
    }[which]
    return tiff(tags, data)


@register("image", "itself", "chain", "sub", "exif")
def tiff_directories(chance: Random, which: str) -> bytes:
    """Directories that follow themselves, hundreds of thousands of them, and endlessly nested ones."""
    data = bytes(64)
    tags = strip_tags(8, 8, data, compression=NONE)
    at = 8 + len(data)
    head = b"II*\0" + struct.pack("<I", at) + data
    if which == "itself":
        return head + directory(tags, at, following=at) + chance.randbytes(4)
    if which == "chain":
        size = len(directory(tags, 0))
        return head + b"".join(directory(tags, at + n * size, at + (n + 1) * size) for n in range(30_000))
    tag = SUB if which == "sub" else EXIF
    return head + directory({**tags, tag: longs(*[at] * (1000 if which == "sub" else 1))}, at) + chance.randbytes(4)


@register("image", "counts", "samples", "bits", "zero", "text")
def tiff_lies(chance: Random, which: str) -> bytes:
    """Tags of billions of values, 65,535 samples per pixel, depths that do not exist."""
    data = chance.randbytes(64)
    tags = strip_tags(8, 8, data, compression=NONE)
    tags |= {
        "counts": {}, "samples": {SAMPLES: shorts(65_535), BITS: shorts(*[8] * 65_535)}, "bits": {BITS: shorts(63)},
        "zero": {WIDTH: longs(0), HEIGHT: longs(0)}, "text": {270: (2, b"x" * 3_000_000)},
    }[which]  # fmt: skip
    return tiff(tags, data, claims=dict.fromkeys((STRIPS, COUNTS, BITS), 2**32 - 1) if which == "counts" else None)


@register("image", "offset", "directory")
def tiff_big(chance: Random, which: str) -> bytes:
    """BigTIFF: counts and places of 64 bits."""
    if which == "offset":
        return b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 - 9) + chance.randbytes(64)
    entry = struct.pack("<HHQQ", WIDTH, 4, 2**62, 16)
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**60) + entry * 50 + chance.randbytes(8)


# BMP, TGA


def bmp(
    width: int, height: int, bits: int, data: bytes, compression: int = 0, colors: int = 0, start: int = 0
) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colors, 0)
    palette = b"\0\0\0\0" * (1 << bits if bits <= 8 else 0)
    start = start or 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", 14 + len(header + palette + data), 0, 0, start) + header + palette + data


@register("image", "rle8", "rle4", "moves", "lines", "palette", "lowest", "header", "bits", "start")
def bmp_lies(chance: Random, which: str) -> bytes:
    """Runs that fill a hundred million pixels, moves beyond the image, and headers that lie."""
    height = LARGEST - chance.randrange(50)
    runs = (b"\xff\0" * (LARGEST // 255 + 1) + b"\0\0") * height
    return {
        "rle8": lambda: bmp(LARGEST, height, 8, runs, 1),
        "rle4": lambda: bmp(LARGEST, height, 4, runs, 2),
        "moves": lambda: bmp(LARGEST, height, 8, b"\0\x02\xff\xff" * 100_000, 1),
        "lines": lambda: bmp(LARGEST, height, 8, b"\0\0" * 3_000_000, 1),
        "palette": lambda: bmp(16, 16, 8, b"", colors=2**31 - 1),
        "lowest": lambda: bmp(16, -(2**31), 24, chance.randbytes(99)),
        "header": lambda: (
            b"BM" + bytes(12) + struct.pack("<I", chance.choice((0, 1, 12, 13, 2**31, 2**32 - 1))) + bytes(99)
        ),
        "bits": lambda: bmp(16, 16, chance.choice((0, 3, 7, 64, 65_535)), chance.randbytes(99)),
        "start": lambda: bmp(16, 16, 24, chance.randbytes(99), start=2**32 - 9),
    }[which]()


@register("image", 24, 32, 16, 8)
def tga_runs(chance: Random, bits: int) -> bytes:
    kind = 10 if bits > 8 else 11
    height = LARGEST - chance.randrange(50)
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, kind, 0, 0, 0, 0, 0, LARGEST, height, bits, 0)
    pixel, (whole, rest) = bytes(bits // 8), divmod(LARGEST, 128)
    return head + ((b"\xff" + pixel) * whole + bytes([127 + rest]) + pixel) * height


@register("image", "map", "sides", "text")
def tga_lies(chance: Random, which: str) -> bytes:
    kind, colors, name = {"map": (9, 65_535, 0), "sides": (2, 0, 0), "text": (3, 0, 255)}[which]
    side = 65_535 if which == "sides" else LARGEST
    return struct.pack(
        "<BBBHHBHHHHBB", name, int(kind == 9), kind, 0, colors, 32, 0, 0, side, side, 8, 0
    ) + chance.randbytes(99)


# PPM


@register("image", "P1", "P2", "P3", "P4", "P5", "P6", "Pf", "P7")
def ppm_sides(chance: Random, kind: str) -> bytes:
    """The maximum number of pixels, in a header of twenty bytes."""
    last = {"P1": b"", "P4": b"", "Pf": b"-1.0\n"}.get(kind, b"65535\n")
    return kind.encode() + b" %d %d\n" % (LARGEST, LARGEST - chance.randrange(50)) + last + b"1 " * 1000


@register("image", "values", "comments", "digits", "spaces", "negative", "letters")
def ppm_text(chance: Random, which: str) -> bytes:
    """Numbers in text: millions of them, one of megabytes, endless comments."""
    return {
        "values": lambda: b"P3 1500 1500 255\n" + b"1 " * 6_750_000,
        "comments": lambda: b"P3 9 9 255\n" + b"#x\n" * 2_000_000,
        "digits": lambda: b"P3 9 9 255\n" + b"1" * 5_000_000,
        "spaces": lambda: b"P3" + b" " * 5_000_000 + b"9 9 255\n" + b"1 " * 300,
        "negative": lambda: b"P3 9 -9 255\n" + b"-1 " * 300,
        "letters": lambda: b"P3 1e9 0x9 inf\n" + b"nan " * 300,
    }[which]() + chance.randbytes(3)


@register("image", heavy=True)
def ppm_values_millions(chance: Random) -> bytes:
    return b"P3 5000 3000 255\n" + b"1 " * 20_000_000 + chance.randbytes(3)


# JPEG 2000


def jpeg_2000(sizes: tuple[int, ...] = (), components: int = 0) -> bytes:
    """A codestream whose sizes are others than its contents: sides, origin, and both of tiles."""
    data = saved("JPEG2000", mode="L", no_jp2=True)
    at = data.index(b"\xff\x51") + 6
    old = struct.unpack_from(">8IH", data, at)
    new = struct.pack(">8I", *(sizes + old[len(sizes) : 8]))
    extra = b"\x07\x01\x01" * (components - 1) if components else b""
    head = data[: at - 4] + struct.pack(">H", 38 + 3 * (components or 1)) + data[at - 2 : at]
    return head + new + struct.pack(">H", components or 1) + data[at + 34 : at + 37] + extra + data[at + 37 :]


@register("image", "sides", "tiles", "components", "large", "origin", "levels")
def jpeg_2000_lies(chance: Random, which: str) -> bytes:
    """Sizes of a hundred million pixels, millions of tiles of one pixel, thousands of components."""
    height = LARGEST - chance.randrange(50)
    match which:
        case "sides":
            return jpeg_2000((LARGEST, height, 0, 0, LARGEST, height))
        case "tiles":
            return jpeg_2000((LARGEST, height, 0, 0, 1, 1))
        case "components":
            return jpeg_2000(components=16_384)
        case "large":
            return jpeg_2000((2**32 - 1, 2**32 - 1, 0, 0, 2**32 - 1, 2**32 - 1))
        case "origin":
            return jpeg_2000((LARGEST, height, LARGEST - 1, 0, 1, 1))
    data = bytearray(jpeg_2000())
    at = data.index(b"\xff\x52")
    data[at + 5 : at + 10] = struct.pack(">BHBB", chance.randrange(5), 65_535, 0, 33)
    return bytes(data)


@register("image", "boxes", "nested", "palette", "comments")
def jp2_boxes(chance: Random, which: str) -> bytes:
    """Boxes of no size and of all sizes around a codestream."""
    signature = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    header = struct.pack(">IIHBBBB", LARGEST, LARGEST, 3, 7, 7, 0, 0)
    ihdr = struct.pack(">I", 22) + b"ihdr" + header
    body = {
        "boxes": b"\0\0\0\0jp2h" * 3,
        "nested": b"".join(struct.pack(">I", 80_000 - 8 * n) + b"jp2h" for n in range(10_000)),
        "palette": struct.pack(">I", 8 + len(ihdr) + 14) + b"jp2h" + ihdr + b"\0\0\0\x0epclr\xff\xff\xffxyz",
        "comments": b"",
    }[which]
    stream = jpeg_2000()
    if which == "comments":
        stream = stream[:2] + stream[2:].replace(b"\xff\x52", segment(0x64, b"\0\1x") * 300_000 + b"\xff\x52", 1)
    return signature + body + b"\0\0\0\0jp2c" + stream + chance.randbytes(3)


# AVIF


@register("image", "sides", "grid", "items", "boxes", "extents")
def avif_lies(chance: Random, which: str) -> bytes:
    """Another size than that of the stream inside, grids of many items, boxes that lie."""
    data = saved("AVIF", (64, 64))
    at = data.index(b"ispe") + 8
    match which:
        case "sides":
            return data[:at] + struct.pack(">II", LARGEST, LARGEST - chance.randrange(50)) + data[at + 8 :]
        case "grid":
            data = data.replace(b"av01Color", b"grid\xff\xffolo", 1)
            return data.replace(b"infe\x02\0\0\0\0\1\0\0av01", b"infe\x02\0\0\0\0\1\0\0grid")
        case "items":
            at = data.index(b"iinf") + 8
            return data[:at] + b"\xff\xff" + data[at + 2 :]
        case "extents":
            at = data.index(b"iloc") + 4
            return data[:at] + chance.randbytes(20) + data[at + 20 :]
    at = data.index(b"meta") - 4
    return data[:at] + chance.choice((b"\0\0\0\0", b"\0\0\0\1", b"\xff\xff\xff\xff", b"\0\0\0\7")) + data[at + 4 :]


@register("image")
def avif_large(chance: Random) -> bytes:
    """Sixty million pixels in some kilobytes, which have to be computed."""
    return saved("AVIF", (7700, 7700 - chance.randrange(50)), speed=10, quality=1)


# Formats that are not read

FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\nshowpage\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9e9' height='9e9'><script>1</script></svg>",
    "entities": b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>"
    + b"".join(b"<!ENTITY %c '%s'>" % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><svg>&j;</svg>",
    "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(14),
    "fits": b"SIMPLE  =                    T".ljust(80) + b"NAXIS   =              99999999".ljust(2800),
    "pcx": b"\x0a\5\1\x08\0\0\0\0\xff\xff\xff\xff" + bytes(116) + b"\xff\0" * 9,
    "dds": b"DDS \x7c\0\0\0" + b"\xff" * 120,
    "icns": b"icns\xff\xff\xff\xffic10\xff\xff\xff\xff",
    "sgi": b"\x01\xda\1\1\0\3" + b"\xff" * 200,
    "xbm": b"#define x_width 99999\n#define x_height 99999\nstatic char x_bits[] = {",
    "fli": b"\xff\xff\xff\xff\x12\xaf" + b"\xff" * 200,
    "wmf": b"\xd7\xcd\xc6\x9a" + b"\xff" * 80,
    "qoi": b"qoif" + b"\xff" * 40,
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3" + zeros(1 << 24)[2:],
    "zip": b"PK\3\4" + b"\xff" * 60,
    "bufr": b"BUFR" + bytes(40),
    "hdf": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "exr": b"v/1\1\2\0\0\0" + b"\xff" * 99,
}


@register("image", *FOREIGN, refused=True, also=("video", "document"))
def foreign(chance: Random, which: str) -> bytes:
    """Files that other programs open, some of them by running what they say."""
    return FOREIGN[which] + chance.randbytes(4)


# Damage

HONEST = {
    "TIFF": lambda: saved("TIFF"), "TIFF-deflate": lambda: saved("TIFF", compression="tiff_adobe_deflate"),
    "TIFF-lzw": lambda: saved("TIFF", compression="tiff_lzw"), "TIFF-jpeg": lambda: saved("TIFF", compression="jpeg"),
    "TIFF-group4": lambda: saved("TIFF", mode="1", compression="group4"), "TIFF-float": lambda: saved("TIFF", mode="F"),
    "TIFF-16": lambda: saved("TIFF", mode="I;16"), "BMP": lambda: saved("BMP"), "BMP-P": lambda: saved("BMP", mode="P"),
    "TGA": lambda: saved("TGA", compression="tga_rle"), "PPM": lambda: saved("PPM"),
    "JPEG2000": lambda: saved("JPEG2000"), "JPEG2000-stream": lambda: saved("JPEG2000", no_jp2=True),
}  # fmt: skip
if features.check("avif"):
    HONEST["AVIF"] = lambda: saved("AVIF")


@register("image", *HONEST)
def damaged_raster(chance: Random, format: str) -> bytes:
    return damaged(HONEST[format](), chance)
