"""Aria: an open multimodal mixture-of-experts model (arXiv 2410.05993)."""

from aria.config import AriaConfig

__all__ = ["AriaConfig"]
