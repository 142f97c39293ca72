"""Clips in containers: the number of pixels reserved, each frame once, in order of time."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from aria.media import video
from aria.media.limits import MediaSettings
from aria.workers import LocalJob
from tests.fuzz.made_clips import clips
from tests.fuzz.made_images import animated

SETTINGS = MediaSettings(frame_pixels=1 << 18, clip_decoder="cpu", max_frames=4, decode_timeout=10.0)
ASKED = video.FrameSelection(num_frames=3, fps=None, max_frames=None)
MEMORY = 512 << 20
LONGEST = 8192
WORDS = (
    "ftyp",
    "moov",
    "trak",
    "mdia",
    "stbl",
    "stts",
    "stsz",
    "stco",
    "elst",
    "RIFF",
    "avih",
    "idx1",
    "OggS",
    "GIF89a",
)


def fuzz(data: bytes) -> None:
    asked: list[tuple[int, int]] = []

    def take(pixels: int, nbytes: int) -> None:
        asked.append((pixels, nbytes))
        if nbytes > MEMORY:
            raise ValueError("the clip takes too much memory")

    calls = {"fit": _fit, "sizes": lambda width, height: [], "take": take, "progress": lambda *values: None}
    job = LocalJob([data], calls)
    try:
        read = video.read(job, "the clip", ASKED, SETTINGS, 1)["frames"]
    except ValueError as error:
        assert "the clip" in str(error), f"an error that does not say of what: {error}"
        return
    assert len(asked) == 1, "memory was asked for more than once"
    assert len(read) == len(job.arrays) <= ASKED.num_frames
    seconds = [Fraction(above, below) for _, above, below, *_ in read]
    assert seconds == sorted(set(seconds)) and (not seconds or seconds[0] >= 0), f"times {seconds}"
    for (*_, width, height, _), array in zip(read, job.arrays, strict=True):
        assert array.shape == (height, width, 3)
        assert max(width, height) <= 64


def _fit(width: int, height: int) -> list[int]:
    return [min(width, 64), min(height, 64)]


def seeds() -> Iterator[bytes]:
    yield from clips()
    yield from animated()
