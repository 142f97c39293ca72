"""A small scheduler, requests for it, and steps without a model."""

from __future__ import annotations

from aria.engine.blocks import BlockPool
from aria.engine.request import Request
from aria.engine.sampling_params import SamplingParams
from aria.engine.scheduler import Scheduler, StepPlan

S = 4


def scheduler(blocks: int = 100, **settings) -> Scheduler:
    defaults = {"max_rows": 8, "step_tokens": 64, "mixed_step_tokens": 16, "watermark": 0.0}
    return Scheduler(BlockPool(blocks + 1, S), **(defaults | settings))


def request(prompt: int | tuple[int, ...], max_tokens: int = 8, **settings) -> Request:
    """Make a request; a number stands for a unique prompt of that many tokens."""
    if isinstance(prompt, int):
        request.unique += 1
        prompt = tuple(1000 * request.unique + i for i in range(prompt))
    return Request(prompt=prompt, params=SamplingParams(), max_tokens=max_tokens, **settings)


request.unique = 0


def step(scheduler: Scheduler, token: int = 7) -> StepPlan:
    """Plan a step and append sampled tokens at once."""
    plan = scheduler.plan()
    for one in [*plan.decodes, *(chunk.request for chunk in plan.chunks if chunk.samples)]:
        scheduler.append(one, token)
        if len(one.outputs) == one.max_tokens:
            scheduler.finish(one)
    scheduler.check()
    return plan


def chunks(plan: StepPlan) -> list[tuple[Request, int, int, bool]]:
    return [(chunk.request, chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]
