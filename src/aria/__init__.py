"""Aria: an open multimodal mixture-of-experts model (arXiv 2410.05993)."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (a checkout can be imported by any interpreter)
    raise ImportError(
        f"aria needs Python 3.11 or newer, and this is Python {sys.version.split()[0]} ({sys.executable}); "
        "create an environment with a newer interpreter: python3.12 -m venv .venv"
    )

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from aria.lazy import lazy_exports

if TYPE_CHECKING:
    from aria.config import AriaConfig
    from aria.engine import AsyncEngine, Engine, SamplingParams
    from aria.pretrained import AriaForConditionalGeneration
    from aria.processor import AriaImageProcessor, AriaProcessor

__all__ = [
    "AriaConfig",
    "AriaForConditionalGeneration",
    "AriaImageProcessor",
    "AriaProcessor",
    "AsyncEngine",
    "Engine",
    "SamplingParams",
]

# Imported on first use, so that `aria --help` does not import PyTorch.
_exported = lazy_exports(
    __name__,
    {
        "AriaConfig": "aria.config",
        "AriaForConditionalGeneration": "aria.pretrained",
        "AriaImageProcessor": "aria.processor",
        "AriaProcessor": "aria.processor",
        "AsyncEngine": "aria.engine",
        "Engine": "aria.engine",
        "SamplingParams": "aria.engine",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("aria-moe")
    return _exported(name)
