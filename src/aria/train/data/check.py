"""``aria data check``: read every row and all media as training would, and report problems and sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from aria.config import AriaConfig
from aria.processor import AriaProcessor
from aria.train.data.encode import RowEncoder
from aria.train.data.order import permutation
from aria.train.data.packer import Packer
from aria.train.data.report import RowError, Tally
from aria.train.data.settings import DataSettings
from aria.train.data.sources import Sources
from aria.train.data.stream import Reader
from aria.train.loss import IGNORE_INDEX

PERCENTILES = (0, 50, 90, 99, 100)


class Size(NamedTuple):
    """Size of one sequence."""

    tokens: int
    labels: int
    images: int
    """Images, including frames of clips and pages of documents."""
    num_crops: int


@dataclass
class Check:
    """Result of a check."""

    batch_tokens: int
    """Tokens of a batch."""
    rows: dict[str, int] = field(default_factory=dict)
    """Data set -> number of rows."""
    usable: int = 0
    """Number of rows that can be trained on."""
    sizes: list[Size] = field(default_factory=list)
    """Size of every sequence."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Kind of problem -> all rows that have it: ``file:line: message``."""
    notes: dict[str, Tally] = field(default_factory=dict)
    """Kind of note -> the first rows that are used with changes."""
    batches: int = 0
    """Batches of one epoch."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(size.tokens for size in self.sizes)

    @property
    def efficiency(self) -> float:
        """Fraction of the batches' tokens that is not filler."""
        return self.tokens / (self.batches * self.batch_tokens) if self.batches else 0.0

    def distribution(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles of the tokens, targets, images and crops of a sequence."""
        found = {}
        names = {"tokens": "tokens", "labels": "targets", "images": "pictures", "num_crops": "crops"}
        for i, name in enumerate(Size._fields):
            values = np.array([size[i] for size in self.sizes])
            points = np.percentile(values, PERCENTILES, method="higher") if self.sizes else [0] * len(PERCENTILES)
            spread = {f"p{point}": float(value) for point, value in zip(PERCENTILES, points, strict=True)}
            found[names[name]] = {"mean": float(values.mean()) if self.sizes else 0.0, **spread}
        return found

    def histogram(self) -> list[tuple[int, int]]:
        """``(bound, count)`` of sequences by length, with bounds that are powers of two."""
        bounds: dict[int, int] = {}
        for size in self.sizes:
            bound = 1 << (size.tokens - 1).bit_length()
            bounds[bound] = bounds.get(bound, 0) + 1
        if not bounds:
            return []
        return [(1 << n, bounds.get(1 << n, 0)) for n in range(min(bounds).bit_length() - 1, max(bounds).bit_length())]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rows": self.rows,
            "usable": self.usable,
            "problems": {kind: {"count": len(rows), "rows": rows} for kind, rows in self.problems.items()},
            "notes": {kind: {"count": tally.count, "first": tally.examples} for kind, tally in self.notes.items()},
            "sequences": len(self.sizes),
            "distribution": self.distribution(),
            "histogram": [{"up_to": bound, "count": count} for bound, count in self.histogram()],
            "tokens": self.tokens,
            "targets": sum(size.labels for size in self.sizes),
            "crops": sum(size.num_crops for size in self.sizes),
            "batch_tokens": self.batch_tokens,
            "batches": self.batches,
            "efficiency": self.efficiency,
        }


def check_data(
    settings: DataSettings,
    processor: AriaProcessor,
    config: AriaConfig,
    *,
    tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Read every row of the data sets once, whatever their weights.

    Args:
        settings: ``[data]`` of a recipe.
        processor, config: Processor and configuration of the model to train.
        tokens: Tokens of a batch.
        progress: Called with the number of rows read and of all rows.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: A data set is of an unknown kind, or the settings do not fit the model.
    """
    sources = Sources(settings.weights, settings.split)
    encoder = RowEncoder(processor, config, settings, tokens)
    check = Check(tokens, rows=dict(zip(sources.names, sources.counts, strict=True)))

    def measure(row: int) -> tuple[list[Size], list[Any]]:
        encoded = encoder(sources.read(row))
        sizes = [
            Size(sample.tokens, int((sample.targets != IGNORE_INDEX).sum()), len(sample.crops), sample.num_crops)
            for sample in encoded.samples
        ]
        return sizes, encoded.notes

    reader = Reader(measure, settings.workers, settings.workers * settings.prefetch)
    try:
        for row, found in reader.read(range(len(sources))):
            where = sources.where(row)
            if isinstance(found, RowError):
                check.problems.setdefault(found.kind, []).append(f"{where}: {found}")
            else:
                sizes, notes = found
                check.usable += 1
                check.sizes += sizes
                for note in notes:
                    check.notes.setdefault(note.kind, Tally()).add(f"{where}: {note.message}")
            if progress is not None:
                progress(row + 1, len(sources))
    finally:
        reader.close()
    check.batches = count_batches(check.sizes, tokens, settings.max_crops, settings.lookahead)
    return check


def count_batches(sizes: Sequence[Size], tokens: int, max_crops: int | None, lookahead: int) -> int:
    """Number of batches of the sequences, in a random order."""
    packer: Packer[Size] = Packer(tokens, max_crops, lookahead)
    batches = 0
    for i in permutation(len(sizes), 0):
        packer.add([sizes[i]])
        while packer.ready:
            packer.take()
            batches += 1
    while packer.held:
        packer.take()
        batches += 1
    return batches
