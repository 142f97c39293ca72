"""Hostile Matroska, AVI, FLV, MPEG-TS, Ogg and other clips."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random

from tests.hostile.bad_clips import encoded
from tests.hostile.bad_images import png
from tests.hostile.bad_media import damaged, register, zeros

# Matroska


def element(name: str, body: bytes, size: int | None = None) -> bytes:
    """An element by its hexadecimal name; ``size`` is one that is not true."""
    return bytes.fromhex(name) + struct.pack(">Q", 1 << 56 | (len(body) if size is None else size)) + body


def unsigned(name: str, value: int) -> bytes:
    return element(name, struct.pack(">Q", value))


UNKNOWN = (1 << 56) - 1
HEAD = element("1A45DFA3", element("4282", b"matroska"))
INFO = element("1549A966", unsigned("2AD7B1", 1_000_000))


def matroska_track(codec: bytes = b"V_MJPEG", side: int = 64, extra: bytes = b"", number: int = 1) -> bytes:
    sizes = element("E0", unsigned("B0", side) + unsigned("BA", side))
    head = unsigned("D7", number) + unsigned("73C5", number) + unsigned("83", 1) + element("86", codec)
    return element("AE", head + sizes + extra)


def matroska(*parts: bytes, tracks: bytes | None = None, size: int | None = None) -> bytes:
    tracks = element("1654AE6B", tracks if tracks is not None else matroska_track())
    return HEAD + element("18538067", INFO + tracks + b"".join(parts), size)


def cluster(*frames: bytes, time: int = 0, flags: int = 0x80) -> bytes:
    blocks = [element("A3", b"\x81" + struct.pack(">hB", n % 32_000, flags) + frame) for n, frame in enumerate(frames)]
    return element("1F43B675", unsigned("E7", time) + b"".join(blocks))


@register("video", "attachment", "void", "seek", "cues", "tags", "deep", "unknown", "clusters", "tracks", "chapters")
def matroska_elements(chance: Random, which: str) -> bytes:
    """Sizes of petabytes, positions that lead back, hundreds of thousands of entries, elements in each other."""
    some = cluster(chance.randbytes(40))
    match which:
        case "attachment":
            file = element("61A7", element("466E", b"x") + element("465C", bytes(99), 2**40), 2**41)
            return matroska(element("1941A469", file, 2**42), some)
        case "void":
            return matroska(element("EC", bytes(9), 2**50), some, size=UNKNOWN)
        case "seek":
            seek = element("4DBB", element("53AB", bytes.fromhex("114D9B74")) + unsigned("53AC", 0))
            return matroska(element("114D9B74", seek * 5000), some)
        case "cues":
            cue = element("BB", unsigned("B3", 1) + element("B7", unsigned("F7", 1) + unsigned("F1", 2**60)))
            return matroska(element("1C53BB6B", cue * 60_000), some)
        case "tags":
            tag = element("7373", element("67C8", element("45A3", b"T") + element("4487", b"x")))
            return matroska(element("1254C367", tag * 60_000), some)
        case "deep":
            nested = b"".join(
                bytes.fromhex("67C8") + struct.pack(">Q", 1 << 56 | 9_000_000 - 10 * n) for n in range(200_000)
            )
            return matroska(element("1254C367", element("7373", nested)), some)
        case "unknown":
            return matroska(
                b"".join(bytes.fromhex("1F43B675") + b"\x01" + b"\xff" * 7 for _ in range(100_000)), size=UNKNOWN
            )
        case "clusters":
            return matroska(cluster(time=2**62) * 100_000, some)
        case "tracks":
            return matroska(some, tracks=b"".join(matroska_track(number=n % 127 + 1) for n in range(20_000)))
    chapter = element("B6", unsigned("73C4", 1) + unsigned("91", 0) + element("80", element("85", b"x")))
    return matroska(element("1043A770", element("45B9", chapter * 40_000)), some)


@register("video", 0, 1, 2, 3)
def matroska_compressed(chance: Random, kind: int) -> bytes:
    """Frames that inflate to gigabytes before any decoder sees them."""
    encoding = element("6D80", element("6240", unsigned("5033", 0) + element("5034", unsigned("4254", kind))))
    data = zeros(1 << 30) if kind == 0 else b"\xff" * 100_000
    return matroska(cluster(*[data + chance.randbytes(2)] * 9), tracks=matroska_track(extra=encoding))


@register("video", 0x02, 0x04, 0x06)
def matroska_laces(chance: Random, flags: int) -> bytes:
    """Blocks of 256 frames each, whose sizes are at random."""
    return matroska(cluster(*[b"\xff" + chance.randbytes(300) for _ in range(2000)], flags=0x80 | flags))


@register("video", "PNG", "VP9", "AV1", "THEORA", "MS/VFW/FOURCC", "UNCOMPRESSED", "REAL/RV40", "QUICKTIME", "FFV1")
def matroska_large_frames(chance: Random, codec: str) -> bytes:
    """Hundreds of small packets that are large frames, or say so."""
    private = element("63A2", struct.pack("<IiiHH4sIiiII", 40, 5990, 5990, 1, 8, b"MRLE", 0, 0, 0, 0, 0) + bytes(1024))
    frame = png(5990, 5990) if codec == "PNG" else chance.randbytes(60)
    return matroska(
        cluster(*[frame] * 300), tracks=matroska_track(b"V_" + codec.encode(), 5990 - chance.randrange(9), private)
    )


# AVI


def listed(kind: bytes, name: bytes, body: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(body) + 4 if size is None else size) + name + body


def piece(kind: bytes, body: bytes, size: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


def avi(
    movies: bytes, codec: bytes = b"MRLE", side: int = 64, extra: bytes = b"", behind: bytes = b"", bits: int = 8,
    length: int = 2**31 - 1,
) -> bytes:  # fmt: skip
    head = piece(b"avih", struct.pack("<10I", 40_000, 0, 0, 0x10, length, 0, 1, 0, side, side) + bytes(16))
    stream = struct.pack("<4s4sIHHIIIIIIII8s", b"vids", codec, 0, 0, 0, 0, 1, 25, 0, length, 0, 0, 0, bytes(8))
    form = struct.pack("<IiiHH4sIiiII", 40, side, side, 1, bits, codec, 0, 0, 0, 0, 0) + bytes(1024 if bits == 8 else 0)
    streams = listed(b"LIST", b"strl", piece(b"strh", stream) + piece(b"strf", form) + extra)
    body = listed(b"LIST", b"hdrl", head + streams) + listed(b"LIST", b"movi", movies) + behind
    return listed(b"RIFF", b"AVI ", body)


@register("video", "index", "super", "lists", "streams", "empty", "length")
def avi_lies(chance: Random, which: str) -> bytes:
    """Indexes of hundreds of thousands of entries, indexes of indexes of themselves, lists in lists."""
    frame = piece(b"00dc", b"\0\1" + chance.randbytes(8))
    match which:
        case "index":
            return avi(frame, behind=piece(b"idx1", struct.pack("<4sIII", b"00dc", 16, 4, 10) * 400_000))
        case "super":
            entries = struct.pack("<QII", 0, 2**31 - 1, 1) * 20_000
            return avi(
                frame, extra=piece(b"indx", struct.pack("<HBBI4s", 4, 0, 0, 20_000, b"00dc") + bytes(12) + entries)
            )
        case "lists":
            return avi(b"".join(b"LIST" + struct.pack("<I", 2**31 - n) + b"rec " for n in range(100_000)))
        case "streams":
            return avi(b"".join(piece(b"%02ddc" % (n % 100), b"\0\1") for n in range(200_000)))
        case "empty":
            return avi(piece(b"00dc", b"") * 1_000_000)
    return avi(frame, length=0xFFFFFFFF)[:-7]


CODECS = (b"MRLE", b"MSVC", b"ZLIB", b"MSZH", b"ZMBV", b"tscc", b"FPS1", b"SCPR", b"MPNG", b"GEOX", b"CSCD", b"RPZA")
CODECS += (b"AASC", b"ULTI", b"LOCO", b"FLIC", b"DIB ", b"VP31", b"XVID", b"WMV3", b"MSS2", b"G2M4", b"TSC2", b"MVC2")
CODECS += (b"FFV1", b"HFYU", b"LAGS", b"ULRG", b"SNOW")


@register("video", *CODECS)
def avi_large_frames(chance: Random, codec: bytes) -> bytes:
    """Hundreds of frames of 36 million pixels in packets of some bytes, in codecs of all ages."""
    inflating = codec in (b"ZLIB", b"tscc", b"CSCD", b"AASC")
    body = zeros(5990 * 5990) if inflating else png(5990, 5990) if codec == b"MPNG" else chance.randbytes(40)
    return avi(
        piece(b"00dc", body) * (40 if inflating else 300),
        codec,
        5990 - chance.randrange(8),
        bits=24 if inflating else 8,
    )


# FLV, MPEG-TS, Ogg and others


@register("video", "deep", "array", "keyframes", "sizes", "times")
def flv_tags(chance: Random, which: str) -> bytes:
    """Metadata in metadata, arrays of billions, tags of all sizes."""

    def tag(kind: int, body: bytes, time: int = 0, size: int | None = None) -> bytes:
        length = (len(body) if size is None else size).to_bytes(3, "big")
        return (
            bytes([kind]) + length + struct.pack(">I", time)[1:] + bytes(4) + body + struct.pack(">I", len(body) + 11)
        )

    name = b"\x02\0\x0aonMetaData"
    match which:
        case "deep":
            body = tag(18, name + b"\x03\0\1a" * 400_000)
        case "array":
            body = tag(18, name + b"\x08\xff\xff\xff\xff" + b"\0\1a\x0a\xff\xff\xff\xff" * 50_000)
        case "keyframes":
            numbers_of = b"\x0a\x0f\xff\xff\xff" + (b"\0" + struct.pack(">d", 1e300)) * 100_000
            body = tag(
                18, name + b"\x03\0\x09keyframes\x03\0\5times" + numbers_of + b"\0\x0dfilepositions" + numbers_of
            )
        case "sizes":
            body = b"".join(tag(9, chance.randbytes(20), n, chance.randrange(2**24)) for n in range(20_000))
        case _:
            body = tag(9, b"\x12" + chance.randbytes(20), 2**24 - 1) * 200_000
    return b"FLV\1\1\0\0\0\x09\0\0\0\0" + body + chance.randbytes(3)


def transport(pid: int, payload: bytes, start: bool = True) -> bytes:
    head = struct.pack(">BHB", 0x47, (0x4000 if start else 0) | pid, 0x10)
    return head + payload[:184].ljust(184, b"\xff")


def section(table: int, number: int, body: bytes) -> bytes:
    data = struct.pack(">BHHBBB", table, 0xB000 | len(body) + 9, number, 0xC1, 0, 0) + body
    return b"\0" + data + struct.pack(">I", _crc(data))


def _crc(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


@register("video", "programs", "streams", "sync", "packets", "endless")
def ts_tables(chance: Random, which: str) -> bytes:
    """Thousands of programs and streams, packets out of step, an endless packet."""
    pids = range(0x20, 0x1FF0)
    match which:
        case "programs":
            pats = [
                section(0, n, b"".join(struct.pack(">HH", pid, 0xE000 | pid) for pid in pids[n * 40 : n * 40 + 40]))
                for n in range(200)
            ]
            return b"".join(transport(0, pat) for pat in pats) * 10
        case "streams":
            out = transport(0, section(0, 1, struct.pack(">HH", 1, 0xE020)))
            for n in range(0, 8000, 30):
                streams = b"".join(struct.pack(">BHH", 0x1B, 0xE000 | pid, 0xF000) for pid in pids[n : n + 30])
                out += transport(0x20, section(2, 1, struct.pack(">HH", 0xE021, 0xF000) + streams))
            return out + b"".join(transport(pid, b"\0\0\1\xe0\0\0\x80\0\0" + chance.randbytes(50)) for pid in pids) * 5
        case "sync":
            data = encoded("mpeg2video", "mpegts")
            return (
                b"".join(chance.randbytes(chance.randrange(3)) + data[at : at + 188] for at in range(0, len(data), 188))
                * 20
            )
        case "packets":
            return b"".join(transport(chance.randrange(8192), chance.randbytes(184)) for _ in range(30_000))
    out = transport(0, section(0, 1, struct.pack(">HH", 1, 0xE020)))
    out += transport(0x20, section(2, 1, struct.pack(">HHBHH", 0xE100, 0xF000, 0x1B, 0xE100, 0xF000)))
    return (
        out
        + transport(0x100, b"\0\0\1\xe0\0\0\x80\0\0")
        + transport(0x100, chance.randbytes(184), start=False) * 60_000
    )


@register("video", "pages", "streams", "comments", "granules")
def ogg_pages(chance: Random, which: str) -> bytes:
    """Pages by the thousand: of one stream, of one stream each, of endless comments."""

    def page(body: bytes, serial: int = 1, number: int = 0, flags: int = 0, granule: int = 0) -> bytes:
        laces = b"\xff" * (len(body) // 255) + bytes([len(body) % 255])
        data = b"OggS\0" + bytes([flags]) + struct.pack("<qIIIB", granule, serial, number, 0, len(laces)) + laces + body
        return data[:22] + struct.pack("<I", _ogg_crc(data)) + data[26:]

    theora = b"\x80theora\3\2\1" + struct.pack(">HH", 4095, 4095) + bytes(6) + bytes(30)
    match which:
        case "pages":
            return page(theora, flags=2) + page(chance.randbytes(9)) * 60_000
        case "streams":
            return b"".join(page(theora, serial, flags=2) for serial in range(2000)) + chance.randbytes(3)
        case "comments":
            comments = b"\x81theora" + struct.pack("<II", 0, 2**31) + (b"\x03\0\0\0a=b" * 9000)[:60_000]
            return page(theora, flags=2) + page(comments) + chance.randbytes(3)
    return page(theora, flags=2) + b"".join(
        page(b"x", number=n, granule=chance.randrange(-(2**63), 2**63)) for n in range(2000)
    )


def _ogg_crc(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _OGG[value >> 24 ^ byte] ^ value << 8 & 0xFFFFFFFF
    return value


def _ogg_table() -> Iterator[int]:
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        yield value


_OGG = tuple(_ogg_table())


@register("video", b"VP80", b"VP90", b"AV01", b"H264")
def ivf_frames(chance: Random, codec: bytes) -> bytes:
    """Frames of 65,535 pixels per side, and frames that declare gigabytes."""
    head = b"DKIF" + struct.pack("<HH4sHHIIII", 0, 32, codec, 65_535, 65_535, 25, 1, 2**32 - 1, 0)
    key = b"\x10\x02\0\x9d\x01\x2a\xff\x3f\xff\x3f" + chance.randbytes(30)
    frames = b"".join(struct.pack("<IQ", len(key), n) + key for n in range(300))
    return head + frames + struct.pack("<IQ", 2**31 - 1, 1)


@register("video", "y4m", "dv", "mpeg", "nut", "asf", "mxf", "rm", "obu", "wtv", "mjpeg", "yuv")
def short_head(chance: Random, which: str) -> bytes:
    """The beginnings of further formats, with bytes at random behind them."""
    head = {
        "y4m": b"YUV4MPEG2 W65535 H65535 F1:1 Ip A0:0\nFRAME\n",
        "dv": b"\x1f\x07\0\xbf" * 40,
        "mpeg": b"\0\0\1\xba\x44\0\4\0\4\1\0\0\3\xf8" + b"\0\0\1\xe0\xff\xff",
        "nut": b"nut/multimedia container\0NM\x7a\x56\x1f\x5f\x04\xad",
        "asf": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + b"\xff" * 14,
        "mxf": bytes.fromhex("060e2b34020501010d01020101020400") + b"\x88" + b"\x7f" * 8,
        "rm": b".RMF\0\0\0\x12\0\0\0\0\0\0\xff\xff\xff\xff",
        "obu": b"\x12\0\x0a\x0b\0\0\0\x6a\xef\xff\xff",
        "wtv": bytes.fromhex("b7d800203749da11a64e0007e95ead8d") + b"\xff" * 60,
        "mjpeg": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3",
        "yuv": b"\x80" * 1000,
    }[which]
    return head + chance.randbytes(20_000)


HONEST = {
    "matroska": ("libx264", "matroska"), "webm": ("libvpx", "webm"), "avi": ("mpeg4", "avi"), "flv": ("flv1", "flv"),
    "ts": ("mpeg2video", "mpegts"), "mpeg": ("mpeg1video", "mpeg"), "nut": ("ffv1", "nut"), "asf": ("wmv2", "asf"),
    "mxf": ("mpeg2video", "mxf"), "ivf": ("libvpx", "ivf"), "gif": ("gif", "gif", "rgb8"),
    "apng": ("apng", "apng", "rgb24"), "avi-huffyuv": ("huffyuv", "avi", "yuv422p"), "vp9": ("libvpx-vp9", "matroska"),
}  # fmt: skip


@register("video", *HONEST)
def damaged_container(chance: Random, name: str) -> bytes:
    codec, format, *pixels = HONEST[name]
    return damaged(encoded(codec, format, 64, 20, *pixels), chance)
