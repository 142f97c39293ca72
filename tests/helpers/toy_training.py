"""A custom model, stream and objective, for recipes that name factories."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from aria.train.objective import Losses
from tests.helpers.tiny import tiny_config, tiny_model


class Aided(nn.Module):
    """A tiny Aria with an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.aria = tiny_model(tiny_config())
        self.aid = nn.Linear(64, 5)


class Numbers:
    """A stream of numbered batches that are plain mappings; its state is the next number."""

    def __init__(self, batch: int):
        self._batch, self.next = batch, 0

    def __iter__(self):
        while True:
            self.next += 1
            ids = torch.randint(10, 300, (self._batch,), generator=torch.Generator().manual_seed(self.next))
            yield {"input_ids": ids, "number": self.next}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def model(recipe) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return Aided()


def stream(recipe, processor, rank: int, world: int) -> Numbers:
    assert processor is not None and (rank, world) == (0, 1)
    return Numbers(recipe.batch.tokens)


def objective(module: Aided, recipe, ranks):
    seen = SimpleNamespace(progress=[])

    def losses(batch, step) -> Losses:
        seen.progress.append(step.progress)
        hidden = module.aria.embed(batch["input_ids"])
        loss = nn.functional.cross_entropy(module.aid(hidden), batch["input_ids"] % 5)
        return Losses(loss, {"loss": loss.detach(), "progress seen": torch.tensor(step.progress)})

    return losses
