"""The state that a run saves and resumes from, and warnings where a resumed run differs from the one before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aria.train.parallel import Parallel
from aria.train.recipe import Recipe, changes, parse_toml
from aria.train.rng import random_states, restore_random_states
from aria.train.schedule import Budget, ShareBudget, StepBudget, lr_factor
from aria.train.trainer import Position


class Saved:
    """The state that a checkpoint holds.

    Args:
        module: The module; its trained parameters are saved.
        optimizer: Optimizer over them.
        average: Their moving averages, by name.
        stream: This rank's batches.
        position: Where the training is.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor],
        stream: Any,
        position: Position,
    ):
        self.module, self.optimizer, self.average = module, optimizer, average
        self.stream, self.position = stream, position

    def state_dict(self) -> dict[str, Any]:
        weights = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        return {
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "stream": self.stream.state_dict(),
            "position": vars(self.position),
            "random": random_states(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in self.average.items():
            value.copy_(state["average"][name])
        self.stream.load_state_dict(state["stream"])
        for name, value in state["position"].items():
            setattr(self.position, name, value)
        random = state["random"]
        # Earlier versions saved the CPU state alone, and CUDA's under a key of its own.
        restore_random_states({"cpu": random, "cuda": state.get("cuda")} if isinstance(random, Tensor) else random)


def about(recipe: Recipe) -> dict[str, Any]:
    """Description of the run, stored in each checkpoint; :func:`course` reads it."""
    return {"recipe": recipe.to_toml()}


def make_budget(recipe: Recipe, stream: Any, seconds: Callable[[], float]) -> Budget:
    """``[budget]`` of a recipe.

    Args:
        recipe: The recipe.
        stream: Its batches, which count ``epochs``.
        seconds: Returns the seconds of training so far.

    Raises:
        ValueError: The budget is in epochs, and the stream does not count them.
    """
    budget = recipe.budget
    if budget.steps is not None:
        return StepBudget(budget.steps)
    if budget.minutes is not None:
        return ShareBudget(budget.minutes * 60.0, seconds)
    assert budget.epochs is not None, "one measure is set"
    if not hasattr(stream, "epochs"):
        raise ValueError(
            "[budget] epochs needs a stream that counts them; set steps or minutes for this [data] factory"
        )
    return ShareBudget(budget.epochs, lambda: stream.epochs)


def schedule_of(recipe: Recipe) -> dict[str, Any]:
    """``[schedule]`` of a recipe as keywords of :func:`aria.train.schedule.lr_factor`."""
    schedule, steps = recipe.schedule, recipe.budget.steps
    warmup_steps = schedule.warmup_steps
    if warmup_steps is None and steps is not None:
        warmup_steps = math.ceil(schedule.warmup * steps)
    return {
        "kind": schedule.kind,
        "warmup": schedule.warmup,
        "warmup_steps": warmup_steps,
        "final": schedule.final,
    }


def course(
    meta: Mapping[str, Any], recipe: Recipe, parallel: Parallel, budget: Callable[[Recipe], Budget], step: int
) -> list[str]:
    """Lines to print when a run resumes: where it resumes from, and warnings about tokens per step and learning rate.

    The schedule spans the budget, so another budget makes the rate jump: if the old schedule were kept, steps added
    after the end of a cosine would train at a rate of zero.

    Args:
        meta: What the checkpoint says of itself, and its folder.
        recipe: Recipe of this run.
        parallel: Ranks of this run.
        budget: Makes the budget of a recipe.
        step: Step of the checkpoint.
    """
    now = budget(recipe).progress(step)
    if now >= 1.0:
        return [f"this training is finished, at step {step}; raise [budget] to continue from there"]
    lines = [f"resuming from step {step}, {now:.1%} of the training, from {meta['folder']}"]
    before = Recipe.from_table(parse_toml(meta["recipe"], "the checkpoint's recipe")) if "recipe" in meta else recipe
    seen, sees = (
        one.batch.tokens * one.batch.accumulate * ranks
        for one, ranks in ((before, meta["data_world"]), (recipe, parallel.data_world))
    )
    if seen != sees:
        each = recipe.batch.tokens * parallel.data_world
        keep = f"; batch.accumulate={seen // each} keeps them" if not seen % each else ""
        lines.append(
            f"warning: a step now has {sees:,} tokens, and had {seen:,} before (data-parallel ranks: "
            f"{meta['data_world']} -> {parallel.data_world}; batch.accumulate: {before.batch.accumulate} -> "
            f"{recipe.batch.accumulate}){keep}"
        )
    old, new = (
        one.optimizer.learning_rate * lr_factor(step, budget(one).progress(step), **schedule_of(one))
        for one in (before, recipe)
    )
    if abs(old - new) > 0.01 * max(old, new):
        changed = changes(before, recipe, only=("budget", "optimizer", "schedule"))
        lines.append(
            f"warning: the learning rate continues at {new:.3g}, where the run before would have had {old:.3g} "
            f"({'; '.join(changed)}): the schedule spans the whole budget"
        )
    return lines
