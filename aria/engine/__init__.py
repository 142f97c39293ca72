"""Running the model: requests, sampling, the decoding loop, and `Engine`."""

from aria.engine.engine import Engine
from aria.engine.request import Choice, Result, SamplingParams, TokenLogprob, Usage

__all__ = ["Choice", "Engine", "Result", "SamplingParams", "TokenLogprob", "Usage"]
