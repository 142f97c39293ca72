"""Prepares batches on the device ahead of use, in a thread and on a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import Full, Queue
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]
_LOOK = 0.1
"""Seconds between checks of the waiting thread whether it should stop."""


def prefetch(
    batches: Iterable[Batch],
    device: torch.device | str,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
) -> Iterator[dict[str, Any]]:
    """Yield batches on ``device``; the next two are copied and prepared while the current one is in use.

    Copies overlap with computation only from pinned memory, so unpinned tensors are pinned here.

    Args:
        batches: Mappings of tensors, containers of tensors, or anything else, which is passed on unchanged.
        device: Target device.
        prepare: Called with each batch on the device, in the thread.
    """
    device = torch.device(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ready: Queue[tuple[dict[str, Any] | BaseException | None, Any]] = Queue(maxsize=1)
    stop = threading.Event()

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                for batch in batches:
                    coming = prepare(_tensors(batch, lambda tensor: _sent(tensor, device)))
                    if not _offer(ready, (coming, stream.record_event() if stream else None), stop):
                        return
            _offer(ready, (None, None), stop)
        except BaseException as error:
            _offer(ready, (error, None), stop)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            coming, done = ready.get()
            if isinstance(coming, BaseException):
                raise coming
            if coming is None:
                return
            if stream is not None:
                # The allocator must not reuse the memory before the work queued from here on is done.
                torch.cuda.current_stream(device).wait_event(done)
                _tensors(coming, lambda tensor: tensor.record_stream(torch.cuda.current_stream(device)))
            yield coming
            del coming
    finally:
        stop.set()
        thread.join()


def _offer(ready: Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Put an item into the queue; return False if ``stop`` is set first."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=_LOOK)
        except Full:
            continue
        return True
    return False


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to every tensor of a nested structure."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _tensors(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(item, change) for item in value]
    return value
