"""Time to read the frames of a clip, by number of workers: ``python -m bench.engine.clip FILE --workers 1 2 4 8 16``.

Reports the time to scan the file (which cannot be parallel), the time to decode and scale frames to the smallest crops,
and the parallel efficiency. ``--make SECONDS`` first writes the file with FFmpeg's libraries, like a camera's: 1080p,
H.264, 25 frames per second with a keyframe every 250, about 8 Mbit/s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aria.media.container import ReadDeadline, scan
from aria.media.limits import available_cores
from aria.media.open import open_media
from aria.media.read import read_clip
from aria.processor import AriaImageProcessor, MediaSettings

RATE = 25
"""Frames per second of the written clip."""
MADE_SECONDS = 71
"""Encoded seconds, which are repeated up to the requested length."""


def make(path: Path, seconds: int) -> None:
    """Write a clip of a moving test pattern with noise, so that its bit rate is that of a camera.

    Encoding is slow, so only a beginning is encoded, then repeated. Its length has no simple ratio to the distance of
    the sampled frames, so that none is sampled twice.
    """
    import av
    from av.filter import Graph
    from av.video.frame import PictureType

    graph = Graph()
    steps = [
        graph.add("testsrc2", f"size=1920x1080:rate={RATE}:duration={min(seconds, MADE_SECONDS)}"),
        graph.add("noise", "alls=12:allf=t"),
        graph.add("format", "pix_fmts=yuv420p"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*steps).configure()
    limits = {"maxrate": "8M", "bufsize": "16M", "sc_threshold": "0"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast", **limits})
        assert isinstance(stream, av.VideoStream), "libx264 should write video"
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 1920, 1080, "yuv420p", 8_000_000
        stream.codec_context.gop_size = 250
        packets = []
        with contextlib.suppress(av.EOFError):
            while True:
                frame = graph.pull()
                assert isinstance(frame, av.VideoFrame), "a test pattern should be video"
                frame.pict_type = PictureType.NONE  # the pattern's own type would make every frame a keyframe
                packets += stream.encode(frame)
        packets += stream.encode(None)
        for again in range(-(-seconds // MADE_SECONDS)):
            for packet in packets:
                assert packet.pts is not None and packet.dts is not None, "the encoder should set timestamps"
                offset = round(again * MADE_SECONDS / packet.time_base)
                if (packet.pts + offset) * packet.time_base < seconds:
                    copy = av.Packet(bytes(packet))
                    copy.stream, copy.time_base, copy.is_keyframe = stream, packet.time_base, packet.is_keyframe
                    copy.pts, copy.dts = packet.pts + offset, packet.dts + offset
                    file.mux(copy)


def measure(path: Path, frames: int, workers: Sequence[int], repeats: int, decoder: str) -> dict[str, Any]:
    """Return seconds, the best of ``repeats``."""
    settings, images = MediaSettings(decode_timeout=3600, clip_decoder=decoder), AriaImageProcessor()
    clip, size = open_media(path, "video", settings), images.sizes[0]

    def fit(width: int, height: int) -> tuple[int, int]:
        return (width, height) if max(width, height) <= size else images.fit((width, height), size)

    def scanned() -> float:
        begin = time.perf_counter()
        scan(clip, settings, ReadDeadline(clip.name, settings.decode_timeout))
        return time.perf_counter() - begin

    def read(count: int) -> float:
        begin = time.perf_counter()
        read_clip(clip, num_frames=frames, fit=fit, settings=settings, threads=count)
        return time.perf_counter() - begin

    timeline = scan(clip, settings, ReadDeadline(clip.name, settings.decode_timeout))
    scan_s = min(scanned() for _ in range(repeats))
    print(
        f"{len(timeline.times)} frames in {float(timeline.seconds):.1f} s, {len(timeline.keys)} keyframes; "
        f"{available_cores()} cores"
    )
    print(f"scan: {scan_s:.2f} s")
    rows = {}
    for count in workers:
        rows[count] = min(read(count) for _ in range(repeats))
        first = next(iter(rows))
        share = (rows[first] - scan_s) * first / ((rows[count] - scan_s) * count)
        print(
            f"{frames} frames, {count} workers: {rows[count]:.2f} s in total, parallel efficiency {share:.0%}",
            flush=True,
        )
    return {"frames": frames, "of": len(timeline.times), "scan_s": scan_s, "workers_s": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--make", type=int, metavar="SECONDS", help="first write a clip of this length to FILE")
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=None, help="default: 1, 2, 4, ... up to the cores")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--decoder", default="cpu", help="cpu, or cuda for a GPU's video decoder (default: cpu)")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.file, arguments.make)
    counts = arguments.workers or [1 << i for i in range(8) if 1 << i <= available_cores()]
    print(json.dumps({"clip": measure(arguments.file, arguments.frames, counts, arguments.repeats, arguments.decoder)}))


if __name__ == "__main__":
    main()
