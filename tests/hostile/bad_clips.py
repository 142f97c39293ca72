"""Hostile MP4, QuickTime and raw H.264 files."""

from __future__ import annotations

import functools
import io
import struct
from random import Random

import av
import numpy as np

from tests.hostile.bad_images import png, saved, tiny_webp
from tests.hostile.bad_media import damaged, register

_MATRIX = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
_SAMPLES_AT = 48
"""Where samples lie, whatever is there."""


@functools.cache
def encoded(codec: str, format: str, side: int = 64, count: int = 20, pixels: str = "yuv420p", **options: str) -> bytes:
    """A valid clip whose frames change from dark to light."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = side
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = 5
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), number * 12 % 256, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


# Boxes of MP4


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *(value & 0xFFFFFFFF for value in values))


LOCAL = box(b"dinf", full(b"dref", numbers(1), full(b"url ", flags=1)))
"""Samples lie in the file itself."""


def entry(codec: bytes = b"mjpg", side: int = 64, extra: bytes = b"") -> bytes:
    """How samples are coded."""
    sizes = struct.pack(">HHIIIH", side, side, 72 << 16, 72 << 16, 0, 1)
    return box(codec, bytes(6), b"\0\1", bytes(16), sizes, bytes(32), b"\0\x18\xff\xff", extra)


def track(
    tables: dict[bytes, bytes], *, entries: bytes | None = None, side: int = 64, scale: int = 25, duration: int = 1,
    references: bytes = LOCAL, edits: bytes = b"", number: int = 1, handler: bytes = b"vide",
) -> bytes:  # fmt: skip
    """A track of ``tables`` by their names."""
    description = entries if entries is not None else numbers(1) + entry(side=side)
    samples = box(b"stbl", full(b"stsd", description), *[full(kind, body) for kind, body in tables.items()])
    head = full(
        b"tkhd", numbers(0, 0, number, 0, duration), bytes(16), _MATRIX, numbers(side << 16, side << 16), flags=7
    )
    media = full(b"mdhd", numbers(0, 0, scale, duration), b"\x55\xc4\0\0")
    media += full(b"hdlr", bytes(4) + handler + bytes(13))
    media += box(b"minf", full(b"vmhd", bytes(8), flags=1), references, samples)
    return box(b"trak", head, edits, box(b"mdia", media))


def movie(*parts: bytes, scale: int = 25, duration: int = 1, data: bytes = b"", behind: bytes = b"") -> bytes:
    """An MP4 whose ``moov`` holds ``parts``."""
    start = box(b"ftyp", b"isom", numbers(512), b"isom")
    head = full(b"mvhd", numbers(0, 0, scale, duration, 1 << 16), b"\1\0", bytes(10), _MATRIX, bytes(24), numbers(2))
    return start + box(b"moov", head, *parts) + box(b"mdat", data) + behind


def tables(count: int, size: int = 1, per_chunk: int | None = None, delta: int = 1) -> dict[bytes, bytes]:
    """A few bytes that announce ``count`` samples."""
    return {
        b"stts": numbers(1, count, delta), b"stsc": numbers(1, 1, per_chunk or count, 1),
        b"stsz": numbers(size, count), b"stco": numbers(1, _SAMPLES_AT),
    }  # fmt: skip


@register("video", 2_000_000, 30_000_000, 89_000_000, 0xFFFFFFFF)
def mp4_announced(chance: Random, count: int) -> bytes:
    """Some 580 bytes that declare millions of samples."""
    return movie(track(tables(count - chance.randrange(999))))


@register("video", (1_000_000, 1), (3_999_999, 1))
def mp4_samples(chance: Random, count: int, size: int) -> bytes:
    """As many samples as announced, all of which are damaged."""
    return movie(track(tables(count)), data=bytes(count * size + 99 + chance.randrange(99)))


@register("video", "one", "chunks", "sizes", "offsets", "offsets64", "descriptions", "keys", "composition", "times")
def mp4_tables(chance: Random, which: str) -> bytes:
    """Tables that contradict each other, and tables of hundreds of thousands of entries."""
    many = 400_000
    made = tables(10, 4)
    match which:
        case "one":
            made[b"stts"] = numbers(0xFFFFFFFF, 1, 1)
        case "chunks":
            made[b"stsc"] = numbers(many) + b"".join(numbers(n + 1, 1, 1) for n in range(many))
        case "sizes":
            made |= {b"stsz": numbers(0, many) + numbers(4) * many, b"stts": numbers(1, many, 1)}
        case "offsets":
            made |= {b"stco": numbers(many) + numbers(48) * many, b"stsz": numbers(1, 2**31)}
            made[b"stsc"] = numbers(1, 1, 5000, 1)
        case "offsets64":
            made[b"co64"] = numbers(many) + numbers(0x7FFFFFFF, 0xFFFFFFFF) * many
        case "descriptions":
            made[b"stsc"] = numbers(1, 1, 10, 0x7FFFFFFF)
        case "keys":
            made[b"stss"] = numbers(many) + numbers(*range(many, 0, -1))
        case "composition":
            made[b"ctts"] = numbers(many) + numbers(1, 0x80000000) * many
        case "times":
            made[b"stts"] = numbers(many) + numbers(0, 0xFFFFFFFF) * many
    return movie(track(made), data=chance.randbytes(400))


@register("video", (1, 0x7FFFFFFF), (0xFFFFFFFF, 1), (0, 1), (1, 0), (1, -1), (1, 1 << 30))
def mp4_clock(chance: Random, scale: int, delta: int) -> bytes:
    """Frames that take decades, no time at all, or less than none."""
    made = tables(20, 20, delta=delta)
    return movie(
        track(made, scale=scale, duration=0xFFFFFFFF), scale=scale, duration=0xFFFFFFFF, data=chance.randbytes(400)
    )


@register("video", "many", "back", "empty", "rate", "count")
def mp4_edits(chance: Random, which: str) -> bytes:
    """Edit lists of hundreds of thousands of parts, each of which shows the whole clip again."""
    many = 200_000
    one = {"many": (10, 0), "back": (1, -5), "empty": (0xFFFFFFFF, -1), "rate": (10, 0), "count": (10, 0)}[which]
    rate = 0x80000000 if which == "rate" else 1 << 16
    body = numbers(0xFFFFFFFF if which == "count" else many) + numbers(*one, rate) * many
    made = tables(3000, 1)
    return movie(track(made, edits=box(b"edts", full(b"elst", body))), data=chance.randbytes(3200))


@register("video", (1_000_000, 50), (0xFFFFFFFF, 1), (0, 100_000))
def mp4_fragments(chance: Random, samples: int, count: int) -> bytes:
    """Fragments of a hundred bytes that declare millions of samples each."""
    empty = {kind: numbers(0) for kind in (b"stts", b"stsc", b"stco")} | {b"stsz": numbers(0, 0)}
    extends = box(b"mvex", full(b"trex", numbers(1, 1, 1, 1, 0)))
    run = full(b"trun", numbers(samples - chance.randrange(2) * bool(samples)))
    fragment = box(b"moof", full(b"mfhd", numbers(1)), box(b"traf", full(b"tfhd", numbers(1), flags=0x20000), run))
    return movie(track(empty), extends, behind=(fragment + box(b"mdat", bytes(8))) * count)


@register("video", "loop", "many", "lies")
def mp4_indexes(chance: Random, which: str) -> bytes:
    """Indexes of fragments that lead back to themselves, or hold 65,535 references a box."""
    reference = numbers(0x80000000 if which == "loop" else 0x7FFFFFFF, 1, 0x90000000)
    index = full(b"sidx", numbers(1, 25, 0, 0), struct.pack(">HH", 0, 65_535), reference * 65_535)
    made = tables(20, 20)
    random_access = box(
        b"mfra", full(b"tfra", numbers(1, 0, 0xFFFFFFFF)), full(b"mfro", numbers(chance.randrange(2**32)))
    )
    return movie(track(made), data=bytes(400), behind=index * (1 if which == "lies" else 8) + random_access)


@register("video", 1000, 20_000)
def mp4_tracks(chance: Random, count: int) -> bytes:
    one = track(tables(1, 10), number=chance.randrange(1, 99))
    return movie(one * count, data=bytes(99))


@register("video", "deep", "zero", "small", "large", "wide", "free")
def mp4_boxes(chance: Random, which: str) -> bytes:
    """Boxes in boxes a hundred thousand deep, and sizes that lead nowhere."""
    head = box(b"ftyp", b"isom", numbers(512), b"isom")
    match which:
        case "deep":
            return head + b"".join(numbers(1_600_000 - 8 * n) + b"moov" for n in range(200_000)) + chance.randbytes(4)
        case "zero":
            return head + (numbers(0) + b"moov") * 1000 + chance.randbytes(4)
        case "small":
            return head + (numbers(chance.randrange(2, 8)) + b"moov") * 100_000
        case "large":
            return head + numbers(1) + b"moov" + struct.pack(">Q", 2**63 + chance.randrange(99)) + bytes(99)
        case "wide":
            return head + b"".join(box(b"wide") for _ in range(500_000)) + movie(track(tables(3, 10)), data=bytes(99))
    return head + box(b"free") * 1_000_000 + chance.randbytes(4)


@register("video", "cover", "text", "keys", "chapters", "entries", "parameters")
def mp4_metadata(chance: Random, which: str) -> bytes:
    """Covers that are bombs, millions of texts, and hundreds of thousands of descriptions of samples."""

    def text(kind: bytes, body: bytes, form: int = 1) -> bytes:
        return box(kind, box(b"data", numbers(form, 0), body))

    def listed(items: bytes) -> bytes:
        handler = full(b"hdlr", bytes(4) + b"mdirappl" + bytes(9))
        return box(b"udta", full(b"meta", handler, box(b"ilst", items)))

    made, data = tables(3, 10), chance.randbytes(99)
    match which:
        case "cover":
            covers = text(b"covr", png(10_900, 10_900), 14) + text(b"covr", tiny_webp(16_000, 16_000), 13)
            return movie(track(made), listed(covers * 20), data=data)
        case "text":
            return movie(track(made), listed(text(b"\xa9nam", b"x" * 30) * 100_000), data=data)
        case "keys":
            keys = full(b"keys", numbers(0xFFFFFFF), (numbers(12) + b"mdtaabcd") * 100_000)
            return movie(track(made), box(b"meta", full(b"hdlr", bytes(4) + b"mdta" + bytes(13)), keys), data=data)
        case "chapters":
            chapters = full(b"chpl", numbers(0), b"\xff" + (bytes(8) + b"\x01c") * 255) * 900
            return movie(track(made), box(b"udta", chapters), data=data)
        case "entries":
            return movie(track(made, entries=numbers(100_000) + entry() * 100_000), data=data)
    extra = box(b"avcC", b"\1\x64\0\x1f\xff\xff" + (b"\xff\xff" + bytes(65_535)) * 31 + b"\xff")
    return movie(track(made, entries=numbers(1) + entry(b"avc1", extra=extra)), data=data)


CODECS = (b"rle ", b"png ", b"mjpg", b"raw ", b"cvid", b"smc ", b"8BPS", b"rpza", b"SVQ3", b"avc1", b"av01", b"apch")
CODECS += (b"icod", b"FPS1", b"HapY", b"FICV", b"MPNG", b"ZLIB", b"hev1", b"vp09", b"theo", b"dvcp")


@register("video", *CODECS)
def mov_large_frames(chance: Random, codec: bytes) -> bytes:
    """Hundreds of frames of 36 million pixels, in codecs that need no more than some bytes for each."""
    side = 5990 - chance.randrange(8)
    frame = {b"rle ": numbers(4), b"mjpg": saved("JPEG"), b"cvid": b"\0\0\0\x0a\x17\x66\x17\x66\0\0"}.get(codec)
    frame = frame or (png(side, side) if codec in (b"png ", b"MPNG") else chance.randbytes(40))
    made = tables(300, len(frame), per_chunk=1)

    def file(at: int) -> bytes:
        made[b"stco"] = numbers(300) + numbers(at) * 300
        return movie(track(made, entries=numbers(1) + entry(codec, side), side=side), data=frame)

    return file(len(file(0)) - len(frame))


@register("video", 65_535, 0, 16_000)
def mp4_sides(chance: Random, side: int) -> bytes:
    return movie(track(tables(3, 20), side=side), data=chance.randbytes(99))


@register("video", "senc", "pssh", "tenc")
def mp4_encrypted(chance: Random, which: str) -> bytes:
    """Boxes of encrypted clips that declare billions of samples and keys."""
    how = box(b"schi", full(b"tenc", bytes(3) + b"\x08" + bytes(16)))
    scheme = box(b"sinf", box(b"frma", b"avc1"), full(b"schm", b"cenc", numbers(1 << 16)), how)
    extra = {
        "senc": full(b"senc", numbers(0x0FFFFFFF), flags=2),
        "pssh": full(b"pssh", bytes(16), numbers(0x0FFFFFFF), version=1) * 2000,
        "tenc": full(b"saiz", b"\xff", numbers(0xFFFFFFFF)) + full(b"saio", numbers(0xFFFFFFF)),
    }[which]
    return movie(
        track(tables(3, 20), entries=numbers(1) + entry(b"encv", extra=scheme)) + extra, data=chance.randbytes(99)
    )


@register("video", *range(4))
def mp4_cut(chance: Random, _: int) -> bytes:
    """A valid clip of which the beginning, the middle or the end is missing."""
    data = encoded("libx264", "mp4", preset="ultrafast")
    first, second = sorted(chance.sample(range(len(data)), 2))
    return chance.choice(
        (
            data[first:],
            data[:second],
            data[:first] + data[second:],
            data[:first] + bytes(second - first) + data[second:],
        )
    )


# Raw streams


def _growing(codec: str, format: str) -> bytes:
    """A stream whose images become huge in the middle."""
    small = encoded(codec, format, 64, 5, preset="ultrafast")
    return small + encoded(codec, format, 4096, 1, preset="ultrafast") + small


@register("video", ("libx264", "h264"))
def stream_grows(chance: Random, codec: str, format: str) -> bytes:
    return _growing(codec, format) + chance.randbytes(4)


@register("video", "units", "parameters", "slices", "messages")
def h264_units(chance: Random, which: str) -> bytes:
    """Millions of empty units, of sets of parameters, of messages."""
    data = encoded("libx264", "h264", preset="ultrafast")
    parts = data.split(b"\0\0\0\1")
    unit = {
        "units": b"\x0c",
        "parameters": b"\x68\xee\x3c\x80",
        "slices": b"\x65\x88\x80",
        "messages": b"\x06\x05\xff\x01x\x80",
    }[which]
    flood = (b"\0\0\1" + unit) * 300_000
    return b"\0\0\0\1".join(parts[:3]) + flood + b"\0\0\0\1" + b"\0\0\0\1".join(parts[3:]) + chance.randbytes(4)


def exp_golomb(value: int) -> str:
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


@register("video", (254, 254), (1000, 1000), (65_535, 65_535), (65_000, 1))
def h264_sides(chance: Random, width: int, height: int) -> bytes:
    """A set of parameters that declares images of any size, and reference images with them, before valid ones."""
    fields = [0, 16, 0, 0, 16]  # the set, frame numbers, order of images by count of bits, references
    bits = "".join(map(exp_golomb, fields)) + "1" + exp_golomb(width) + exp_golomb(height) + "11000" + "1"
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    parameters = b"\x67\x42\0\x33" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    honest = encoded("libx264", "h264", preset="ultrafast")
    pictures = honest[honest.index(b"\0\0\1\x65") :] if b"\0\0\1\x65" in honest else honest
    return b"\0\0\0\1" + parameters + b"\0\0\0\1\x68\xce\x3c\x80\0" + pictures * 5 + chance.randbytes(4)


HONEST = {
    "mp4": ("libx264", "mp4"), "mov-mjpeg": ("mjpeg", "mov", "yuvj420p"), "mov-png": ("png", "mov", "rgb24"),
    "mov-rle": ("qtrle", "mov", "rgb24"), "h264": ("libx264", "h264"), "mp4-mpeg4": ("mpeg4", "mp4"),
    "mov-fragments": ("libx264", "ismv"),
}  # fmt: skip


def honest(name: str) -> bytes:
    codec, format, *pixels = HONEST[name]
    return encoded(codec, format, 64, 20, *pixels, **({"preset": "ultrafast"} if codec == "libx264" else {}))


@register("video", *HONEST)
def damaged_clip(chance: Random, name: str) -> bytes:
    return damaged(honest(name), chance)


@register("video", *range(3))
def damaged_boxes(chance: Random, _: int) -> bytes:
    """Damage in the boxes alone, where every byte counts."""
    data = honest("mp4")
    at = data.index(b"moov") - 4
    return data[:at] + damaged(data[at:], chance)
