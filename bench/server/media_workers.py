"""Overhead of decoding in worker processes: the same media read in this process and in workers, in turn.

    python -m bench.server.media_workers [--repeats 30] [--json FILE]

Reports for each medium the median and quartiles of milliseconds in this process and in a worker, and the median of the
differences of adjacent measurements.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aria.media.limits import MediaSettings
from aria.media.open import open_media
from aria.media.read import read_clip, read_document, read_image, shared_workers
from aria.processor import AriaImageProcessor
from aria.processor.image import NeededSizes
from bench.engine.clip import make

CLIP_SECONDS = 600
PAGES = 50


def image(width: int, height: int, format: str) -> bytes:
    """Make a smooth image with some noise, so that its file is as large as a photograph's."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    base = np.stack([x / width * 255, y / height * 255, (x + y) % 256], -1)
    noise = np.random.default_rng(0).normal(0, 6, base.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8)).save(buffer, format)
    return buffer.getvalue()


def document(pages: int) -> bytes:
    """Make a PDF of A4 pages with lines of text."""
    import pypdfium2

    pdf = pypdfium2.PdfDocument.new()
    raw = pypdfium2.raw
    for number in range(pages):
        page = pdf.new_page(595, 842)
        for line in range(45):
            text = raw.FPDFPageObj_NewTextObj(pdf, b"Helvetica", 11)
            coded = f"Page {number + 1}, line {line + 1}: the quick brown fox jumps over the lazy dog.\0".encode(
                "utf-16-le"
            )
            raw.FPDFText_SetText(text, (raw.FPDF_WCHAR * (len(coded) // 2)).from_buffer_copy(coded))
            raw.FPDFPageObj_Transform(text, 1, 0, 0, 1, 50, 800 - 17 * line)
            raw.FPDFPage_InsertObject(page, text)
        page.gen_content()
    buffer = io.BytesIO()
    pdf.save(buffer)
    return buffer.getvalue()


def measure(
    read: Callable[[MediaSettings], object], here: MediaSettings, there: MediaSettings, repeats: int
) -> dict[str, Any]:
    """Measure milliseconds of both, in turn."""
    times: dict[str, list[float]] = {"in_process": [], "worker": []}
    for turn in range(repeats + 1):
        for name, settings in (("in_process", here), ("worker", there)):
            begin = time.perf_counter()
            read(settings)
            if turn:  # the first of each is a warm-up
                times[name].append((time.perf_counter() - begin) * 1000)
    more = statistics.median(b - a for a, b in zip(*times.values(), strict=True))
    return {**{name: statistics.quantiles(values, n=4) for name, values in times.items()}, "difference": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=30, help="repeats for images; clip and document use a tenth, at least 3"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    here, there = MediaSettings(workers=0, clip_decoder="cpu"), MediaSettings(workers=1, clip_decoder="cpu")
    workers = shared_workers(there)
    assert workers is not None, "one is asked for"
    workers.warm_up()
    images = AriaImageProcessor()
    whole, split = NeededSizes(images, split_image=False), NeededSizes(images, split_image=True)

    def fit(width: int, height: int) -> tuple[int, int]:
        return images.fit((width, height), images.sizes[0])

    def read_as(kind: str, data: bytes | Path) -> Callable[[MediaSettings], object]:
        def read(settings: MediaSettings) -> object:
            medium = open_media(data, kind, settings)
            if kind == "image":
                return read_image(medium, settings, lambda _: None, whole)
            if kind == "document":
                return read_document(medium, None, settings, sizes=split)
            return read_clip(
                medium, num_frames=128, fit=lambda w, h: images.fit((w, h), images.sizes[0]), settings=settings
            )

        return read

    few = max(3, args.repeats // 10)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        make(clip, CLIP_SECONDS)
        cases: list[tuple[str, str, bytes | Path, int]] = [
            ("PNG of 200 x 150", "image", image(200, 150, "PNG"), args.repeats),
            ("JPEG of 980 x 980", "image", image(980, 980, "JPEG"), args.repeats),
            ("JPEG of 4000 x 3000", "image", image(4000, 3000, "JPEG"), few),
            (f"clip of {CLIP_SECONDS // 60} minutes in 1080p, 128 frames", "video", clip, few),
            (f"PDF of {PAGES} pages, split", "document", document(PAGES), few),
        ]
        results = {}
        for name, kind, data, repeats in cases:
            results[name] = found = measure(read_as(kind, data), here, there, repeats)
            here_ms, there_ms = (
                f"{middle:9.2f} ({low:.2f} to {high:.2f})"
                for low, middle, high in (found["in_process"], found["worker"])
            )
            print(
                f"{name:45} in process {here_ms} ms, worker {there_ms} ms, difference {found['difference']:+.2f} ms",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
