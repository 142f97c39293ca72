"""The order of rows: mixing and shuffling as a function of seed and row index.

N rows of an epoch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_UNITS = np.uint64
_STEP = _UNITS(0x9E3779B97F4A7C15)
_MOST = 0xFFFFFFFFFFFFFFFF


def noise(count: int, *keys: int) -> np.ndarray:
    """uint64 ``(count,)`` drawn by the keys, with SplitMix64, so that no library version changes a run."""
    state = np.zeros(1, dtype=_UNITS)
    for key in keys:
        state = _mix(state + _UNITS(key & _MOST) + _STEP)
    return _mix(state + np.arange(1, count + 1, dtype=_UNITS) * _STEP)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> _UNITS(30))) * _UNITS(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _UNITS(27))) * _UNITS(0x94D049BB133111EB)
    return x ^ (x >> _UNITS(31))


def permutation(count: int, *keys: int) -> np.ndarray:
    """int64 ``(count,)``: 0 to count - 1 in a random order given by the keys."""
    return np.argsort(noise(count, *keys), kind="stable")


class RowOrder:
    """An infinite sequence of rows: epoch after epoch, each row as often as the weight of its data set says.

    Args:
        counts: Rows of each data set.
        weights: Weight of each: 1.5 takes every row once and a random half, rounded to whole rows, twice.
        seed: Seed of all random choices.
        shuffle: False keeps rows in the order of their data sets.
        resample: Draw the random parts again in each epoch.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int = 0,
        shuffle: bool = True,
        resample: bool = False,
    ):
        self._seed, self._shuffle, self._resample = seed, shuffle, resample
        self._parts = []
        start = 0
        for count, weight in zip(counts, weights, strict=True):
            wholes = int(weight)
            self._parts.append((start, count, wholes, round((weight - wholes) * count)))
            start += count
        self.size = sum(count * wholes + rest for _, count, wholes, rest in self._parts)
        """N."""
        if not self.size:
            raise ValueError("the weights of [data] mixer leave no row; raise them")
        # Requests alternate between the end of an epoch and the beginning of the next, from several threads.
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._turn = threading.Lock()

    def row(self, row_index: int) -> int:
        """The row at an index of the infinite sequence."""
        epoch, place = divmod(row_index, self.size)
        with self._turn:
            return int(self.epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        """int64 ``(N,)``: the rows of an epoch in order."""
        rows = []
        for number, (start, count, wholes, rest) in enumerate(self._parts):
            rows += [np.arange(start, start + count)] * wholes
            drawn = permutation(count, self._seed, 1, number, epoch if self._resample else 0)[:rest]
            rows.append(start + np.sort(drawn))
        mixed = np.concatenate(rows)
        return mixed[permutation(len(mixed), self._seed, 2, epoch)] if self._shuffle else mixed
