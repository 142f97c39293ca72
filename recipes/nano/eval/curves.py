"""Learning curves of nano's stages, one after another, from their training logs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

PANELS = {
    "loss of a letter": ("text loss", "answer loss"),
    "share right": ("text accuracy", "answer accuracy", "patch accuracy", "query accuracy"),
}
COLOURS = 48
"""Colours of the PNG; few, to keep the file small."""

Lines = Sequence[Mapping[str, Any]]


def read(log: Path) -> Lines:
    """Read the training lines of a ``log.jsonl``; none if there is no such file."""
    if not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    return [line for line in lines if "seconds" in line]


def joined(logs: Mapping[str, Lines], name: str) -> tuple[list[float], list[float]]:
    """Return minutes since the start of the first stage, and the values of ``name`` at them."""
    minutes, values, begun = [], [], 0.0
    for lines in logs.values():
        for line in lines:
            if line.get(name) is not None:
                minutes.append((begun + line["seconds"]) / 60)
                values.append(line[name])
        begun += lines[-1]["seconds"] if lines else 0.0
    return minutes, values


def draw(logs: Mapping[str, Lines], file: Path) -> None:
    """Draw a PNG of all stages: losses per letter and accuracies, with the stages' numbers above."""
    # Optional: only publishing needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name in names:
            minutes, values = joined(logs, name)
            if values:
                axes.plot(minutes, values, linewidth=1.0, label=name.rsplit(" ", 1)[0])
        begun = 0.0
        for stage, lines in logs.items():
            if lines:
                axes.axvline(begun / 60, color="0.8", linewidth=0.8, zorder=0)
                axes.text(begun / 60, 1.01, stage.partition("-")[0], transform=axes.get_xaxis_transform(), fontsize=7)
                begun += lines[-1]["seconds"]
        axes.set_xlabel("minutes of training")
        axes.set_ylabel(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        if title == "loss of a letter":
            axes.set_yscale("log")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(COLOURS)
    image.save(file, "PNG", optimize=True)
