"""`BatchFeature`: the model inputs made by the processor, a dict of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

TENSOR_KINDS = ("pt", "pd", "np")
"""Accepted values of ``return_tensors``. "pd", as in the snippet of the model card, also gives torch tensors."""


class BatchFeature(dict[str, Any]):
    """Model inputs by name, such as ``input_ids``, also readable as attributes.

    Attributes:
        num_crops: Number of crops of each image, in order. Not a key, because it is not a model input.
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
        """Move all tensors to a device and cast floating-point ones, in place. Returns itself.

        Args:
            args: A device, a dtype, or both in any order, as for ``Tensor.to``.
            device: The device.
            dtype: The dtype of floating-point tensors. Ids and masks keep theirs.
            non_blocking: Passed to ``Tensor.to``.
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
    """Reject values of ``return_tensors`` other than None and :data:`TENSOR_KINDS`."""
    if return_tensors is not None and return_tensors not in TENSOR_KINDS:
        raise ValueError(
            f"return_tensors={return_tensors!r} is not known; use 'pt' (torch), 'np' (numpy) or None (lists)"
        )


def to_tensors(rows: list[list[int]], return_tensors: str | None) -> Any:
    """Convert rows of equal length to a ``(B, S)`` int64 tensor or array. None: keep the lists."""
    check_tensor_kind(return_tensors)
    if return_tensors is None:
        return rows
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"prompts of {lengths} tokens do not make one tensor; pass padding=True")
    return np.array(rows, dtype=np.int64) if return_tensors == "np" else torch.tensor(rows, dtype=torch.long)
