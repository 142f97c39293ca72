"""Batches copied to the device one ahead of use, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]


def prefetch(
    batches: Iterable[Batch],
    device: torch.device | str,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
) -> Iterator[dict[str, Any]]:
    """Yield batches on ``device``; on CUDA the next one is copied and prepared while the current one is worked on.

    Copies overlap only from pinned memory, so tensors that are not pinned yet are pinned here. Values may be tensors,
    dicts, lists and tuples of them, or anything else, which passes as it is. ``prepare`` works on the device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield prepare(_tensors(batch, lambda tensor: tensor.to(device)))
        return
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    ahead: dict[str, Any] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            coming = prepare(_tensors(batch, lambda tensor: _pinned(tensor).to(device, non_blocking=True)))
        if ahead is not None:
            yield ahead
        # Work queued from here on waits for the copy; the allocator must not reuse the memory before that work is done.
        current.wait_stream(stream)
        _tensors(coming, lambda tensor: tensor.record_stream(current))
        ahead = coming
    if ahead is not None:
        yield ahead


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def _tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(item, change) for item in value]
    return value
