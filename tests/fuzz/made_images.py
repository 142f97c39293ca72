"""Small image files of every format that is read, and PNGs whose checksums are right however they were changed."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, PngImagePlugin

_PNG = b"\x89PNG\r\n\x1a\n"


def picture(mode: str = "RGB", side: int = 9) -> Image.Image:
    """A few colours, or greys; with transparency where the mode has it."""
    image = Image.new("RGBA", (side, side - 2))
    for x in range(side):
        for y in range(side - 2):
            image.putpixel((x, y), (x * 25, y * 30, 90, 255 if x + y > 4 else 60))
    if mode in ("I;16", "I", "F"):
        return image.convert("L").convert("I").point(lambda value: value * 256).convert(mode)
    return image.convert(mode)


def written(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """An image file."""
    file = io.BytesIO()
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksum of every chunk set right; others as they are."""
    if not data.startswith(_PNG):
        return data
    out, at = bytearray(data), len(_PNG)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out)


def still() -> Iterator[bytes]:
    """Images of one frame, with metadata."""
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 40, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>', zip=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield written("PNG", mode)
    yield written("PNG", pnginfo=text, exif=exif, icc_profile=b"\0" * 200)
    yield written("PNG", "P", transparency=3)
    yield written("PNG", "L", transparency=90)
    for mode in ("L", "RGB", "CMYK"):
        yield written("JPEG", mode, exif=exif, comment=b"hello", icc_profile=b"\0" * 200)
    yield written("JPEG", progressive=True)
    for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F"):
        yield written("TIFF", mode)
    yield written("TIFF", compression="tiff_lzw", exif=exif)
    white_is_zero = bytearray(written("TIFF", "I;16"))
    at = white_is_zero.find(struct.pack("<HHI", 262, 3, 1))
    white_is_zero[at + 8] = 0
    yield bytes(white_is_zero)
    yield written("WEBP", exif=exif)
    yield written("WEBP", "RGBA", lossless=True)
    yield written("GIF", "P")
    yield written("BMP")
    yield written("PPM")
    yield written("TGA", "RGBA")
    yield written("ICO", "RGBA", sizes=[(7, 7)])
    yield written("JPEG2000")
    if "AVIF" in Image.SAVE:
        yield written("AVIF", exif=exif)


def animated() -> Iterator[bytes]:
    """Images of three frames."""
    more = [picture("RGBA").rotate(turn) for turn in (90, 180)]
    kinds = ["WEBP", "GIF", "PNG", *(["AVIF"] if "AVIF" in Image.SAVE else [])]
    for kind in kinds:
        yield written(kind, "RGBA", save_all=True, append_images=more, duration=40)
    yield written("WEBP", save_all=True, append_images=[one.convert("RGB") for one in more], duration=[5, 10, 20])
