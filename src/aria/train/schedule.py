"""How far a training is, and its learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol


class Budget(Protocol):
    """Measures progress."""

    def progress(self, step: int) -> float:
        """Fraction of the training that is done before ``step``, 0 to 1."""
        ...


@dataclass(frozen=True)
class StepBudget:
    """A number of steps."""

    steps: int

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps)


class ShareBudget:
    """A total of what ``done`` measures: passes over the data, or seconds."""

    def __init__(self, total: float, done: Callable[[], float]):
        self._total, self._done = total, done

    def progress(self, step: int) -> float:
        return min(1.0, self._done() / self._total)


class TimeBudget:
    """From progress ``start`` to ``until`` in a number of seconds, whatever the speed: the schedule always finishes."""

    def __init__(
        self, seconds: float, *, start: float = 0.0, until: float = 1.0, clock: Callable[[], float] = time.monotonic
    ):
        if seconds <= 0 or not 0.0 <= start < until <= 1.0:
            raise ValueError(f"cannot go from progress {start} to {until} in {seconds} seconds")
        self._seconds, self._start, self._until, self._clock = seconds, start, until, clock
        self._began = clock()

    def progress(self, step: int) -> float:
        share = min(1.0, (self._clock() - self._began) / self._seconds)
        return self._start + (self._until - self._start) * share


def lr_factor(
    step: int,
    progress: float,
    *,
    kind: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: float = 0.0,
    warmup_steps: int | None = None,
    final: float = 0.0,
    reached: float | None = None,
) -> float:
    """Fraction of the peak learning rate: a linear warm-up, then a decay to ``final`` at progress 1.

    Args:
        step: Optimizer steps made so far.
        progress: Fraction of the training that is done, 0 to 1.
        kind: Shape of the decay, which spans the whole training and is multiplied by the warm-up.
        warmup: Fraction of the training that the warm-up takes.
        warmup_steps: Steps that the warm-up takes, in place of ``warmup``.
        final: Fraction of the peak rate at the end.
        reached: Progress after this step, where it is known. ``warmup`` counts up to it, so that the first step has a
            rate above zero.
    """
    if warmup_steps is not None:
        # The first step has a rate above zero.
        warm = min(1.0, (step + 1) / max(1, warmup_steps))
    else:
        warm = min(1.0, (progress if reached is None else reached) / warmup) if warmup > 0 else 1.0
    if kind == "constant":
        return warm
    left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))) if kind == "cosine" else 1.0 - min(1.0, progress)
    return warm * (final + (1.0 - final) * left)
