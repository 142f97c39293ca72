"""Lengths of the sequences that lie end to end in a packed tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths of packed sequences, on the host and on the device.

    The copy on the host gives shapes without waiting for the device; kernels read ``cu_seqlens``.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    """int32 ``(len(lengths) + 1,)``: where each sequence starts, then the total."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> Segments:
        """Make segments of known lengths on a device."""
        lengths = tuple(int(n) for n in lengths)
        if len(set(lengths)) == 1:  # computed on the device without a copy, so that a CUDA graph can contain it
            return cls(lengths, torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * lengths[0])
        return cls(lengths, torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=device))

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def equal(self) -> bool:
        """Whether all sequences have the same length, so that a dense view works."""
        return len(set(self.lengths)) == 1

    @cached_property
    def last(self) -> Tensor:
        """int64 index of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    def positions(self) -> Tensor:
        """int64 ``(total,)``: 0, 1, 2, ... within each sequence."""
        starts = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff(), output_size=self.total)
        return torch.arange(self.total, device=self.cu_seqlens.device) - starts
