"""Phrases that messages share: sizes in bytes, and the known names that are most similar to an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_COMPARED = 64
"""Number of characters of a name that are compared; the cost is quadratic, and clients choose some of the names."""


def format_bytes(size: float) -> str:
    """A size in bytes as MiB or GiB, such as ``1.50 GiB``."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def similar_names(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names that are most similar to an unknown one, for "did you mean".

    Args:
        name: The unknown name.
        known: Names to choose from.
        most: Maximum number of names to return.
        cutoff: Minimum similarity, 0 to 1.
    """
    return difflib.get_close_matches(name[:_MAX_COMPARED], list(known), most, cutoff)
