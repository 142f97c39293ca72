"""Training: a recipe describes a run, and ``train`` runs it. ``from aria.train import Recipe, train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aria.lazy import lazy_exports

if TYPE_CHECKING:
    from aria.train.recipe import Recipe
    from aria.train.run import train

__all__ = ["Recipe", "train"]

# Looked up on first use: a loss or a data stream is imported without the rest of training.
__getattr__ = lazy_exports(__name__, {"Recipe": "aria.train.recipe", "train": "aria.train.run"})
