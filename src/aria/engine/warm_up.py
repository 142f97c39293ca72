"""Warm-up: compile kernels, capture CUDA graphs and make cuDNN's plans before the first requests.

A kernel is compiled for every tile size, and again for arguments that are multiples of 16. So steps of every kind that
requests can cause run once, and those that become CUDA graphs twice. tests/engine/test_compiled_kernels.py checks that
later steps compile nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count

from aria.engine.core import EngineCore
from aria.engine.graphs import batch_size
from aria.engine.runner import GRAPH_TOKENS
from aria.engine.sampling_params import SamplingParams
from aria.processor.image_inputs import ImageSpan

FEW_TOKENS = 272
"""Up to about this many tokens, tile sizes depend on their number (docs/lab/kernels.md)."""
MANY_TOKENS = 300, 700, 2500, 4200, 8300
"""One number for each kind of larger step: tokens per expert, tokens per block of the router, and cuDNN's attention."""


class WarmUp:
    """Runs steps of synthetic requests. Nothing of them stays in the caches.

    Args:
        core: An engine core without requests.
        adapter: Name of the adapter of all synthetic requests; None is the base model.
    """

    def __init__(self, core: EngineCore, adapter: str | None = None):
        assert not core.busy, "a warm-up runs without other requests"
        self._core, self._adapter = core, adapter
        self._numbers = count()

    def run(self, images: Sequence[Sequence[ImageSpan]]) -> None:
        """Run all kinds of steps.

        Args:
            images: Images of several prompts. Prompts with images of equal sizes make the encoder capture a graph.
        """
        self.decode()
        self.prefill()
        for prompt in images:
            self.encode(prompt)
        self._core.plan_attention()
        self._core.pool.clear()
        self._core.clear_image_cache()

    def decode(self) -> None:
        """Decode steps of every batch size that CUDA graphs have, with sampling inside and outside the graph."""
        most = self._core.max_batch
        sizes = sorted({batch_size(n, most) for n in range(1, most + 1)})
        penalties = SamplingParams(presence_penalty=0.1, logit_bias={self._token(): 1.0})
        scored = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
        for size in sizes:
            for params in (SamplingParams(), scored, penalties):
                self._answer([1] * size, params, tokens=4)

    def prefill(self) -> None:
        """Prefill steps of single prompts, which become CUDA graphs, of larger ones, and of chunks beside a decode."""
        for tokens in (*GRAPH_TOKENS, *GRAPH_TOKENS, *MANY_TOKENS):
            self._answer([tokens])
        self._answer([FEW_TOKENS], SamplingParams(prompt_logprobs=0))
        beside = [16 * n - less for n in range(1, FEW_TOKENS // 16 + 1) for less in (0, 1)]
        steps = [*beside, *MANY_TOKENS]
        if self._add(1, SamplingParams(), len(steps) + 4):
            self._core.step()
            for tokens in steps:
                self._add(tokens - 1, SamplingParams(), 1)
                self._core.step()
        self._finish()

    def encode(self, images: Sequence[ImageSpan]) -> None:
        """Prefill a prompt of images alone."""
        end = max(image.end for image in images)
        if end < self._core.max_model_len:
            self._add(end, SamplingParams(), 1, images)
            self._finish()

    def _answer(self, lengths: Sequence[int], params: SamplingParams | None = None, *, tokens: int = 1) -> None:
        """Answer prompts of these lengths in one batch."""
        for length in lengths:
            self._add(length, params or SamplingParams(), tokens)
        self._finish()

    def _add(self, length: int, params: SamplingParams, tokens: int, images: Sequence[ImageSpan] = ()) -> bool:
        """Queue a prompt that shares no prefix with others, truncated to the context length. False if it is empty."""
        length = min(length, self._core.max_model_len - 1)
        if length < 1:
            return False
        params = dataclasses.replace(params, max_tokens=tokens, ignore_eos=True, seed=0)
        self._core.add([self._token()] * length, params, images=images, adapter=self._adapter)
        return True

    def _token(self) -> int:
        config = self._core.model.config
        token = next(self._numbers) % (config.text.vocab_size - 1)
        return token + (token >= config.image_token_index)

    def _finish(self) -> None:
        while self._core.busy:
            self._core.step()
