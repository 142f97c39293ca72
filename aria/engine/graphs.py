"""Decoding steps as CUDA graphs: one launch instead of hundreds. N sequences of a step, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Decode = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]
"""Rows, positions, width of the block tables, whether to sample -> logits and tokens."""


def batch_sizes(most: int) -> list[int]:
    """Sizes that graphs are made for: small ones exactly, larger ones in steps of an eighth or less."""
    sizes = [*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16)]
    sizes += range(160, 257, 32)
    sizes += range(320, max(most, 320) + 64, 64)
    return [size for size in sizes if size < most] + [most]


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor | None
    tokens: Tensor | None


class DecodeGraphs:
    """Runs decoding steps, each batch size and width of block tables as a graph from the second time on.

    The first time runs plainly: kernels are compiled then and libraries make workspaces, which a capture may not.

    Args:
        decode: the step; it may not wait for the host.
        most: the largest batch.
        scratch_row: the row of the places that fill up a batch.
        device: a CUDA device.
    """

    def __init__(self, decode: Decode, most: int, scratch_row: int, device: torch.device):
        self._decode = decode
        self._sizes = batch_sizes(most)
        self._scratch_row = scratch_row
        self._device = device
        self._graphs: dict[tuple[int, int, bool], _Graph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(
        self, rows_and_positions: Sequence[Sequence[int]], width: int, sample: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Run a step of any size. Returns rows, positions, logits and tokens; the next step writes over them.

        A step that samples gives no logits, so that graphs need not keep them apart.
        """
        N = len(rows_and_positions[0])
        size = next(size for size in self._sizes if size >= N)
        values = torch.empty(2, size, dtype=torch.int32, pin_memory=True)
        values[0], values[1] = self._scratch_row, 0
        values[:, :N] = torch.tensor(rows_and_positions, dtype=torch.int32)
        key = size, width, sample
        if key not in self._graphs:
            self._graphs[key] = None
            inputs = values.to(self._device, non_blocking=True)
            logits, tokens = self._decode(inputs[0], inputs[1], width, sample)
        else:
            graph = self._graphs[key] = self._graphs[key] or self._capture(*key)
            inputs, logits, tokens = graph.inputs, graph.logits, graph.tokens
            inputs.copy_(values, non_blocking=True)
            graph.graph.replay()
        rows, positions = inputs[:, :N]
        return rows, positions, *(None if x is None else x[:N] for x in (logits, tokens))

    def _capture(self, size: int, width: int, sample: bool) -> _Graph:
        inputs = torch.zeros(2, size, dtype=torch.int32, device=self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, tokens = self._decode(inputs[0], inputs[1], width, sample)
        return _Graph(graph, inputs, None if sample else logits, tokens)
