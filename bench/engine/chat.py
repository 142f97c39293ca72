"""Latency of nano for a user: ``python -m bench.engine.chat``.

Cold: from starting ``aria chat`` in a new process to its first letter and to its end. Warm: the same question to a
loaded engine on one thread, at both image sizes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMAGE = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
QUESTION = "What is in this picture?"


def cold() -> tuple[float, float]:
    """Return seconds to the first letter and to the end of one command."""
    command = [sys.executable, "-c", "from aria.cli import main; main()", "chat", "--image", str(IMAGE), QUESTION]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        heard = time.perf_counter() - began
        rest = process.stdout.read()
    if process.returncode or len(first + rest) < 10:
        raise SystemExit(f"aria chat answered {first + rest!r} with exit code {process.returncode}")
    return heard, time.perf_counter() - began


def warm(engine: Any, size: int) -> tuple[float, float]:
    """Return seconds to the first letter and to the end of one answer."""
    image = {"type": "image", "path": str(IMAGE), "max_image_size": size}
    message = {"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}
    began = time.perf_counter()
    pieces = engine.stream([message])
    next(pieces)
    heard = time.perf_counter() - began
    assert len("".join(pieces)) > 10
    return heard, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    rows = {"cold": [cold() for _ in range(runs)]}

    import torch

    from aria import Engine

    torch.set_num_threads(1)
    engine = Engine(device="cpu")
    warm(engine, 224)
    for size in (224, 448):
        rows[f"warm {size} px"] = [warm(engine, size) for _ in range(runs)]
    for name, row in rows.items():
        cells = []
        for what, seconds in zip(("first letter", "end"), zip(*row, strict=True), strict=True):
            cells.append(f"{what} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
        print(f"{name:12} {'; '.join(cells)}")
    print(json.dumps({name: [[round(value, 4) for value in pair] for pair in row] for name, row in rows.items()}))


if __name__ == "__main__":
    main()
