"""What the processor hands to the model: a mapping of tensors that can move between devices in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

TENSOR_KINDS = ("pt", "pd", "np")
"""Accepted ``return_tensors``; "pd", as in the model card's snippet, gives torch tensors too."""


class BatchFeature(dict[str, Any]):
    """Model inputs by name, e.g. ``input_ids``; also readable as attributes and unpackable with ``**``.

    Attributes:
        num_crops: how many crops stand for each image, in order; not a key, because it is no input of the model.
    """

    num_crops: list[int]

    def __init__(self, data: Mapping[str, Any] | None = None, *, num_crops: Sequence[int] = ()) -> None:
        super().__init__(data or {})
        self.num_crops = list(num_crops)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no input named {name!r}; there are {', '.join(self) or 'none'}") from None

    def to(
        self, *args: Any, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> BatchFeature:
        """Move every tensor to a device and cast the floating ones, in place; returns itself.

        Args:
            args: a device, a dtype, or both in any order, as for ``Tensor.to``.
            device: the same by name.
            dtype: the same by name; ids and masks keep their own dtype.
            non_blocking: passed on to ``Tensor.to``.
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                cast = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=cast, non_blocking=non_blocking)
        return self


def check_tensor_kind(return_tensors: str | None) -> None:
    """Refuse any ``return_tensors`` other than None and :data:`TENSOR_KINDS`."""
    if return_tensors is not None and return_tensors not in TENSOR_KINDS:
        raise ValueError(
            f"return_tensors={return_tensors!r} is not known; use 'pt' (torch), 'np' (numpy) or None (lists)"
        )


def to_tensors(rows: list[list[int]], return_tensors: str | None) -> Any:
    """Rows of equal length -> ``(B, S)`` int64 of the wanted kind; None leaves the lists as they are."""
    check_tensor_kind(return_tensors)
    if return_tensors is None:
        return rows
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"prompts of {lengths} tokens do not make one tensor; pass padding=True")
    return np.array(rows, dtype=np.int64) if return_tensors == "np" else torch.tensor(rows, dtype=torch.long)
