"""What first requests would wait for, done before they come: kernels are compiled, graphs captured, cuDNN's plans made.

A kernel is compiled anew for every tile, and for numbers that are multiples of 16. So steps of all kinds that requests
can bring about are run once, and those that become graphs twice.
tests/engine/test_compiled_kernels.py holds that steps afterwards compile nothing.
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
"""Up to about so many tokens, tiles depend on how many there are (docs/lab/kernels.md)."""
MANY_TOKENS = 300, 700, 2500, 4200, 8300
"""Of each kind of larger steps: rows to an expert, tokens to a block of the router, and cuDNN's share of attention."""


class WarmUp:
    """Steps of a core for the sake of what they compile. They answer nobody, and nothing of them stays in its cache.

    Args:
        core: without requests.
        adapter: of all requests.
    """

    def __init__(self, core: EngineCore, adapter: str | None = None):
        assert not core.busy, "a warm-up runs without other requests"
        self._core, self._adapter = core, adapter
        self._numbers = count()

    def run(self, images: Sequence[Sequence[ImageSpan]]) -> None:
        """All steps.

        Args:
            images: of some prompts, one after another from their beginning on. Equal sizes that come twice become
                graphs.
        """
        self.decode()
        self.prefill()
        for prompt in images:
            self.encode(prompt)
        self._core.plan_attention()
        self._core.pool.clear()
        self._core.clear_image_cache()

    def decode(self) -> None:
        """Steps of all numbers of answers that graphs are made for; of drawing in the graph, and after it."""
        most = self._core.max_batch
        sizes = sorted({batch_size(n, most) for n in range(1, most + 1)})
        penalties = SamplingParams(presence_penalty=0.1, logit_bias={self._token(): 1.0})
        scored = SamplingParams(temperature=1.0, top_p=0.9, logprobs=0)
        for size in sizes:
            for params in (SamplingParams(), scored, penalties):
                self._answer([1] * size, params, tokens=4)

    def prefill(self) -> None:
        """Prompts alone, which become graphs, and larger ones; and prompts beside an answer that grows."""
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
        """A prompt of images alone."""
        end = max(image.end for image in images)
        if end < self._core.max_model_len:
            self._add(end, SamplingParams(), 1, images)
            self._finish()

    def _answer(self, lengths: Sequence[int], params: SamplingParams | None = None, *, tokens: int = 1) -> None:
        """Prompts of so many tokens together."""
        for length in lengths:
            self._add(length, params or SamplingParams(), tokens)
        self._finish()

    def _add(self, length: int, params: SamplingParams, tokens: int, images: Sequence[ImageSpan] = ()) -> bool:
        """Queue a prompt that begins like no other, cut to what there is room for."""
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
