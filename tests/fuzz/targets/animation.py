"""Animated images that Pillow decodes, and their frame times, which are read without Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from PIL import Image

from aria.media.animation import animation_format, decode_animation, scan_webp
from aria.media.container import ReadDeadline
from aria.media.limits import MediaSettings
from aria.media.open import OpenedMedia
from tests.fuzz.made_images import animated

SETTINGS = MediaSettings(frame_pixels=1 << 16)
WORDS = ("VP8X", "ANIM", "ANMF", "ALPH", "VP8 ", "VP8L", "ftypavis", "EXIF")


def fuzz(data: bytes) -> None:
    clip, watch = OpenedMedia(data, "the clip"), ReadDeadline("the clip", 10.0)
    if animation_format(clip, SETTINGS) != "WEBP":
        return
    try:
        timeline = scan_webp(clip, SETTINGS, watch)
    except ValueError:
        return
    assert timeline.times[0] == 0 and timeline.end > timeline.times[-1]
    assert all(before < after for before, after in pairwise(timeline.times)), "times that do not rise"
    chosen = dict(enumerate(timeline.times[:8]))
    frames = decode_animation(clip, "WEBP", chosen, lambda width, height: (8, 8), SETTINGS, watch)
    assert frames.keys() <= set(chosen.values())
    assert all(frame.shape == (8, 8, 3) for frame in frames.values())


def seeds() -> Iterator[bytes]:
    Image.init()
    yield from (data for data in animated() if data[:4] == b"RIFF")
