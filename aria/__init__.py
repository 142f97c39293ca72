"""Aria: an open multimodal mixture-of-experts model (arXiv 2410.05993)."""

from aria.config import AriaConfig
from aria.engine import Engine, SamplingParams
from aria.pretrained import AriaForConditionalGeneration
from aria.processor import AriaImageProcessor, AriaProcessor

__all__ = [
    "AriaConfig",
    "AriaForConditionalGeneration",
    "AriaImageProcessor",
    "AriaProcessor",
    "Engine",
    "SamplingParams",
]
