"""A small training run to save and load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from aria.train.optimizer import OptimizerSettings, make_optimizer
from aria.train.parallel import Parallel
from aria.train.state import CheckpointSettings, RunState


class Counter:
    """Stands in for a data stream; its state is a counter."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


class Run:
    """A model of two layers with the state of its training."""

    def __init__(self, kind: str = "adamw", seed: int = 0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).bfloat16()
        self.model[0].bias.requires_grad_(False)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.trained.items(), OptimizerSettings(kind=kind, learning_rate=0.01))
        self.stream, self.position = Counter(), SimpleNamespace(step=0)

    def step(self) -> None:
        x = torch.randn(32, 8).bfloat16()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stream.asked += 1
        self.position.step += 1

    def state_dict(self):
        return {
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "position": vars(self.position),
            "random": torch.get_rng_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        vars(self.position).update(state["position"])
        torch.set_rng_state(state["random"])


def state_of(folder: Path, **settings) -> RunState:
    return RunState(folder, CheckpointSettings(**settings), Parallel.start())
