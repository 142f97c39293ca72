"""Clips of three tiny frames in every container that is often sent."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

_KINDS = (
    *(("mp4", "mpeg4"), ("mov", "mjpeg"), ("matroska", "ffv1"), ("webm", "libvpx"), ("avi", "mpeg4"), ("gif", "gif")),
    *(
        ("mpegts", "mpeg2video"),
        ("flv", "flv"),
        ("apng", "apng"),
        ("ogg", "libtheora"),
        ("nut", "ffv1"),
        ("ivf", "libvpx"),
    ),
)
_PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p", "apng": "rgb24"}


def clips() -> Iterator[bytes]:
    """The containers that this build of FFmpeg can write."""
    for kind, codec in _KINDS:
        try:
            yield clip(kind, codec)
        except ValueError:  # it lacks the codec
            continue


def clip(kind: str, codec: str, frames: int = 3) -> bytes:
    """A clip of 16 x 16 pixels."""
    import av

    file: Any = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = _PIXELS.get(codec, "yuv420p")
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), number * 80, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
