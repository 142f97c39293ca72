"""A step's plan as arrays: built in NumPy without a device, then copied to the device in one piece.

N sequences that decode, C chunks of prompts, R sequences that sample, T tokens of the step with padding, S tokens of a
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from aria.engine.request import Request
from aria.engine.scheduler import StepPlan

Part = TypeVar("Part")


class RowUpdates(NamedTuple):
    """What changes in the device's rows before a step."""

    requests: list[Request]
    """Requests that are new in their rows, whose sampling settings the device lacks."""
    places: list[int]
    """Indices into the block table, flattened, of blocks that the device lacks."""
    blocks: list[int]
    """Numbers of those blocks."""


class RowTracker:
    """Which request each row of the device's state serves, and how many of its blocks the device knows.

    Args:
        rows: number of rows.
        table_width: blocks of a row of the block table.
    """

    def __init__(self, rows: int, table_width: int):
        # By number: a row should not keep the images of a finished request in memory.
        self._served: list[tuple[int, int] | None] = [None] * rows
        self._known_blocks = [0] * rows
        self._table_width = table_width

    def update(self, requests: Sequence[Request]) -> RowUpdates:
        """Record the requests of the next step, and return what the device has to learn about them."""
        updates = RowUpdates([], [], [])
        for request in requests:
            row = row_of(request)
            # A request that was preempted and readmitted is a new one here, even in the same row.
            served = (request.id, request.runs)
            if self._served[row] != served:
                self._served[row] = served
                self._known_blocks[row] = 0
                updates.requests.append(request)
            known = self._known_blocks[row]
            added = len(request.blocks) - known
            if added > 0:
                start = row * self._table_width + known
                updates.places.extend(range(start, start + added))
                updates.blocks.extend(request.blocks[known:])
                self._known_blocks[row] += added
        return updates

    def forget(self, row: int) -> None:
        """Treat the row's request as a new one in the next step."""
        self._served[row] = None


