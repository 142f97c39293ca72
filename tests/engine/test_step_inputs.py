"""A step's plan as arrays, without a device."""

from __future__ import annotations

import random

import numpy as np
import pytest

from aria.engine.request import Request
from aria.engine.scheduler import Scheduler, StepPlan
from aria.engine.step_inputs import RowTracker, StepInputs
from tests.helpers.scheduling import S, request, scheduler, step

TABLE = 100


def inputs_of(plan: StepPlan, adapter_ids: list[int] | None = None, **settings) -> StepInputs:
    updates = RowTracker(8, TABLE).update(plan.requests)
    return StepInputs.of(plan, updates, adapter_ids or [0] * len(plan.requests), S, **settings)


def expected_tokens(plan: StepPlan, adapter_ids: list[int]) -> list[tuple[int, int, int]]:
    """Position, slot and adapter of each token, one at a time."""
    runs = [(one, one.computed - 1, one.computed) for one in plan.decodes]
    runs += [(chunk.request, chunk.start, chunk.start + chunk.count) for chunk in plan.chunks]
    return [
        (place, one.blocks[place // S] * S + place % S, adapter)
        for (one, start, stop), adapter in zip(runs, adapter_ids, strict=True)
        for place in range(start, stop)
    ]


def running(s: Scheduler, *lengths: int, **settings) -> list[Request]:
    made = [request(length, **settings) for length in lengths]
    for one in made:
        s.add(one)
    return made


def test_a_step_of_chunks_and_decodes():
    random.seed(0)
    for _ in range(50):
        s = scheduler(step_tokens=64, mixed_step_tokens=random.choice([16, 40]))
        running(s, *(random.randrange(1, 30) for _ in range(3)))
        step(s)
        running(s, *(random.randrange(1, 60) for _ in range(3)))
        while (plan := s.plan()) and not plan.chunks:
            for one in plan.sampling:
                s.append(one, 7)
        adapter_ids = [random.randrange(3) for _ in plan.requests]
        inputs, N = inputs_of(plan, adapter_ids), len(plan.decodes)
        tokens = expected_tokens(plan, adapter_ids)
        assert inputs.tokens == plan.tokens == len(tokens) and inputs.decodes == N
        assert inputs.column("positions").tolist() == [place for place, _, _ in tokens]
        assert inputs.column("slots").tolist() == [slot for _, slot, _ in tokens]
        assert inputs.column("adapter_ids").tolist() == [adapter for _, _, adapter in tokens] * any(adapter_ids)
        ids = [token for c in plan.chunks for token in c.request.tokens(c.start, c.start + c.count)]
        assert inputs.column("ids").tolist() == ids
        assert inputs.column("decode_rows").tolist() == [one.row for one in plan.decodes]
        assert inputs.column("chunk_rows").tolist() == [chunk.request.row for chunk in plan.chunks]
        spans = inputs.column("spans").reshape(-1, 3)
        assert spans[:, 1].tolist() == [chunk.count for chunk in plan.chunks] == list(inputs.chunk_lengths)
        assert spans[:, 2].tolist() == [chunk.start for chunk in plan.chunks] == list(inputs.chunk_pasts)
        assert (spans[:, 0] + N).tolist() == list(inputs.starts)
        sampled = inputs.column("sampled")
        assert inputs.samples == len(sampled) == len(plan.sampling)
        assert inputs.column("sampled_rows").tolist() == [one.row for one in plan.sampling]
        last = [one.computed - 1 for one in plan.sampling]
        assert inputs.column("sampled_positions").tolist() == last == inputs.column("positions")[sampled].tolist()


@pytest.mark.parametrize("adapters", [False, True])
def test_a_padded_step_of_decodes(adapters):
    s = scheduler()
    a, b, c = running(s, 5, 9, 2)
    step(s)
    plan = s.plan()
    inputs = inputs_of(plan, [0, 2, 1] if adapters else None, padded=4, padding_row=8)
    assert inputs.column("decode_rows").tolist() == [a.row, b.row, c.row, 8]
    assert inputs.column("positions").tolist() == [5, 9, 2, 0]
    assert inputs.column("adapter_ids").tolist() == ([0, 2, 1, 0] if adapters else [])
    assert (inputs.decodes, inputs.tokens, inputs.samples, inputs.decode_length) == (3, 4, 3, 10)
    assert not any(len(inputs.column(name)) for name in ("ids", "slots", "spans", "sampled", "chunk_rows"))


def test_a_padded_chunk():
    s = scheduler()
    [one] = running(s, 6)
    inputs = inputs_of(s.plan(), padded=16)
    assert inputs.column("positions").tolist() == [*range(6), *[0] * 10]
    assert inputs.column("slots").tolist() == [one.blocks[i // S] * S + i % S for i in range(6)] + [0] * 10
    assert inputs.column("ids").tolist() == [*one.prompt, *[0] * 10]
    assert inputs.column("spans").tolist() == [0, 16, 0] and inputs.chunk_lengths == (16,)
    assert inputs.chunk_pasts is None, "a graph reads it from the spans"
    assert inputs.column("sampled").tolist() == [5] and inputs.chunk_length == 6


def test_padding_has_to_fit():
    s = scheduler()
    running(s, 6, 3)
    plan = s.plan()
    with pytest.raises(AssertionError, match="single chunk"):
        inputs_of(plan, padded=16)
    with pytest.raises(AssertionError, match="9 tokens do not fit"):
        inputs_of(plan, padded=8)


def test_columns_are_aligned_and_do_not_overlap():
    s = scheduler()
    running(s, 5, 2)
    step(s)
    running(s, 7)
    inputs = inputs_of(s.plan(), [1, 2, 3])
    used = np.zeros(len(inputs.flat), dtype=int)
    for column in inputs.columns:
        assert column.start % 4 == 0
        used[column] += 1
    assert used.max() == 1 and len(inputs.flat) % 4 == 0


def test_rows_learn_only_what_is_new():
    s, rows = scheduler(), RowTracker(8, TABLE)
    [one] = running(s, 6)
    updates = rows.update(s.plan().requests)
    assert updates.requests == [one] and updates.blocks == one.blocks
    assert updates.places == [one.row * TABLE, one.row * TABLE + 1]
    s.append(one, 7)
    blocks = []
    for _ in range(S):
        updates = rows.update(s.plan().requests)
        assert not updates.requests
        blocks += updates.blocks
        s.append(one, 7)
    assert blocks == one.blocks[2:] and len(blocks) == 1
    rows.forget(one.row)
    assert rows.update([one]).blocks == one.blocks, "a row that was forgotten starts over"


def test_a_request_that_was_preempted_is_new_in_its_row():
    s, rows = scheduler(), RowTracker(8, TABLE)
    [one] = running(s, 6)
    rows.update(s.plan().requests)
    s.append(one, 7)
    row = one.row
    s._preempt(one)
    updates = rows.update(s.plan().requests)
    assert one.row == row and updates.requests == [one] and updates.blocks == one.blocks
