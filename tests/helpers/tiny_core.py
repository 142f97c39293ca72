"""An `EngineCore` on a tiny random model, prompts for it, and logits of its steps and of plain forward passes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import torch

from aria.engine import SamplingParams
from aria.engine.core import EngineCore
from aria.engine.request import Request
from aria.model import Packed
from aria.ops import Segments
from aria.processor.image_inputs import ImageSpan
from tests.helpers.gpu_models import Work
from tests.helpers.tiny import tiny_config, tiny_model

IMAGE = 9


@cache
def model():
    return tiny_model(tiny_config(vocab_size=120))


def core(**settings) -> EngineCore:
    defaults = {"max_batch": 8, "max_model_len": 400, "cache_blocks": 200, "step_tokens": 64, "mixed_step_tokens": 32}
    return EngineCore(model(), **(defaults | settings))


def prompt(length: int, seed: int) -> list[int]:
    choice = random.Random(seed)
    return [choice.randrange(20, 120) for _ in range(length)]


def with_image(before: int, tokens: int, after: int, seed: int) -> tuple[list[int], list[ImageSpan]]:
    features = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))
    ids = [*prompt(before, seed), *[IMAGE] * tokens, *prompt(after, seed + 1)]
    return ids, [ImageSpan(before, tokens, b"image %d" % seed, features)]


def work(seed: int) -> tuple[list[int], list[ImageSpan]]:
    """Make a short prompt, a long one, one with an image, or one with a shared prefix."""
    choice = random.Random(seed)
    kind = seed % 4
    if kind == 0:
        return prompt(choice.randrange(1, 12), seed), []
    if kind == 1:
        return prompt(choice.randrange(40, 150), seed), []
    if kind == 2:
        return with_image(choice.randrange(0, 20), choice.randrange(3, 50), choice.randrange(1, 9), seed % 3)
    return prompt(50, 999) + prompt(choice.randrange(1, 30), seed), []


@torch.no_grad()
def plain_logits(ids: list[int], images: list[ImageSpan]) -> torch.Tensor:
    """Return the logits after each token from one forward pass over the whole sequence."""
    features = torch.cat([image.data for image in images]) if images else None
    context = Packed(model().config.text, Segments.of([len(ids)]))
    return model().logits(model()(torch.tensor(ids), context, features).hidden)


def run(core: EngineCore, requests, *, look=lambda launched: None) -> None:
    launch = core.runner.launch

    def watched(plan):
        launched = launch(plan)
        look(launched)
        return launched

    core.runner.launch = watched
    while core.unfinished:
        core.step()
        core.scheduler.check()
    core.runner.launch = launch
    pool = core.pool
    assert pool.used == 0 and pool.free + pool.cached == pool.total
    assert all(len(request.outputs) == request.max_tokens for request in requests)


def answer(
    core: EngineCore, work: Work, dtype: torch.dtype, adapters: Sequence[str | None] = (None,)
) -> tuple[list[Request], list[tuple[Request, int, torch.Tensor]]]:
    """Answer requests of adapters in turn, by the engine's own steps, CUDA graphs included.

    Returns:
        The requests; and request, index and logits of every sampled position.
    """
    seen: list[tuple[Request, int, torch.Tensor]] = []
    counts: dict[Request, int] = {}
    launch = core.runner.launch

    def watched(plan):
        launched = launch(plan)
        for request, logits in zip(launched.requests, launched.logits, strict=True):
            seen.append((request, counts.setdefault(request, 0), logits.float().cpu()))
            counts[request] += 1
        return launched

    core.runner.launch = watched
    requests: list[Request] = []
    for seed, (ids, images) in enumerate(work):
        images = [ImageSpan(p.start, p.tokens, p.key, p.data.to(core.device, dtype)) for p in images]
        # Log-probabilities make the engine keep its logits.
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, logprobs=0)
        requests += core.add(ids, params, images=images, adapter=adapters[seed % len(adapters)])
    while core.unfinished:
        core.step()
    return requests, seen
