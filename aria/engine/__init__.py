"""Running the model: requests, sampling, the decoding loop, and `Engine`."""

from aria.engine.engine import Engine
from aria.engine.outputs import Choice, Result, TokenLogprob, Usage
from aria.engine.sampling_params import SamplingParams

__all__ = ["Choice", "Engine", "Result", "SamplingParams", "TokenLogprob", "Usage"]
