"""Image batches on the training device: planned by worker processes, copied, and drawn on the GPU."""

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
    """Return the size of a batch in images of 224 px, by number of patches."""
    return len(batch["valid"]) * (batch["size"] // 224) ** 2


@lru_cache(maxsize=2)
def _drawing(assets: Path, device: torch.device) -> tuple[Assets, Renderer]:
    """Return assets and renderer, made once per process because unpacking takes seconds."""
    material = Assets.load(assets)
    return material, Renderer(material, device)


class RenderedBatches:
    """The source of a run's image batches; the seed determines the images of batch n."""

    def __init__(self, device: torch.device | str, plan: Plan):
        self.device, self._plan = torch.device(device), plan
        self._assets, self._render = _drawing(self._plan.assets, self.device)
        self._started: tuple[int, Iterator[Batch]] | None = None
        self.num_classes = self._render.num_classes

    def start(self, step: int) -> None:
        """Start planning batches from number ``step`` on, for the next call of :meth:`batches`."""
        self._started = step, self.raw(step)

    def raw(self, step: int) -> Iterator[Batch]:
        """Yield planned batches in host memory from number ``step`` on."""
        return loader(replace(self._plan, first=step), pin_memory=self.device.type == "cuda")

    def to_device(self, raw: Batch) -> Batch:
        return to_device(raw, self.device)

    def render(self, batch: Batch) -> Batch:
        """Add images and dense labels to a planned batch on the device."""
        return batch | self._render(batch)

    def drawn(self, raw: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches on the device, each drawn while the previous one is in use."""
        return prefetch(raw, self.device, self.render)

    def batches(self, step: int) -> Iterator[Batch]:
        """Yield drawn batches endlessly from number ``step`` on."""
        started, self._started = self._started, None
        return self.drawn(started[1] if started and started[0] == step else self.raw(step))

    def samples(self) -> Iterator[Batch]:
        """Yield one drawn batch of each kind that training does not use."""
        for kind in dict.fromkeys(self._plan.cycle):
            rng = Random(f"sample {self._plan.seed} {kind}")
            raw = make_batch(self._assets, rng, kind, self._plan.images[kind], plan=self._plan)
            yield self.render(self.to_device(raw))
