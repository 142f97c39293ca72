"""The processes that train together, as every part of training sees them.

T tokens of a batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aria.config import TextConfig
from aria.model.context import Context
from aria.ops import Segments


class Ranks(Protocol):
    """The ranks of one training run; :class:`aria.train.parallel.Parallel` implements it.

    Attributes:
        rank, world: Rank of this process, and the world size.
        device: Device that this process computes on.
        data_rank, data_world: The same among ranks with data of their own. Ranks that share sequences have the same
            data.
        sequence: Number of ranks that share the tokens of one batch.
        saving: Process group of the thread that writes checkpoints; None with one process.
    """

    rank: int
    world: int
    device: torch.device
    data_rank: int
    data_world: int
    sequence: int
    saving: dist.ProcessGroup | None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks with data of their own."""
        ...

    def join(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share the tokens of one batch."""
        ...

    def max(self, value: int) -> int:
        """Largest value over all ranks; does not wait for the device."""
        ...

    def collect(self, thing: Any) -> list[Any]:
        """Objects of all ranks with data of their own. All ranks call it together, while none is saving."""
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        ...

    def context(self, config: TextConfig, segments: Segments) -> Context:
        """Attention context of sequences whose tokens are split over this rank's group."""
        ...

    def shard(self, x_T: Tensor) -> Tensor:
        """This rank's part of the tokens."""
        ...
