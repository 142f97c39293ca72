"""Forward and backward passes as one CUDA graph per kind of batch, so that the host has time to draw."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.nano.train.learner import Batch, Learner, Losses, Phase

WARM_UPS = 3
AHEAD = 2
"""Maximum number of steps that the host runs ahead of the GPU; images for later steps take memory."""


class Graph(NamedTuple):
    """A captured step: write to ``inputs`` and ``dense``, replay, read ``losses`` and ``gradients``."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    dense: Tensor
    losses: Losses
    gradients: list[Tensor | None]


class Replayed:
    """Computes a learner's losses and gradients on CUDA; batches of a kind have fixed shapes and share a graph.

    A call replaces the gradients of the parameters, so it has to be followed by an optimizer step.
    """

    def __init__(self, learner: Learner):
        self._learner = learner
        self._parameters = list(learner.parameters())
        self._graphs: dict[str, Graph] = {}
        self._phase: Phase | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        self._replays: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Batch, progress: float) -> Losses:
        """Return the losses of :meth:`Learner.loss`, valid until the next call."""
        phase, dense = self._learner.stages.phase(progress), max(self._learner.stages.weights(progress)[:2])
        key = batch["kind"]
        if phase != self._phase:
            # Phases do not recur, so the old graphs' memory is released.
            self._graphs, self._phase, self._pool = {}, phase, torch.cuda.graph_pool_handle()
        if key not in self._graphs:
            self._graphs[key] = self._capture(batch, phase)
        graph = self._graphs[key]
        torch._foreach_copy_([tensor for name, tensor in graph.inputs.items() if name != "num_tokens"], _tensors(batch))
        graph.inputs["num_tokens"].fill_(batch["num_tokens"])
        graph.dense.fill_(dense)
        while len(self._replays) >= AHEAD:
            self._replays.popleft().synchronize()
        graph.graph.replay()
        self._replays.append(torch.cuda.current_stream().record_event())
        for parameter, gradient in zip(self._parameters, graph.gradients, strict=True):
            parameter.grad = gradient
        return graph.losses

    def _capture(self, batch: Batch, phase: Phase) -> Graph:
        inputs = {name: batch[name].clone() for name in _names(batch)}
        inputs["num_tokens"] = torch.tensor(batch["num_tokens"], device=batch["input_ids"].device)
        dense = torch.zeros((), device=batch["input_ids"].device)
        fixed = {name: batch[name] for name in ("kind", "size", "max_seqlen")} | inputs
        self._clear()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Compilation and the choice of matrix kernels synchronise, so they have to happen before the capture.
            for _ in range(WARM_UPS):
                self._learner.phase_loss(fixed, phase, dense)[0].backward()
                self._clear()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs share memory for intermediates; each has its own inputs, losses and gradients.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            total, metrics = self._learner.phase_loss(fixed, phase, dense)
            total.backward()
        losses = total.detach(), {name: value.detach() for name, value in metrics.items()}
        gradients = [parameter.grad for parameter in self._parameters]
        self._clear()
        return Graph(graph, inputs, dense, losses, gradients)

    def _clear(self) -> None:
        nn.Module.zero_grad(self._learner, set_to_none=True)


def _names(batch: Batch) -> list[str]:
    """Return the names of the tensors that the learner reads, without drawing commands."""
    text = ["input_ids", "labels", "weights", "positions", "cu_seqlens"]
    return [*text, "pixel_values", "pixel_mask", "patch_labels", "query_labels"] if batch["size"] else text


def _tensors(batch: Batch) -> list[Any]:
    return [batch[name] for name in _names(batch)]
