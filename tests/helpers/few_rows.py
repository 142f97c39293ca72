"""Optimizers over parameters with fewer rows than ranks: ``python -m tests.helpers.few_rows FOLDER``.

One interpreter is forked into six processes, which train with each optimizer on six ranks, then on five and on three,
each time resuming the previous checkpoint. ``FOLDER/KIND.pt`` gets the final weights. On three ranks, checkpoints then
fail in several ways, and ``FOLDER/failures.pt`` gets the observations of each rank.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from aria.train.optimizer import OptimizerSettings, make_optimizer
from aria.train.parallel import Parallel, ParallelSettings, _fully_shard
from aria.train.state import CheckpointError, CheckpointSettings, RunState, gathered

WORLDS = (6, 5, 3)
STEPS = 2
"""Steps per world size."""
KINDS = {"adamw": torch.bfloat16, "muon": torch.bfloat16}
if importlib.util.find_spec("torchao"):
    importlib.import_module("torchao.optim")
    KINDS["adamw8bit"] = torch.float32


class FewRows(nn.Module):
    """Parameters of two rows: a matrix, experts, an adapter and a norm, large enough for 8-bit moments."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (2, 2560), "experts": (2, 32, 64), "adapter": (2, 2560), "norm": (2,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


class Training:
    """A model, its optimizer, and gradients that do not depend on the world size."""

    def __init__(self, kind: str, world: int):
        self.model = FewRows(KINDS[kind])
        if world > 1:
            _fully_shard(self.model, init_device_mesh("cpu", (world,), mesh_dim_names=("shard",)))
        self.named = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.named.items(), OptimizerSettings(kind=kind, learning_rate=0.01))
        self.position = SimpleNamespace(step=0)

    def step(self) -> None:
        for number, parameter in enumerate(self.named.values()):
            generator = torch.Generator().manual_seed(100 * self.position.step + number)
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step()
        self.position.step += 1

    def state_dict(self) -> dict[str, Any]:
        weights = {name: parameter.detach() for name, parameter in self.named.items()}
        state = {"weights": weights, "optimizer": self.optimizer.state_dict()}
        return state | {"position": vars(self.position), "stream": {}, "random": None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.position).update(state["position"])


def run(folder: Path, parallel: Parallel) -> None:
    """Run each optimizer for :data:`STEPS` steps, from the newest checkpoint if it exists."""
    for kind in KINDS:
        training = Training(kind, parallel.world)
        state = RunState(folder / kind, CheckpointSettings(), parallel)
        if state.latest() is not None:
            state.load(training)
        for _ in range(STEPS):
            training.step()
        state.save(training, wait=True)
        weights = gathered(training.model)
        if parallel.rank == 0:
            torch.save({"weights": weights, "steps": training.position.step}, folder / f"{kind}.pt")


def fail(folder: Path, parallel: Parallel) -> None:
    """Make checkpoints fail on one rank: during preparation, and in the background."""
    training, lines = Training("adamw", parallel.world), []
    state = RunState(folder, CheckpointSettings(every_minutes=None), parallel, report=lines.append)
    seen: dict[str, Any] = {"lines": lines}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    training.step()
    with patch("torch.save", full) if parallel.rank == 1 else patch("torch.save", torch.save):
        try:
            state.save(training)
        except CheckpointError as error:
            seen["prepared"] = str(error)
    seen["left"] = [] if parallel.rank else [path.name for path in state.folder.iterdir()]
    with patch.object(Path, "rename", full):
        # It fails in the background, so nothing is raised here.
        state.save(training)
        if state._writing is not None:
            state._writing.exception()
    training.step()
    seen["due"] = parallel.max(int(state.due(training.position.step)))
    state.save(training)
    seen["whole"] = state.latest().name
    everyone: list[Any] = [None] * parallel.world
    dist.all_gather_object(everyone, seen)
    if parallel.rank == 0:
        torch.save(everyone, folder.parent / "failures.pt")


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            return
        store = dist.FileStore(str(Path(folder, f"store-{world}")), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        parallel = Parallel(ParallelSettings(), rank, world, torch.device("cpu"))
        run(Path(folder), parallel)
        if world == WORLDS[-1]:
            fail(Path(folder, "failing"), parallel)
        dist.destroy_process_group()


if __name__ == "__main__":
    # Children share imported modules; PyTorch has not started threads yet.
    children = []
    for rank in range(max(WORLDS)):
        if not (child := os.fork()):
            main(sys.argv[1], rank)
            sys.exit()
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
