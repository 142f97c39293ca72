"""The loss curve of a run: ``loss.tsv``, and ``loss.png`` where matplotlib is installed."""

from __future__ import annotations

import importlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aria.hub import write_file
from aria.train.progress import read_lines

TABLE_NAME, IMAGE_NAME = "loss.tsv", "loss.png"
COLUMNS = ("step", "loss", "held-out loss", "learning rate")
EVERY = 300.0
"""Seconds between drawings during a run."""


class LossCurve:
    """A sink that redraws the curve from ``log.jsonl``: every :data:`EVERY` seconds, and at the end.

    Args:
        log: File of JSON lines, which another sink writes.
    """

    def __init__(self, log: Path):
        self._log = log
        self._drawn = time.monotonic()

    def write(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() - self._drawn > EVERY:
            self._draw()

    def close(self) -> str | None:
        """Write both files, if anything was logged. Returns a line about them."""
        return self._draw()

    def _draw(self) -> str | None:
        self._drawn = time.monotonic()
        if not self._log.is_file() or not (rows := read_losses(self._log)):
            return None
        written, image = self._log.with_name(TABLE_NAME), self._log.with_name(IMAGE_NAME)
        table = ["\t".join(COLUMNS), *("\t".join(str(row.get(name, "")) for name in COLUMNS) for row in rows)]
        write_file(written, "\n".join(table) + "\n")
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            return f"loss curve: {written}; no {IMAGE_NAME}, because {error}: pip install matplotlib"
        figure = figures.Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        for name, mark in (("loss", ""), ("held-out loss", "o")):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker=mark if len(points) > 1 else "o")
        axes.grid(alpha=0.3)
        axes.legend()
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120, format="png")
        write_file(image, drawn.getvalue())
        return f"loss curve: {image} and {written}"


def read_losses(log: Path) -> list[dict[str, Any]]:
    """The :data:`COLUMNS` of a log, one row per step, in the order of steps."""
    rows: dict[int, dict[str, Any]] = {}
    for text in read_lines(log):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # incomplete after a crash
        found = {name: line[name] for name in COLUMNS if line.get(name) is not None}
        if "loss" in found or "held-out loss" in found:
            rows.setdefault(int(line["step"]), {}).update(found)
    return [rows[step] for step in sorted(rows)]
