"""Running the model: requests, the paged cache, the scheduler, the steps, and the faces `Engine` and `AsyncEngine`."""

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
