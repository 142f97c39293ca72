"""Rendered batches on the training device: planned by worker processes, copied aside, drawn on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from recipes.nano.assets.archive import Assets
from recipes.nano.draw.render import Renderer
from recipes.nano.train.image_batches import Plan, loader, make_batch, to_device
from recipes.nano.train.prefetch import prefetch

Batch = dict[str, Any]


def worth(batch: Batch) -> int:
    """Pictures of a batch counted in pictures of 224 px, by their patches."""
    return len(batch["valid"]) * (batch["size"] // 224) ** 2


@lru_cache(maxsize=2)
def _drawing(assets: Path, device: torch.device) -> tuple[Assets, Renderer]:
    """Material and renderer, made once a process: unpacking takes seconds."""
    material = Assets.load(assets)
    return material, Renderer(material, device)


class RenderedBatches:
    """The source of a run's batches: batch n holds the same pictures in every run of one seed."""

    def __init__(self, device: torch.device | str, plan: Plan):
        self.device, self._plan = torch.device(device), plan
        self._assets, self._render = _drawing(self._plan.assets, self.device)
        self._started: tuple[int, Iterator[Batch]] | None = None
        self.num_classes = self._render.num_classes

    def start(self, step: int) -> None:
        """Let the workers begin to plan the batches from ``step`` on, for the next call of :meth:`batches`."""
        self._started = step, self.raw(step)

    def raw(self, step: int) -> Iterator[Batch]:
        """Planned batches in host memory from number ``step`` on."""
        return loader(replace(self._plan, first=step), pin_memory=self.device.type == "cuda")

    def to_device(self, raw: Batch) -> Batch:
        return to_device(raw, self.device)

    def render(self, batch: Batch) -> Batch:
        """A planned batch on the device with its pictures and dense labels."""
        return batch | self._render(batch)

    def drawn(self, raw: Iterator[Batch]) -> Iterator[Batch]:
        """Planned batches on the device, each drawn while the one before is worked on."""
        return prefetch(raw, self.device, self.render)

    def batches(self, step: int) -> Iterator[Batch]:
        """Drawn batches without end from number ``step`` on."""
        started, self._started = self._started, None
        return self.drawn(started[1] if started and started[0] == step else self.raw(step))

    def samples(self) -> Iterator[Batch]:
        """One drawn batch of each kind that no training step sees."""
        for kind in dict.fromkeys(self._plan.cycle):
            rng = Random(f"sample {self._plan.seed} {kind}")
            raw = make_batch(self._assets, rng, kind, self._plan.images[kind], plan=self._plan)
            yield self.render(self.to_device(raw))
