"""CUDA graph capture and replay: one launch instead of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]
Work = Callable[..., Outputs]
"""A function of tensors that never waits for the host, and launches the same operations for any values."""

FREE_BYTES = 2 << 30
"""With less free device memory than this, the allocator's cache is emptied before a capture."""


def batch_size(count: int, most: int) -> int:
    """Size that a batch of ``count`` is padded to: no padding up to 8, then at most a seventh."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return min(-(-count // step) * step, most)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    work: Work
    inputs: tuple[Tensor, ...]
    outputs: Outputs


class Graphs:
    """Runs work by key, as a CUDA graph from a key's second run on.

    The first run is eager: it compiles kernels and lets libraries allocate workspaces, which a capture must not. All
    graphs share one memory pool, so the outputs of one are valid until any of them runs again.

    Args:
        device: A CUDA device.
        most: Maximum number of graphs; the least recently used are dropped.
    """

    def __init__(self, device: torch.device, most: int):
        self._device, self._most = device, most
        self._captured: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Work, *inputs: Tensor) -> Outputs:
        """Return the outputs of ``work(*inputs)``.

        Args:
            key: Equal only for work that differs in nothing but the values of its inputs.
            work: Called with tensors on the device, shaped like the inputs.
            inputs: Tensors on the device or in pinned memory.
        """
        if key not in self._captured:
            self._captured[key] = None
            self._drop_oldest()
            return work(*(x.to(self._device, non_blocking=True) for x in inputs))
        captured = self._captured[key]
        if captured is None:
            captured = self._captured[key] = self._first_capture(key, work, inputs)
        self._captured.move_to_end(key)
        for mine, x in zip(captured.inputs, inputs, strict=True):
            mine.copy_(x, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def _first_capture(self, key: Hashable, work: Work, inputs: tuple[Tensor, ...]) -> _Captured:
        """Capture a graph. If that fails for lack of memory, the key's next run is eager again."""
        del self._captured[key]
        try:
            return self._capture(work, inputs)
        except Exception:
            if not any(self._captured.values()):
                # A memory pool is freed with the last graph that uses it.
                self._pool = torch.cuda.graph_pool_handle()
            raise

    def _capture(self, work: Work, inputs: tuple[Tensor, ...]) -> _Captured:
        # A capture computes nothing, so the values of its inputs do not matter.
        mine = tuple(torch.empty_like(x, device=self._device) for x in inputs)
        # Not `torch.cuda.graph`, which waits for the device and empties the allocator's cache at each capture.
        if torch.cuda.mem_get_info(self._device)[0] < FREE_BYTES:
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Thread-local, because other threads may use the device meanwhile.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                outputs = work(*mine)
            finally:
                graph.capture_end()
        return _Captured(graph, work, mine, outputs)

    def clear(self) -> None:
        """Drop all graphs, after the device has finished running them."""
        torch.cuda.synchronize(self._device)
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a freed pool cannot be captured into

    def _drop_oldest(self) -> None:
        while len(self._captured) > self._most:
            self._captured.popitem(last=False)
