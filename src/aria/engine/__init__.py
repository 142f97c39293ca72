"""Inference: `Engine` and `AsyncEngine`, continuous batching, paged KV cache, sampling, adapters, structured output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aria.lazy import lazy_exports

if TYPE_CHECKING:
    from aria.engine.async_engine import AsyncEngine
    from aria.engine.core import ContextLengthError
    from aria.engine.engine import Answer, Engine, Piece
    from aria.engine.outputs import Choice, Result, Stats, TokenLogprob, Usage
    from aria.engine.sampling_params import ParameterError, SamplingParams

__all__ = [
    "Answer",
    "AsyncEngine",
    "Choice",
    "ContextLengthError",
    "Engine",
    "ParameterError",
    "Piece",
    "Result",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "Usage",
]

# Imported on first use: the command line reads SamplingParams without loading PyTorch.
__getattr__ = lazy_exports(
    __name__,
    {
        "Answer": "aria.engine.engine",
        "AsyncEngine": "aria.engine.async_engine",
        "Choice": "aria.engine.outputs",
        "ContextLengthError": "aria.engine.core",
        "Engine": "aria.engine.engine",
        "ParameterError": "aria.engine.sampling_params",
        "Piece": "aria.engine.engine",
        "Result": "aria.engine.outputs",
        "SamplingParams": "aria.engine.sampling_params",
        "Stats": "aria.engine.outputs",
        "TokenLogprob": "aria.engine.outputs",
        "Usage": "aria.engine.outputs",
    },
)
