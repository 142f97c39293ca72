"""A trampoline: recursive generators run without recursion, so that depth takes heap memory and not stack."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

Steps = Generator[Any, Any, Any]
"""A generator that yields other generators of this kind, is sent their results, and returns its own."""


def run(steps: Steps) -> Any:
    """Run a generator and return its result.

    >>> def count(pairs):
    ...     return 1 + (yield count(pairs[1])) if pairs else 0
    >>> pairs = ()
    >>> for _ in range(10_000):
    ...     pairs = (None, pairs)
    >>> run(count(pairs))
    10000
    """
    running, result = [steps], None
    while running:
        try:
            running.append(running[-1].send(result))
            result = None
        except StopIteration as stop:
            running.pop()
            result = stop.value
    return result
