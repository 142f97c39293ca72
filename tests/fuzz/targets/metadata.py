"""Stripping metadata from images: what Pillow could read before, it reads after, with the same pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

from PIL import Image

from aria.media.metadata import strip_metadata
from tests.fuzz.made_images import animated, still, with_checksums

WORDS = (
    "eXIf",
    "iCCP",
    "tRNS",
    "zTXt",
    "iTXt",
    "acTL",
    "fcTL",
    "fdAT",
    "PLTE",
    "Exif\0\0",
    "JFIF\0",
    "Adobe",
    "VP8X",
    "ANIM",
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP")
_MAX_PIXELS = 1 << 16


def fuzz(data: bytes) -> None:
    for one in {data, with_checksums(data)}:
        file, inverted = strip_metadata(io.BytesIO(one))
        out = file.read()
        assert len(out) <= len(one) + 64, "cleaning added to the file"
        if (before := _pixels(one)) is not None:
            after = _pixels(out)
            assert after is not None, "Pillow read the file, and does not any more"
            assert inverted or after == before, f"{before[0]} became {after[0]}"


def _pixels(data: bytes) -> tuple[object, bytes] | None:
    """Mode, size and values of the first frame; None where Pillow does not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    return None
                if image.format == "WEBP" and getattr(image, "is_animated", False):
                    image = image.convert("RGB")  # it gains transparency
                return (image.mode, image.size), image.tobytes()
        except Exception:
            return None


def seeds() -> Iterator[bytes]:
    yield from still()
    yield from animated()
