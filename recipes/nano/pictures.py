"""Rendered batches on the training device: planned by worker processes, copied aside, drawn on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aria.train import prefetch
from recipes.nano.assets import Assets
from recipes.nano.data import Plan, loader, to_device
from recipes.nano.render import Renderer

Batch = dict[str, Any]


def worth(batch: Batch) -> int:
    """Pictures of a batch counted in pictures of 224 px, by their patches."""
    return len(batch["valid"]) * (batch["size"] // 224) ** 2


class Pictures:
    """The source of a run's batches."""

    def __init__(self, device: torch.device | str, *, batch: int, workers: int):
        self.device = torch.device(device)
        self._pictures = {224: batch, 448: max(1, batch // 4)}
        self._workers = workers
        self._plan = self._new_plan(0)
        self._render = Renderer(Assets.load(self._plan.assets), self.device)
        self.num_classes = self._render.num_classes

    def _new_plan(self, seed: int) -> Plan:
        return Plan(seed=seed, pictures=self._pictures, workers=self._workers)

    def raw(self, seed: int, progress: float = 0.0) -> Iterator[Batch]:
        """Planned batches in host memory, three of 224 px to one of 448; another seed never repeats one."""
        self._plan = self._new_plan(seed)
        self._plan.progress.value = progress
        return loader(self._plan, pin_memory=self.device.type == "cuda")

    def to_device(self, raw: Batch) -> Batch:
        return to_device(raw, self.device)

    def render(self, batch: Batch) -> Batch:
        """A planned batch on the device with its pictures and dense labels."""
        return batch | self._render(batch)

    def drawn(self, raw: Iterator[Batch]) -> Iterator[Batch]:
        """Planned batches on the device, drawn."""
        return map(self.render, prefetch(raw, self.device))

    def batches(self, seed: int, progress: float = 0.0) -> Iterator[Batch]:
        """Drawn batches without end."""
        return self.drawn(self.raw(seed, progress))

    def set_progress(self, step: int, progress: float) -> None:
        """Tell the planners how far training is: words grow with it."""
        self._plan.progress.value = progress
