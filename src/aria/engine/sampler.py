"""`SamplerState`: per-row sampling settings on the device, and logits -> tokens.

N sequences of a step, R rows (places of running requests), V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aria import ops
from aria.engine.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: logits divided by them would leave the range of float32."""

# A row of the table: temperature, top_k, top_p, min_p, seed (as aria.ops.sampling.Settings reads them), then the
# repetition, frequency and presence penalties, and the position from which the answer may end.
_ROW = struct.Struct("<fiffqfffi")
_PENALTIES = slice(6, 9)
_MAY_END = 9
_INT32 = 2**31 - 1


class EndText(NamedTuple):
    """Tokens that lead to a text that ends answers, if the vocabulary has no single token for it.

    Each is a bool tensor ``(V,)``. A text counts as begun by its first two characters; the first alone may be common,
    so it stays allowed.
    """

    begins: Tensor
    """The token contains the text, or ends with two or more of its first characters."""
    opens: Tensor
    """The token ends with the text's first character."""
    follows: Tensor
    """The token continues the text after its first character."""

    @staticmethod
    def of(text: str, tokens: Sequence[bytes], device: torch.device) -> EndText:
        """Find the tokens in a vocabulary.

        Args:
            text: At least two ASCII characters.
            tokens: Bytes of each of the V tokens.
            device: Device of the logits.
        """
        data = text.encode("ascii")
        starts = tuple(data[:n] for n in range(2, len(data)))
        columns = (
            [data in token or token.endswith(starts) for token in tokens],
            [token.endswith(data[:1]) for token in tokens],
            [bool(token) and (data[1:].startswith(token) or token.startswith(data[1:])) for token in tokens],
        )
        return EndText(*(torch.tensor(column, device=device) for column in columns))


