"""Training: a recipe describes a run, and ``train`` runs it. ``from aria.train import Recipe, train``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aria.train.recipe import Recipe
    from aria.train.run import train

__all__ = ["Recipe", "train"]

# Looked up on first use: a loss or a data stream is imported without the rest of training.
_MODULES = {"Recipe": "aria.train.recipe", "train": "aria.train.run"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