class Columns(NamedTuple, Generic[Part]):
    """The parts of a step's array: slices of it, or what these give of a tensor on the device.

    Each begins on a multiple of 16 bytes, because Triton compiles another kernel for pointers that do not.
    """

    decode_rows: Part
    """``(N,)``: rows of the sequences that decode. In a step without chunks ``(T,)``, padding included."""
    chunk_rows: Part
    """``(C,)``: rows of the sequences that have chunks."""
    ids: Part
    """``(T - N,)``: token ids of the chunks. The last tokens of sequences that decode are on the device."""
    positions: Part
    """``(T,)``: each token's position in its sequence."""
    slots: Part
    """``(T,)``: each token's place in the KV cache, ``block * S + offset``. Padding writes to block 0."""
    spans: Part
    """``(3 * C,)``: of each chunk its first token, counted among those of all chunks, its length, and the number of
    tokens before it."""
    sampled: Part
    """``(R,)``: indices of the tokens that are sampled from."""
    sampled_rows: Part
    """``(R,)``: rows of their sequences."""
    sampled_positions: Part
    """``(R,)``: their positions in their sequences."""
    adapter_ids: Part
    """``(T,)``: each token's adapter, 0 for the base model; empty if the step uses no adapter."""


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Everything that the device needs to compute a step, apart from images.

    A step without chunks samples from all its sequences, so it has no ``sampled`` columns; and neither ``ids`` nor
    ``slots``, which the device works out.
    """

    flat: npt.NDArray[np.int32]
    """All columns end to end."""
    columns: Columns[slice]
    updates: RowUpdates
    decodes: int
    """N, without padding."""
    tokens: int
    """T."""
    starts: tuple[int, ...]
    """First token of each chunk, counted among those of the step."""
    chunk_lengths: tuple[int, ...]
    chunk_pasts: tuple[int, ...] | None
    """Tokens before each chunk. None in a padded step, because a CUDA graph reads them from ``spans``."""
    samples: int
    """R; in a step without chunks N."""
    decode_length: int
    """Tokens of the longest sequence that decodes, 0 without any."""
    chunk_length: int
    """The same of the sequences that have chunks, up to the ends of these."""
    adapted: bool
    """Whether any token has an adapter."""

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        updates: RowUpdates,
        adapter_ids: Sequence[int],
        block_size: int,
        *,
        padded: int = 0,
        padding_row: int = 0,
    ) -> StepInputs:
        """Lay out a plan.

        Args:
            plan: the step, with all requests advanced past it.
            updates: of :meth:`RowTracker.update` for its requests.
            adapter_ids: of ``plan.requests``, in their order; 0 is the base model.
            block_size: S.
            padded: T of a step that runs as a CUDA graph: a step of decodes alone, or of a single chunk.
            padding_row: row that padding of a step of decodes reads and writes.
        """
        N, chunks = len(plan.decodes), plan.chunks
        assert not padded or padded >= plan.tokens, f"{plan.tokens} tokens do not fit into a step of {padded}"
        assert not (padded and chunks) or (len(chunks) == 1 and not N), "only a single chunk can be padded"
        T, adapted = padded or plan.tokens, any(adapter_ids)
        starts = tuple(accumulate((chunk.count for chunk in chunks), initial=N))[: len(chunks)]
        lengths = (T,) if padded and chunks else tuple(chunk.count for chunk in chunks)
        sampling = plan.sampling if chunks else []
        R = len(sampling)
        columns, size = _layout(
            decode_rows=N if chunks else T, chunk_rows=len(chunks), ids=T - N if chunks else 0, positions=T,
            slots=T if chunks else 0, spans=3 * len(chunks), sampled=R, sampled_rows=R, sampled_positions=R,
            adapter_ids=T if adapted else 0,
        )  # fmt: skip
        flat = np.zeros(size, dtype=np.int32)
        step = cls(
            flat=flat,
            columns=columns,
            updates=updates,
            decodes=N,
            tokens=T,
            starts=starts,
            chunk_lengths=lengths,
            chunk_pasts=None if padded else tuple(chunk.start for chunk in chunks),
            samples=R if chunks else N,
            decode_length=max((request.computed for request in plan.decodes), default=0),
            chunk_length=max((chunk.start + chunk.count for chunk in chunks), default=0),
            adapted=adapted,
        )
        step._fill_decodes(plan, adapter_ids[:N], padding_row)
        if chunks:
            step._fill_chunks(plan, adapter_ids[N:], block_size)
            sampled = [start + c.count - 1 for c, start in zip(chunks, starts, strict=True) if c.samples]
            flat[columns.sampled] = [*range(N), *sampled]
            flat[columns.sampled_rows] = [row_of(request) for request in sampling]
            flat[columns.sampled_positions] = [request.computed - 1 for request in sampling]
        return step

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """One column, as a view."""
        part: slice = getattr(self.columns, name)
        return self.flat[part]

    def _fill_decodes(self, plan: StepPlan, adapter_ids: Sequence[int], padding_row: int) -> None:
        N, decodes, columns = self.decodes, plan.decodes, self.columns
        rows = self.flat[columns.decode_rows]
        rows[:N] = [row_of(request) for request in decodes]
        rows[N:] = padding_row
        self.flat[columns.positions][:N] = [request.computed - 1 for request in decodes]
        if self.adapted:
            self.flat[columns.adapter_ids][:N] = adapter_ids

    def _fill_chunks(self, plan: StepPlan, adapter_ids: Sequence[int], S: int) -> None:
        N, columns = self.decodes, self.columns
        ids, positions, slots, spans, adapters = (
            self.flat[column]
            for column in (columns.ids, columns.positions, columns.slots, columns.spans, columns.adapter_ids)
        )
        # One by one: the last block of a long answer is not worth an array of all of them.
        slots[:N] = [
            request.blocks[(request.computed - 1) // S] * S + (request.computed - 1) % S for request in plan.decodes
        ]
        self.flat[columns.chunk_rows] = [row_of(chunk.request) for chunk in plan.chunks]
        for i, (chunk, start) in enumerate(zip(plan.chunks, self.starts, strict=True)):
            stop, end = start + chunk.count, chunk.start + chunk.count
            places = np.arange(chunk.start, end, dtype=np.int32)
            first = chunk.start // S
            blocks = np.array(chunk.request.blocks[first : -(-end // S)], dtype=np.int32)
            ids[start - N : stop - N] = chunk.request.tokens(chunk.start, end)
            positions[start:stop] = places
            slots[start:stop] = blocks[places // S - first] * S + places % S
            spans[3 * i : 3 * i + 3] = start - N, self.chunk_lengths[i], chunk.start
            if self.adapted:
                adapters[start:stop] = adapter_ids[i]


def row_of(request: Request) -> int:
    """The row of a running request."""
    assert request.row is not None, f"request {request.id} runs without a row"
    return request.row


def aligned(count: int) -> int:
    """A number of int32 values, rounded up to a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _layout(**sizes: int) -> tuple[Columns[slice], int]:
    """Columns of these sizes end to end, and the size of all of them."""
    slices, start = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(start, start + size)
        start += aligned(size)
    return Columns(**slices), start
