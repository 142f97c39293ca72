"""What one rank works on in one micro-step: sequences end to end, always the same number of tokens.

T tokens, C crops, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from aria.processor.image_inputs import Crops
from aria.train.loss import IGNORE_INDEX

FILLER_PIECE = 1024
"""Maximum length of a filler sequence: attention over short ones costs next to nothing."""


class Sample(NamedTuple):
    """One sequence, ready to be packed with others."""

    input_ids: Tensor
    """int64 ``(T,)``, with one image id for each image token."""
    targets: Tensor
    """int64 ``(T,)``: the id to predict after each token, :data:`~aria.train.loss.IGNORE_INDEX` where there is none."""
    crops: tuple[Crops, ...] = ()
    """Crops of its images, in the order of their places."""

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_crops(self) -> int:
        return sum(len(crops.extents) for crops in self.crops)

    def patches(self, side: int) -> int:
        """Number of patches that are not padding; ``side`` is the side of a patch in pixels."""
        extents = [extent for crops in self.crops for extent in crops.extents]
        return sum(-(-height // side) * -(-width // side) for height, width in extents)


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences; no token attends to another sequence, and no target crosses into one."""

    input_ids: Tensor
    """int64 ``(T,)``."""
    targets: Tensor
    """int64 ``(T,)``: the id to predict after each token, :data:`~aria.train.loss.IGNORE_INDEX` where there is none."""
    lengths: tuple[int, ...]
    """Lengths of the sequences, filler included; their sum is T."""
    filler: int = 0
    """Filler tokens at the end: separate sequences without targets, which router losses do not count."""
    crops: tuple[Crops, ...] = ()
    """uint8 crops of each image, in the order of their places."""
    labels: int = 0
    """Number of targets."""

    @classmethod
    def pack(cls, samples: Sequence[Sample], tokens: int, filler_id: int) -> Batch:
        """Pack sequences end to end, and fill up to exactly ``tokens`` with ``filler_id``."""
        filler = tokens - sum(sample.tokens for sample in samples)
        assert filler >= 0, f"{tokens - filler} tokens do not fit into a batch of {tokens}"
        targets = torch.cat([*(sample.targets for sample in samples), torch.full((filler,), IGNORE_INDEX)])
        pieces = [min(FILLER_PIECE, filler - start) for start in range(0, filler, FILLER_PIECE)]
        return cls(
            input_ids=torch.cat([*(sample.input_ids for sample in samples), torch.full((filler,), filler_id)]),
            targets=targets,
            lengths=(*(sample.tokens for sample in samples), *pieces),
            filler=filler,
            crops=tuple(crops for sample in samples for crops in sample.crops),
            labels=int((targets != IGNORE_INDEX).sum()),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; copies from pinned memory are asynchronous."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin(self) -> Batch:
        """The batch in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            targets=change(self.targets),
            crops=tuple(crops._replace(pixels=change(crops.pixels)) for crops in self.crops),
        )
