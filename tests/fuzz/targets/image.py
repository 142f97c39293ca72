"""Images to upright RGB: within the pixels reserved, in a few bytes per pixel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from aria.media import rgb
from aria.media.limits import MediaSettings
from aria.workers import LocalJob
from tests.fuzz.made_images import animated, still, with_checksums

MAX_PIXELS = 1 << 20
SETTINGS = [MediaSettings(image_pixels=MAX_PIXELS, background=color) for color in ("white", None)]
MEMORY = rgb.PEAK_BYTES * MAX_PIXELS + (64 << 20)
WORDS = (
    "IHDR",
    "IDAT",
    "IEND",
    "tRNS",
    "PLTE",
    "VP8 ",
    "VP8L",
    "VP8X",
    "ALPH",
    "ftypavif",
    "\xff\xd8",
    "\xff\xda",
    "II*\0",
    "MM\0*",
)


def fuzz(data: bytes) -> None:
    for one in {data, with_checksums(data)}:
        for settings in SETTINGS:
            _read(one, settings)


def _read(data: bytes, settings: MediaSettings) -> None:
    asked: list[tuple[int, int]] = []

    def take(pixels: int, nbytes: int, width: int, height: int) -> list[tuple[int, int]]:
        asked.append((pixels, nbytes))
        return []

    job = LocalJob([data], {"take": take, "sizes": lambda width, height: []})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = rgb.read(job, "the image", settings)
        except ValueError as error:
            assert str(error).startswith("the image"), f"an error that does not say of what: {error}"
            return
    [array] = job.arrays
    width, height = result["size"]
    assert array.shape == (height, width, 3)
    assert [pixels for pixels, _ in asked] == [width * height], f"{asked} was asked for, {array.shape} came"
    assert width * height <= MAX_PIXELS


def seeds() -> Iterator[bytes]:
    yield from still()
    yield from animated()
