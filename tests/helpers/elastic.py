"""A training that saves, fails on request, and resumes: ``torchrun -m tests.helpers.elastic FOLDER STEPS [KIND]``."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from aria.train.objective import Objective, Step
from aria.train.optimizer import clip_gradients, make_optimizer
from aria.train.parallel import Parallel
from aria.train.state import CheckpointSettings, RunState, gathered
from tests.helpers.spread import ADAMW, PARTS, TWO, batches, model_of

CASE = TWO["experts"]


class Saved:
    """A run without a data stream; its position is its step."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.position = model, optimizer, SimpleNamespace(step=0)

    def state_dict(self):
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        position = vars(self.position)
        return {"weights": trained, "optimizer": self.optimizer.state_dict(), "position": position, "stream": {}}

    @torch.no_grad()
    def load_state_dict(self, state) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.position).update(state["position"])


def main(folder: str, steps: str, kind: str = "adamw") -> None:
    torch.set_num_threads(1)
    optimizer = replace(ADAMW, kind=kind)
    out, world = Path(folder), int(os.environ.get("WORLD_SIZE", "1"))
    settings = CASE.parallel if world > 1 else type(CASE.parallel)()
    parallel = Parallel.start(settings)
    model = parallel.apply(model_of(CASE, parallel.device))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = Saved(model, make_optimizer(named.items(), optimizer))
    state = RunState(out, CheckpointSettings(every_steps=2, keep=4), parallel)
    if state.latest() is not None:
        state.load(saved)
    began, objective, position = saved.position.step, Objective(model, ranks=parallel), saved.position
    while position.step < int(steps):
        parts = batches(position.step, CASE.pictures, model.config)
        labels = float(sum(part.labels for part in parts))
        for batch in parts[parallel.data_rank :: parallel.data_world]:
            objective(batch, Step(labels, PARTS, 0.0)).total.backward()
        clip_gradients(named.values(), optimizer.clip_norm)
        saved.optimizer.step()
        saved.optimizer.zero_grad()
        position.step += 1
        if state.due(position.step):
            state.save(saved, wait=True)
        _misbehave(parallel.rank, position.step, out)
    weights = gathered(model, trained=True)
    if parallel.rank == 0:
        torch.save({"began": began, "weights": weights}, out / "end.pt")
    state.close()
    parallel.close()


def _misbehave(rank: int, step: int, out: Path) -> None:
    if rank == 1 and step == int(os.environ.get("ARIA_TEST_RAISE_AT", "-1")):
        raise RuntimeError("the second rank has had enough")
    died = out / "died"
    if rank == 1 and step == int(os.environ.get("ARIA_TEST_KILL_AT", "-1")) and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
