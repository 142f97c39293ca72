"""What a run saves and takes up again, and what a person should know where a resumed one takes another course."""

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
    """All that a resumed run needs.

    Args:
        module: what trains is saved of it.
        optimizer: over what trains.
        average: moving averages of what trains, by name.
        stream: this rank's batches.
        position: where the training is.
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
        # Earlier versions saved PyTorch's states alone, and CUDA's beside.
        restore_random_states({"cpu": random, "cuda": state.get("cuda")} if isinstance(random, Tensor) else random)


def about(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it; see :func:`course`."""
    return {"recipe": recipe.to_toml()}


def make_budget(recipe: Recipe, stream: Any, seconds: Callable[[], float]) -> Budget:
    """``[budget]`` of a recipe.

    Args:
        recipe: of the training.
        stream: its batches, whose ``epochs`` count.
        seconds: of training so far.

    Raises:
        ValueError: epochs are asked for, and the stream does not count them.
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
    """What to say when a run resumes: where it is, and what of its course is not that of the run before.

    The schedule spans the budget. With another budget the rate therefore jumps: were the old schedule kept, steps that
    are added to a cosine's end would train at a rate of zero.

    Args:
        meta: what the checkpoint says of itself, and its folder.
        recipe: of this run.
        parallel: its ranks.
        budget: makes a recipe's.
        step: that was saved.
    """
    now = budget(recipe).progress(step)
    if now >= 1.0:
        return [f"this training is finished, with step {step}; raise [budget] to train on from there"]
    lines = [f"going on after step {step}, {now:.1%} of the training, from {meta['folder']}"]
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
            f"warning: the learning rate goes on at {new:.3g}, where the run before would have had {old:.3g} "
            f"({'; '.join(changed)}): the schedule spans the whole budget"
        )
    return lines
