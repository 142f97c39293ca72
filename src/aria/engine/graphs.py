"""Work on the device as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]
Work = Callable[..., Outputs]
"""Takes tensors, gives tensors; never waits for the host, and does the same whatever the tensors hold."""

FREE_BYTES = 2 << 30
"""With less than this left on the device, what is kept for later tensors is given up before a graph is made."""


def batch_size(count: int, most: int) -> int:
    """The size that a batch of ``count`` is filled up to: up to 8 its own, larger by a seventh at most."""
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return min(-(-count // step) * step, most)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    work: Work
    inputs: tuple[Tensor, ...]
    outputs: Outputs


class Graphs:
    """Runs work by keys, each key as a graph from its second time on.

    The first time runs plainly: kernels are compiled then and libraries make workspaces, which a capture may not. All
    graphs share one pool of memory, so the outputs of one are good until any of them runs again.

    Args:
        device: a CUDA device.
        most: graphs that are kept; the longest unused go first.
    """

    def __init__(self, device: torch.device, most: int):
        self._device, self._most = device, most
        self._captured: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Work, *inputs: Tensor) -> Outputs:
        """The outputs of ``work(*inputs)``.

        Args:
            key: the same only for work that differs in nothing but what the inputs hold.
            work: run with tensors like the inputs, on the device.
            inputs: on the device, or pinned.
        """
        if key not in self._captured:
            self._captured[key] = None
            self._forget()
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
        """Capture; if that fails, for want of memory, the next time of the key is a first one again."""
        del self._captured[key]
        try:
            return self._capture(work, inputs)
        except Exception:
            if not any(self._captured.values()):
                # A pool goes with the last graph that uses it.
                self._pool = torch.cuda.graph_pool_handle()
            raise

    def _capture(self, work: Work, inputs: tuple[Tensor, ...]) -> _Captured:
        # What a capture runs is not computed, so what the inputs hold does not matter yet.
        mine = tuple(torch.empty_like(x, device=self._device) for x in inputs)
        # `torch.cuda.graph` waits for the device and gives up what is kept each time, which stalls everybody.
        if torch.cuda.mem_get_info(self._device)[0] < FREE_BYTES:
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile: what they do is no part of this graph, and no fault of it.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                outputs = work(*mine)
            finally:
                graph.capture_end()
        return _Captured(graph, work, mine, outputs)

    def clear(self) -> None:
        """Drop all graphs, once the device runs none of them any more."""
        torch.cuda.synchronize(self._device)
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()  # nothing may be captured into a pool that has been given up

    def _forget(self) -> None:
        while len(self._captured) > self._most:
            self._captured.popitem(last=False)