class SamplerState:
    """Sampling settings of each row, and counts of sampled tokens for penalties.

    Everything is on the device, so that a step can start before the host knows the tokens of the previous one.

    Args:
        max_rows: R.
        vocab_size: V.
        device: Device of the logits.
        banned_token_ids: Tokens that are never sampled.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, banned_token_ids: Collection[int] = ()):
        self._device = device
        self._vocab_size = vocab_size
        self._banned = torch.tensor(sorted(banned_token_ids), dtype=torch.int64, device=device)
        self._table = self._packed(SamplingParams(), 0).repeat(max_rows, 1).to(device)
        # Counters of the sampling kernel; one set per engine, because engines on separate streams run concurrently.
        self._arrivals = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._penalized: set[int] = set()
        self._biased: set[int] = set()
        # (R, V), once a row needs it: twice the count of a token in the answer, plus one if it is in the prompt.
        self._counts: Tensor | None = None
        # (R, maximum number of biases of a row), once a row needs them.
        self._bias_ids: Tensor | None = None
        self._bias_values: Tensor | None = None
        # Rows that may not end yet -> the position from which they may. (R, maximum number of end tokens), once needed.
        self._may_end: dict[int, int] = {}
        self._end_ids: Tensor | None = None
        self._end_text: EndText | None = None
        self._end_text_rows = torch.zeros(max_rows, dtype=torch.bool, device=device)

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int] = (),
        *,
        end_ids: Collection[int] = (),
        end_text: EndText | None = None,
    ) -> None:
        """Assign a row to a request, a new one or one that resumes after preemption.

        Args:
            row: Below R.
            params: How to sample.
            seed: 0 to 2**63 - 1, in place of ``params.seed``.
            prompt_ids: Tokens of the prompt.
            output_ids: Tokens of the answer so far.
            end_ids: Tokens that are not sampled before ``params.min_tokens``.
            end_text: Text that is not sampled before ``params.min_tokens``; the same one for all rows.
        """
        self.clear_row(row)
        may_end = 0
        if params.min_tokens and (end_ids or end_text is not None):
            may_end = min(len(prompt_ids) + params.min_tokens, _INT32)
            self._hold_end(row, may_end, end_ids, end_text)
        self._send(self._packed(params, seed, may_end), self._table[row])
        if params.logit_bias:
            self._set_bias(row, params.logit_bias)
        if params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty:
            self._penalized.add(row)
            if self._counts is None:
                shape = (self._table.shape[0], self._vocab_size)
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            counts = torch.zeros(self._vocab_size, dtype=torch.int32)
            counts[torch.tensor(prompt_ids, dtype=torch.int64)] = 1
            outputs = torch.tensor(output_ids, dtype=torch.int64)
            counts.index_add_(0, outputs, torch.full_like(outputs, 2, dtype=torch.int32))
            self._send(counts, self._counts[row])

    def clear_row(self, row: int) -> None:
        """Clear a row whose request has ended."""
        self._penalized.discard(row)
        self._may_end.pop(row, None)
        if row in self._biased:
            assert self._bias_values is not None, "a row with biases has a tensor of them"
            self._biased.discard(row)
            self._bias_values[row].zero_()

    def sample(self, logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor) -> Tensor:
        """Sample a token for each sequence.

        On CUDA nothing here waits for the host, so it can be part of a CUDA graph. If :meth:`extras` is true, call
        :meth:`adjust_logits` before and :meth:`count` after.

        Args:
            logits_NV: Any floating dtype; not modified.
            rows_N: int32.
            positions_N: int32, position of each token to sample; seed and position determine the noise.

        Returns:
            int64 ``(N,)``.
        """
        return ops.sample(logits_NV, rows_N, positions_N, self._table, self._banned, self._arrivals)

    def extras(self, rows: Sequence[int], positions: Sequence[int]) -> bool:
        """Whether any of these rows has penalties or biases, or may not end yet.

        Args:
            rows: Below R.
            positions: Position of the token to sample in each sequence.
        """
        waiting = any(place < self._may_end.get(row, 0) for row, place in zip(rows, positions, strict=True))
        return waiting or not (self._penalized.isdisjoint(rows) and self._biased.isdisjoint(rows))

    def adjust_logits(self, logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor, last_N: Tensor) -> Tensor:
        """Apply penalties, then biases, then -inf to tokens that would end an answer too early: float32 ``(N, V)``.

        The repetition penalty divides positive logits of tokens in prompt or answer, and multiplies negative ones
        (Keskar et al., 2019); frequency and presence are those of OpenAI's interface, over the answer alone.

        Args:
            logits_NV: Any floating dtype; not modified.
            rows_N: int32.
            positions_N: int32, position of each token to sample.
            last_N: int64, the token before it.
        """
        logits_NV = logits_NV.float()
        if self._counts is not None and self._penalized:
            repetition, frequency, presence = (
                self._table.view(torch.float32)[:, _PENALTIES].index_select(0, rows_N)[:, :, None].unbind(1)
            )
            counts_NV = self._counts.index_select(0, rows_N)
            # Rows without penalties have stale counts; penalties of 1 and 0 leave their logits unchanged.
            repetition = torch.where(counts_NV > 0, repetition, 1.0)
            logits_NV = torch.where(logits_NV > 0, logits_NV / repetition, logits_NV * repetition)
            answered = counts_NV >> 1
            logits_NV = logits_NV - frequency * answered - presence * (answered > 0)
        if self._bias_ids is not None and self._bias_values is not None and self._biased:
            ids, values = (x.index_select(0, rows_N) for x in (self._bias_ids, self._bias_values))
            logits_NV = logits_NV.scatter_add(1, ids, values)
        return self._without_ends(logits_NV, rows_N, positions_N, last_N) if self._may_end else logits_NV

    def _without_ends(self, logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor, last_N: Tensor) -> Tensor:
        early_N1 = (positions_N < self._table[:, _MAY_END].index_select(0, rows_N))[:, None]
        if self._end_ids is not None:
            ids = self._end_ids.index_select(0, rows_N)
            values = torch.where(early_N1 & (ids >= 0), float("-inf"), 0.0)
            logits_NV = logits_NV.scatter_add(1, ids.clamp(min=0), values)
        if self._end_text is not None:
            begins, opens, follows = self._end_text
            early_N1 = early_N1 & self._end_text_rows.index_select(0, rows_N)[:, None]
            ends_NV = begins | (opens.index_select(0, last_N)[:, None] & follows)
            logits_NV = logits_NV.masked_fill(early_N1 & ends_NV, float("-inf"))
        return logits_NV

    def count(self, rows_N: Tensor, tokens_N: Tensor) -> None:
        """Count sampled tokens for the penalties of later steps."""
        if self._counts is not None and self._penalized:
            twice = torch.full_like(tokens_N, 2, dtype=torch.int32)
            self._counts.index_put_((rows_N.long(), tokens_N), twice, accumulate=True)

    def logprobs(self, logits_NV: Tensor, tokens_N: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities before temperature and truncation.

        Returns:
            Log-probabilities ``(N,)`` of the sampled tokens; ids ``(N, k)`` of the most likely tokens, in descending
            order; their log-probabilities ``(N, k)``. Banned tokens have probability 0.
        """
        logprobs_NV = logits_NV.float().index_fill(-1, self._banned, float("-inf")).log_softmax(-1)
        chosen = logprobs_NV.gather(1, tokens_N[:, None])[:, 0]
        values, ids = logprobs_NV.topk(min(k, self._vocab_size), dim=-1)
        return chosen, ids, values

    def _packed(self, params: SamplingParams, seed: int, may_end: int = 0) -> Tensor:
        """A row of the table, int32."""
        greedy = params.temperature < GREEDY_BELOW or params.top_k == 1 or params.top_p == 0
        packed = _ROW.pack(
            0.0 if greedy else params.temperature,
            params.top_k if params.top_k < self._vocab_size else 0,
            params.top_p,
            params.min_p,
            seed,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            may_end,
        )
        return torch.frombuffer(bytearray(packed), dtype=torch.int32)

    def _set_bias(self, row: int, bias: Mapping[int, float]) -> None:
        assert max(bias) < self._vocab_size, f"a bias for token {max(bias)}, which is not in the vocabulary"
        self._bias_ids = self._wide_enough(self._bias_ids, len(bias), torch.int64)
        self._bias_values = self._wide_enough(self._bias_values, len(bias), torch.float32)
        free = self._bias_ids.shape[1] - len(bias)
        self._send(torch.tensor([*bias, *[0] * free]), self._bias_ids[row])
        self._send(torch.tensor([*bias.values(), *[0.0] * free], dtype=torch.float32), self._bias_values[row])
        self._biased.add(row)

    def _hold_end(self, row: int, may_end: int, end_ids: Collection[int], end_text: EndText | None) -> None:
        self._may_end[row] = may_end
        self._end_ids = self._wide_enough(self._end_ids, len(end_ids), torch.int64)
        free = self._end_ids.shape[1] - len(end_ids)
        self._send(torch.tensor([*sorted(end_ids), *[-1] * free], dtype=torch.int64), self._end_ids[row])
        if end_text is not None:
            self._end_text = end_text
        self._end_text_rows[row] = end_text is not None

    def _wide_enough(self, columns: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
        """Widen ``(R, a power of two)`` to at least ``count`` columns, filled with zeros."""
        known = 0 if columns is None else columns.shape[1]
        width = max(known, 1 << max(count - 1, 0).bit_length())
        if columns is None:
            return torch.zeros(self._table.shape[0], width, dtype=dtype, device=self._device)
        return torch.nn.functional.pad(columns, (0, width - known))

    def _send(self, values: Tensor, target: Tensor) -> None:
        """Copy to the device without waiting for it, in the order of the stream."""
        target.copy_(values.pin_memory() if self._device.type == "cuda" else values, non_blocking=True)


def mask_logits(logits_NV: Tensor, places_G: Tensor, masks_GW: Tensor) -> Tensor:
    """Logits with -inf for tokens that are not allowed, in the sequences that have a mask.

    Args:
        logits_NV: Any floating dtype; not modified.
        places_G: int64, indices of the sequences with a mask, below N.
        masks_GW: int32, one bit per token, lowest bit first; 1 allows it.
    """
    bits = torch.arange(32, dtype=torch.int32, device=masks_GW.device)
    allowed_GV = (masks_GW[:, :, None] >> bits & 1).flatten(1)[:, : logits_NV.shape[1]] > 0
    kept_GV = logits_NV.index_select(0, places_G).masked_fill(~allowed_GV, float("-inf"))
    return logits_NV.index_copy(0, places_G, kept_GV)
