"""Read some rows of each data set as training would, before weights are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from aria.train.data.encode import RowEncoder
from aria.train.data.report import RowError
from aria.train.data.settings import DataSettings
from aria.train.data.sources import Sources
from aria.train.data.stream import Reader

MOST_ROWS = 100
"""Rows of all data sets together."""
LEAST_ROWS = 10
"""Minimum rows of each data set."""


@dataclass
class Look:
    """Result for some rows."""

    rows: Counter[str] = field(default_factory=Counter)
    """Data set -> number of rows read."""
    usable: Counter[str] = field(default_factory=Counter)
    """Data set -> number of them that can be trained on."""
    problems: list[tuple[str, int, str]] = field(default_factory=list)
    """File, line and message of each row that cannot."""
    density: float = 0.0
    """Maximum image patches per token of any row."""


def look(sources: Sources, encoder: RowEncoder, settings: DataSettings, *, rank: int = 0, world: int = 1) -> Look:
    """Read this rank's part of the rows to check.

    Raises:
        ValueError: A file was changed.
    """
    share, start, chosen = max(LEAST_ROWS, MOST_ROWS // len(sources.names)), 0, {}
    for name, count in zip(sources.names, sources.counts, strict=True):
        chosen.update(dict.fromkeys((start + row for row in _some(count, share)), name))
        start += count
    reader = Reader(lambda row: encoder(sources.read(row)), settings.workers, settings.workers * settings.prefetch)
    found, side = Look(), encoder.patch_size
    try:
        for row, encoded in reader.read(list(chosen)[rank::world]):
            found.rows[chosen[row]] += 1
            if isinstance(encoded, RowError):
                file, _, line = sources.where(row).rpartition(":")
                found.problems.append((file, int(line), f"{encoded.kind}: {encoded}"))
            else:
                found.usable[chosen[row]] += 1
                found.density = max(
                    [found.density, *(sample.patches(side) / sample.tokens for sample in encoded.samples)]
                )
    finally:
        reader.close()
    return found


def judge(looks: Iterable[Look], what: str, on_error: Literal["skip", "stop"]) -> str:
    """A message about rows that cannot be used; empty if all can.

    Args:
        looks: Results of all ranks.
        what: Kind of rows, such as ``training rows``.
        on_error: ``[data] on_error``.

    Raises:
        ValueError: Training would stop at such a row, or no row of a data set can be used. All are named.
    """
    rows: Counter[str] = Counter()
    usable: Counter[str] = Counter()
    lines: dict[tuple[str, str], list[int]] = {}
    for one in looks:
        rows += one.rows
        usable += one.usable
        for file, line, message in one.problems:
            lines.setdefault((file, message), []).append(line)
    if not lines:
        return ""
    found = sorted((file, sorted(numbers), message) for (file, message), numbers in lines.items())
    listed = "\n".join(f"  {file}:{', '.join(map(str, numbers))}: {message}" for file, numbers, message in found)
    begin = f"{rows.total() - usable.total()} of {rows.total()} {what} that were checked cannot be used"
    if useless := [name for name in rows if not usable[name]]:
        raise ValueError(f"{begin}, and none of {', '.join(useless)}:\n{listed}")
    if on_error == "stop":
        raise ValueError(f"{begin}, and [data] on_error is stop:\n{listed}")
    return f"{begin} and will be skipped:\n{listed}"


def _some(count: int, most: int) -> list[int]:
    """``most`` numbers below ``count``: half of them the first ones, the others spread evenly over the rest."""
    if count <= most:
        return list(range(count))
    first = most // 2
    return [*range(first), *np.linspace(first, count - 1, most - first).round().astype(int).tolist()]
