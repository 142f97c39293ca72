"""Lockstep generation: all sequences of a batch advance one token at a time, as callbacks of transformers expect.

R sequences, S padded length of the prompts, N sequences of a step, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from aria.engine.generation import Generation
from aria.engine.outputs import Completion
from aria.engine.request import Request
from aria.model.output import GenerateOutput
from aria.ops import sampling


class Lockstep:
    """Calls logits processors and stopping criteria with the whole batch, and decides which sequences have ended.

    Processors receive ids ``(R, S + new)`` and scores ``(R, V)``. If there are end tokens, ended sequences are padded
    until all have ended, as in transformers. The engine calls this before it samples the tokens of a step.

    Args:
        requests: R requests without end tokens.
        input_ids: ``(R, S)``.
        completions: Completion of each request, which finds its end.
        generation: Settings.
    """

    def __init__(
        self, requests: Sequence[Request], input_ids: Tensor, completions: Sequence[Completion], generation: Generation
    ):
        self.requests, self._generation, self._completions = requests, generation, completions
        self._rows = {request: row for row, request in enumerate(requests)}
        # As in transformers: without end tokens, a sequence ended by a criterion continues until all have ended.
        self._pads = bool(generation.ends)
        self._began = time.monotonic()
        self.ids = input_ids
        """``(R, S + new)``, with the new tokens that all sequences have."""
        self.new = 0
        self.finished = torch.zeros(len(requests), dtype=torch.bool)
        self.scores: list[Tensor] = []
        """``(R, V)`` for each new token, after processors, temperature and truncation."""
        self.logits: list[Tensor] = []
        """``(R, V)`` for each new token, from the model."""
        self.error: Exception | None = None
        """Exception of a callback. The engine itself is not affected."""

    @property
    def done(self) -> bool:
        """Whether no further token is needed."""
        return self.error is not None or bool(self.finished.all())

    def __call__(self, requests: Sequence[Request], logits_NV: Tensor, scores_NV: Tensor) -> Tensor:
        """Process the logits of a step (`LogitsProcessor`)."""
        out = scores_NV.float().clone()
        try:
            self.update()
            steps: dict[int, list[int]] = {}
            for place, request in enumerate(requests):
                if not (request.over or self.done):
                    steps.setdefault(len(request.outputs), []).append(place)
            for step, places in steps.items():
                rows = [self._rows[requests[place]] for place in places]
                out[places] = self._processed(step, rows, logits_NV[places], out[places])
        except Exception as error:
            self.error = error
        return out

    def update(self) -> None:
        """Take over new tokens that all sequences have, and find out which sequences have ended."""
        while not self.done and all(len(one.outputs) > self.new or one.over for one in self.requests):
            column = []
            for row, request in enumerate(self.requests):
                # A request that ended without this token reached the context length.
                exists = len(request.outputs) > self.new
                padded = not exists or (bool(self.finished[row]) and self._pads)
                column.append(self._generation.pad if padded else request.outputs[self.new])
                if not self.finished[row]:
                    if exists:
                        self._completions[row].push(column[-1])
                    self.finished[row] = not exists or self._completions[row].finish_reason is not None
            new = torch.tensor(column, dtype=self.ids.dtype, device=self.ids.device)
            self.ids = torch.cat([self.ids, new[:, None]], dim=1)
            self.new += 1
            for criterion in self._generation.criteria:
                ended = criterion(self.ids, tuple(self.scores) if self._generation.scores else None)
                self.finished |= torch.as_tensor(ended).to("cpu", torch.bool)
            if self._generation.max_time is not None:
                self.finished |= time.monotonic() - self._began > self._generation.max_time

    def _processed(self, step: int, rows: Sequence[int], logits_NV: Tensor, scores_NV: Tensor) -> Tensor:
        """Scores of the sequences that have ``step`` new tokens."""
        shape = len(self.requests), scores_NV.shape[1]
        index = torch.tensor(rows, device=scores_NV.device)
        scores_RV = scores_NV.new_zeros(shape).index_copy(0, index, scores_NV)
        if step < self._generation.params.min_tokens:
            scores_RV[:, sorted(self._generation.ends)] = float("-inf")
        ids = self._ids_at(step)
        for processor in self._generation.processors:
            scores_RV = processor(ids, scores_RV)
        if self._generation.scores:
            self._keep(self.scores, step, rows, self._warped(scores_RV[rows]), shape)
        if self._generation.logits:
            self._keep(self.logits, step, rows, logits_NV.float(), shape)
        out = scores_RV[rows]
        if not self._pads:
            return out
        ended = self.finished[rows].to(out.device)
        padding = torch.full_like(out, float("-inf"))
        padding[:, self._generation.pad] = 0.0
        return torch.where(ended[:, None], padding, out)

    def output(self) -> GenerateOutput:
        """The result."""
        # Clones, because autograd does not accept tensors made in inference mode.
        return GenerateOutput(
            sequences=self.ids,
            scores=tuple(one.clone() for one in self.scores[: self.new]) if self._generation.scores else None,
            logits=tuple(one.clone() for one in self.logits[: self.new]) if self._generation.logits else None,
        )

    def _ids_at(self, step: int) -> Tensor:
        """``(R, S + step)``, with padding for sequences that have fewer tokens."""
        if step == self.new:
            return self.ids
        start = self.ids.shape[1] - self.new
        if step < self.new:
            return self.ids[:, : start + step]
        pad = self._generation.pad
        rows = [[*one.outputs[self.new : step]] for one in self.requests]
        more = [row + [pad] * (step - self.new - len(row)) for row in rows]
        return torch.cat([self.ids, torch.tensor(more, dtype=self.ids.dtype, device=self.ids.device)], dim=1)

    def _warped(self, scores_NV: Tensor) -> Tensor:
        """Apply temperature and truncation, as sampling does."""
        params = self._generation.params
        if params.temperature > 0:
            N, device = len(scores_NV), scores_NV.device
            floats = (params.temperature, params.top_p, params.min_p)
            temperature, top_p, min_p = (torch.full((N,), value, device=device) for value in floats)
            whole = torch.zeros(N, dtype=torch.int32, device=device)
            least = sampling.thresholds(
                scores_NV, sampling.Settings(temperature, whole + params.top_k, top_p, min_p, whole, whole)
            )
            scores_NV = (scores_NV / params.temperature).masked_fill(scores_NV < least[:, None], float("-inf"))
        return scores_NV.log_softmax(-1) if self._generation.renormalize else scores_NV

    @staticmethod
    def _keep(kept: list[Tensor], step: int, rows: Sequence[int], values_NV: Tensor, shape: tuple[int, int]) -> None:
        while len(kept) <= step:
            kept.append(values_NV.new_zeros(shape))
        kept[step][rows] = values_NV
