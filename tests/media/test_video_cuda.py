"""Clips decoded by a GPU's video decoder."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from aria.media import read as clips
from aria.media.open import open_media
from aria.processor import MediaSettings

pytestmark = pytest.mark.gpu


def write(path: Path, codec: str, frames: int = 120) -> Path:
    """A clip of distinct frames, including non-reference frames."""
    draws = np.random.default_rng(0)
    ground = np.kron(draws.integers(0, 255, (12, 16, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"g": "50", "bf": "3"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(frames):
            picture = np.roll(ground, (i, 3 * i), (0, 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode(None))
    return path


def read(path: Path, decoder: str) -> list[clips.Frame]:
    settings = MediaSettings(clip_decoder=decoder)
    return clips.read_clip(open_media(path, "video", settings), num_frames=17, settings=settings)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "ffv1"])
def test_a_gpu_decodes_the_same_frames_as_the_cpu(tmp_path: Path, codec: str) -> None:
    """Also for a codec that no GPU decodes."""
    torch.zeros(1, device="cuda")
    if not clips._gpu_decodes(0):
        pytest.skip("this driver comes without a video decoder, or it does not work")
    path = write(tmp_path / "clip.mkv", codec)
    for decoder in ("cuda:0", "auto"):
        ours, theirs = read(path, decoder), read(path, "cpu")
        assert [one.seconds for one in ours] == [one.seconds for one in theirs]
        assert ours[0].seconds == Fraction(3, 25)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.rgb, other.rgb)
