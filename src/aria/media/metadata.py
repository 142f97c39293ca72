"""Strip metadata that Pillow may fail on from image files, without changing any pixel.

Browsers ignore a damaged comment, a profile of megabytes or a wrong checksum in an optional chunk. Pillow rejects such
files, so it only gets what determines pixels and orientation.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from aria.workers.cancellation import check_cancelled

_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_BYTES = 1 << 19
"""Maximum bytes of text chunks of a PNG to keep: an orientation takes less, and Pillow rejects texts of 1 MB."""
_ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_KEPT_SEGMENTS = ((0xE0, b"JFIF\0"), (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), (0xEE, b"Adobe"))
"""JPEG segments with the colour coding and the orientation."""
_SHORTEST_SEGMENT = 12
"""Bytes that Pillow reads of JFIF and Adobe segments without checking their length."""
_START_OF_SCAN, _END_OF_IMAGE, _COMMENT = 0xDA, 0xD9, 0xFE
_EMPTY_COMMENT = b"\xff\xfe\0\2"
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
_AVIF_EXIF = re.compile(rb"infe(?:\x02.{3}.{4}|\x03.{3}.{6})(Exif)", re.DOTALL)
_AVIF_HEAD = 1 << 20
"""Bytes at the start of an AVIF file that are searched for its list of items."""

_WEBP_ANIMATION, _WEBP_ALPHA = 0x02, 0x10


class _Edit(NamedTuple):
    """A replacement of the bytes of a file from ``start`` up to ``end``."""

    start: int
    end: int
    new: bytes = b""


def strip_metadata(file: BinaryIO) -> tuple[BinaryIO, bool]:
    """Prepare a file for Pillow.

    Args:
        file: Binary file at position 0.

    Returns:
        The file, or an edited copy in memory, at position 0; and whether its values must be inverted after reading:
        TIFFs of more than 8 bits in which zero is white are presented to Pillow as if zero were black, because Pillow
        supports few of them.
    """
    head = file.read(12)
    inverted = False
    if head.startswith(_PNG):
        edits = list(_png(file))
    elif head.startswith(b"\xff\xd8\xff"):
        edits = list(_jpeg(file))
    elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        edits = _tiff(file)
        inverted = bool(edits)
    elif head[4:8] == b"ftyp":
        edits = _avif(file)
    elif head[:4] == b"RIFF" and head[8:] == b"WEBP":
        edits = _webp(file)
    else:
        edits = []
    file.seek(0)
    return (_edited(file, edits) if edits else file), inverted


def icon_sizes(file: BinaryIO) -> list[tuple[int, int]]:
    """(width, height) of each image in an icon file, from the headers of the images; empty for other files.

    Args:
        file: Binary file at position 0, where it is left.
    """
    head = file.read(6)
    sizes = []
    if head[:4] == b"\0\0\1\0" and len(head) == 6:
        entries = file.read(16 * struct.unpack("<H", head[4:])[0])
        for at in range(0, len(entries) - 15, 16):
            file.seek(struct.unpack_from("<I", entries, at + 12)[0])
            image = file.read(24).ljust(24, b"\0")
            if image.startswith(_PNG):
                sizes.append(struct.unpack_from(">II", image, 16))
            else:
                width, height = struct.unpack_from("<ii", image, 4)
                sizes.append((abs(width), abs(height) // 2))  # the height includes a mask
    file.seek(0)
    return sizes


def _edited(file: BinaryIO, edits: list[_Edit]) -> BinaryIO:
    parts, at = [], 0
    for edit in edits:
        file.seek(at)
        parts += [file.read(max(edit.start - at, 0)), edit.new]
        at = edit.end
    file.seek(at)
    return io.BytesIO(b"".join([*parts, file.read()]))


def _png(file: BinaryIO) -> Iterator[_Edit]:
    """Remove ancillary chunks (their names begin with a lower-case letter), including those of an animation."""
    start, budget = len(_PNG), _TEXT_BYTES
    depth = color = 0
    while True:
        check_cancelled()
        file.seek(start)
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return
        length, kind = struct.unpack(">I4s", header)
        end = start + length + 12
        if kind == b"IHDR":
            depth, color = file.read(10)[8:].ljust(2, b"\0")
        elif kind[0] & 0x20:
            body = file.read(length) if length <= budget else b""
            whole = len(body) == length and file.read(4) == struct.pack(">I", zlib.crc32(kind + body))
            if kind == b"tRNS" and whole:
                yield _Edit(start, end, _transparency(body, depth, color))
            else:
                size = length if kind == b"eXIf" else _text_size(kind, body, budget)
                if not whole or size > budget:
                    yield _Edit(start, end)
                else:
                    budget -= size
        start = end


def _transparency(body: bytes, depth: int, color: int) -> bytes:
    """Convert a tRNS chunk to the values that Pillow decodes to; empty if it does not fit the image."""
    if color == 3:
        if not 1 <= len(body) <= 256:
            return b""
    elif len(body) != {0: 2, 2: 6}.get(color):
        return b""
    elif color == 0 and depth in (1, 2, 4):
        body = struct.pack(">H", struct.unpack(">H", body)[0] * (255 // ((1 << depth) - 1)) & 0xFFFF)
    elif color == 2 and depth == 16:
        body = bytes(value for high in body[::2] for value in (0, high))
    return struct.pack(">I", len(body)) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))


def _text_size(kind: bytes, chunk: bytes, limit: int) -> int:
    """Size of a text chunk that may hold an orientation; more than ``limit`` for any other or larger text."""
    keyword, _, rest = chunk.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in _ORIENTATION_TEXTS:
        return limit + 1
    if kind == b"zTXt" and rest[:1] == b"\0":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:2] == b"\1\0":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return limit + 1 if kind == b"zTXt" else len(chunk)
    try:
        return len(zlib.decompressobj().decompress(packed, limit + 1))
    except zlib.error:
        return limit + 1


def _jpeg(file: BinaryIO) -> Iterator[_Edit]:
    """Remove application segments and comments, except :data:`_KEPT_SEGMENTS`."""
    start, padded = 2, True
    while True:
        check_cancelled()
        file.seek(start)
        header = file.read(4)
        if len(header) < 4 or header[0] != 0xFF or header[1] in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        marker, length = header[1], struct.unpack(">H", header[2:])[0]
        if marker == 0xFF:  # padding
            start, padded = start + 1, True
            continue
        if marker == 1 or 0xD0 <= marker <= 0xD8:  # without a length
            start, padded = start + 2, False
            continue
        if 0xE0 <= marker <= 0xEF or marker == _COMMENT:
            body = file.read(min(length, 32))
            fits = length - 2 >= _SHORTEST_SEGMENT
            if not (fits and any(marker == kept and body.startswith(name) for kept, name in _KEPT_SEGMENTS)):
                # The first one, and one after padding, is replaced: junk may follow, which decoders skip after a
                # segment, and which would become a marker after padding.
                yield _Edit(start, start + 2 + length, _EMPTY_COMMENT if padded else b"")
        start, padded = start + 2 + max(length, 2), False


def _tiff(file: BinaryIO) -> list[_Edit]:
    """Declare zero as black where it is white and values have more than 8 bits."""
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
    word, long, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    values: dict[int, tuple[int, int]] = {}
    try:
        (start,) = struct.unpack_from(order + word, head, 8 if big else 4)
        file.seek(start)
        (count,) = struct.unpack(order + long, file.read(struct.calcsize(order + long)))
        for _ in range(min(count, 1000)):
            entry = file.read(size)
            tag, kind, number, value = struct.unpack_from(f"{order}HH{word}H", entry)
            if (kind, number) == (3, 1):  # one 16-bit value, stored in the entry itself
                values[tag] = value, file.tell() - struct.calcsize(order + word)
    except (struct.error, OverflowError):  # truncated; Pillow reports it
        return []
    photometric, place = values.get(_PHOTOMETRIC, (1, 0))
    if photometric != _WHITE_IS_ZERO or values.get(_BITS_PER_SAMPLE, (1, 0))[0] <= 8:
        return []
    return [_Edit(place, place + 2, struct.pack(order + "H", 1))]


def _avif(file: BinaryIO) -> list[_Edit]:
    """Remove EXIF: in AVIF the orientation is given by boxes of the file and not by EXIF, which Pillow would apply."""
    file.seek(0)
    return [_Edit(*found.span(1), b"skip") for found in _AVIF_EXIF.finditer(file.read(_AVIF_HEAD))]


def _webp(file: BinaryIO) -> list[_Edit]:
    """Set the transparency flag of animations: areas that no frame covers are transparent."""
    kind, flags = struct.unpack("<4s4xB", file.read(9).ljust(9))
    if kind != b"VP8X" or not flags & _WEBP_ANIMATION:
        return []
    return [_Edit(20, 21, bytes([flags | _WEBP_ALPHA]))]
