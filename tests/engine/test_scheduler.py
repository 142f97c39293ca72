"""The scheduler's guarantees, one by one. `test_scheduler_simulation.py` checks all of them together."""

from __future__ import annotations

import random

import pytest

from aria.engine.request import Request, Status
from aria.processor.image_inputs import ImageSpan
from tests.helpers.scheduling import S, chunks, request, scheduler, step


def test_chunked_prefill_in_whole_blocks_then_decode():
    s, one = scheduler(step_tokens=9), request(18, max_tokens=3)
    s.add(one)
    assert (s.waiting, s.running, s.idle) == (1, 0, False)
    assert chunks(step(s)) == [(one, 0, 8, False)]
    assert chunks(step(s)) == [(one, 8, 8, False)]
    assert chunks(step(s)) == [(one, 16, 2, True)]
    assert (one.computed, one.known, len(one.blocks), one.row) == (18, 19, 5, 0)
    plan = step(s)
    assert plan.decodes == [one] and not plan.chunks and one.computed == 19 and plan.tokens == 1
    step(s)
    assert one.status is Status.FINISHED and one.outputs == [7, 7, 7]
    assert s.idle and not s.plan()


def test_prefills_share_a_step_and_decodes_reduce_its_budget():
    s = scheduler(step_tokens=64, mixed_step_tokens=17)
    first, second, long = request(5), request(30), request(60)
    for one in (first, second, long):
        s.add(one)
    assert chunks(step(s)) == [(first, 0, 5, True), (second, 0, 30, True), (long, 0, 28, False)]
    plan = step(s)
    assert plan.decodes == [first, second]
    # Of 17 tokens two are for the decodes; of the rest whole blocks.
    assert chunks(plan) == [(long, 28, 12, False)]


def test_a_mixed_step_prefills_at_least_one_block():
    s = scheduler(mixed_step_tokens=1)
    s.add(request(5))
    step(s)
    long = request(11)
    s.add(long)
    assert chunks(step(s)) == [(long, 0, S, False)]


def test_planning_one_step_ahead_of_the_tokens():
    s, one = scheduler(), request(4, max_tokens=3)
    s.add(one)
    assert s.plan().chunks[0].samples and one.pending == 1
    assert s.plan().decodes == [one] and one.pending == 2 and one.computed == 5
    s.append(one, 1)
    assert s.plan().decodes == [one] and one.pending == 2
    s.append(one, 2)
    # Three tokens are there or on their way.
    assert not s.plan() and one.full and not one.over
    s.check()
    s.append(one, 3)
    s.finish(one)
    assert one.outputs == [1, 2, 3] and s.pool.used == 0


def test_tokens_after_the_end_are_dropped():
    s, one = scheduler(), request(4)
    s.add(one)
    s.plan()
    s.plan()
    s.append(one, 1)
    s.finish(one)
    s.append(one, 2)
    assert one.outputs == [1] and s.pool.used == 0 and s.idle


def test_priority_then_arrival_decides():
    s = scheduler(max_rows=2)
    late, early, important = request(4), request(4), request(4, priority=-1)
    for one in (early, late, important):
        s.add(one)
    assert [chunk.request for chunk in s.plan().chunks] == [important, early]
    assert (s.running, s.waiting) == (2, 1)
    s.cancel(early)
    assert [chunk.request for chunk in s.plan().chunks] == [late]


def test_a_prompt_of_higher_priority_precedes_a_running_prefill():
    s, long, urgent = scheduler(step_tokens=8), request(32), request(8, priority=-1)
    s.add(long)
    step(s)
    s.add(urgent)
    assert chunks(step(s)) == [(urgent, 0, 8, True)]
    assert chunks(step(s)) == [(long, 8, 4, False)], "the rest of a mixed step"


def test_a_request_waiting_for_a_row_does_not_delay_running_ones():
    s, long, urgent = scheduler(max_rows=1, step_tokens=8), request(16), request(4, priority=-1)
    s.add(long)
    step(s)
    s.add(urgent)
    assert chunks(step(s)) == [(long, 8, 8, True)]


def test_nothing_overtakes_a_large_request_at_the_head():
    s = scheduler(blocks=10)
    running, large, small = request(16, max_tokens=6), request(28), request(4)
    for one in (running, large, small):
        s.add(one)
    for _ in range(6):
        assert small.status is large.status is Status.WAITING or running.over
        step(s)
    assert [chunk.request for chunk in step(s).chunks] == [large, small]


@pytest.mark.parametrize(("tokens", "fits"), [(28, True), (29, False)])
def test_admission_reserves_blocks_for_prefills_and_growth(tokens, fits):
    s = scheduler(blocks=20, step_tokens=16, watermark=0.1)
    s.add(request(41, max_tokens=20))
    step(s)
    # Of 20 blocks 11 are the first's, though it has taken only 4, and 2 stay for growth.
    s.add(other := request(tokens, priority=-1))
    s.plan()
    assert other.status is (Status.RUNNING if fits else Status.WAITING)


def test_blocks_shared_with_a_running_request_cost_nothing():
    s, tokens = scheduler(blocks=8), tuple(range(24))
    s.add(first := request((*tokens, 1), max_tokens=4))
    step(s)
    s.add(second := request((*tokens, 2), max_tokens=4))
    # Seven of eight blocks are taken, and the second needs one of its own.
    assert chunks(step(s)) == [(second, 24, 1, True)]
    assert s.pool.available == 0 and first.blocks[:6] == second.blocks[:6]


def test_a_single_request_may_take_the_whole_cache():
    s, one = scheduler(blocks=5, watermark=0.5), request(17, max_tokens=4)
    s.add(one)
    while not s.idle:
        step(s)
    assert one.outputs == [7] * 4 and s.preemptions == 0


def test_a_request_that_can_never_fit_is_rejected():
    s = scheduler(blocks=5)
    with pytest.raises(ValueError, match=r"17 tokens and an answer of up to 5 need 6 blocks .* has 5 of 4 tokens; ask"):
        s.add(request(17, max_tokens=5))
    assert s.idle


def test_preemption_takes_the_last_request_and_loses_nothing():
    s = scheduler(blocks=6)
    first, second = request(8, max_tokens=12), request(8, max_tokens=12)
    s.add(first)
    s.add(second)
    while not s.preemptions:
        step(s)
    assert (second.blocks, second.row, second.computed) == ([], None, 0) and second.status is Status.WAITING
    assert second.known == 13, "a prompt of 8 and 5 tokens, when the first asks for its fourth block"
    while not s.idle:
        step(s)
    assert s.preemptions == 1
    assert (first.runs, second.runs) == (1, 2)
    assert second.cached_tokens == 0, "what it finds of its own when it comes back does not count"
    assert first.outputs == second.outputs == [7] * 12


def test_the_last_request_preempts_itself():
    s = scheduler(blocks=6)
    last, first = request(8, max_tokens=12, priority=1), request(11, max_tokens=8)
    s.add(last)
    s.add(first)
    while not s.preemptions:
        plan = step(s)
    assert last.status is Status.WAITING and plan.decodes == [first]


def test_preemption_waits_for_a_pending_token():
    s = scheduler(blocks=4)
    first, second = request(8), request(8)
    s.add(first)
    s.add(second)
    assert len(s.plan().chunks) == 2
    blocks, computed = list(first.blocks), first.computed
    plan = s.plan()
    assert plan.drain and not plan and not s.preemptions
    assert (first.blocks, first.computed, first.pending) == (blocks, computed, 1), "nothing was planned"
    s.append(first, 1)
    s.append(second, 2)
    plan = s.plan()
    assert second.status is Status.WAITING and plan.decodes == [first] and second.outputs == [2]
    s.check()


def test_a_prefill_waits_for_decodes_that_took_its_blocks():
    s = scheduler(blocks=12, mixed_step_tokens=8)
    answers = [request(4 + i, max_tokens=5 if i else 4) for i in range(4)]
    for one in answers:
        s.add(one)
    step(s)
    s.add(long := request(16, max_tokens=1))
    # Each step an answer takes another block, until the prompt, admitted with room for four, finds none for its third.
    assert [chunks(step(s)) for _ in range(5)] == [
        [(long, 0, S, False)],
        [(long, 4, S, False)],
        [],
        [(long, 8, S, False)],
        [(long, 12, S, True)],
    ]
    assert s.idle and s.preemptions == 0


def test_prefix_caching_leaves_at_least_one_token():
    s, tokens = scheduler(), tuple(range(16))
    s.add(first := request(tokens, max_tokens=1))
    step(s)
    s.add(same := request(tokens, max_tokens=1))
    assert chunks(step(s)) == [(same, 12, 4, True)]
    s.add(longer := request((*tokens, 1), max_tokens=1))
    assert chunks(step(s)) == [(longer, 16, 1, True)]
    s.add(changed := request((*tokens[:6], 99, *tokens[7:]), max_tokens=1))
    assert chunks(step(s)) == [(changed, 4, 12, True)]
    s.add(adapted := request(tokens, max_tokens=1, adapter="other"))
    assert chunks(step(s)) == [(adapted, 0, 16, True)]
    assert s.prefix_tokens == 12 + 16 + 4
    assert (first.cached_tokens, same.cached_tokens, adapted.cached_tokens) == (0, 12, 0)


def test_prefix_caching_includes_answers():
    s = scheduler()
    s.add(first := request(6, max_tokens=7))
    while not s.idle:
        step(s)
    # The last token was never read.
    s.add(turn := request((*first.prompt, *first.outputs, 5)))
    assert chunks(step(s)) == [(turn, 12, 2, True)]


def test_a_block_is_published_when_all_its_tokens_are_known():
    s = scheduler()
    s.add(first := request(6, max_tokens=6))
    for _ in range(3):
        s.plan()
    assert first.computed == 8 and first.published == 1
    s.append(first, 7)
    assert first.known == 7 and first.published == 1
    s.append(first, 7)
    assert first.known == 8 and first.published == 2
    s.add(same := request((*first.prompt, 7, 7, 1)))
    assert [(chunk.request, chunk.start) for chunk in s.plan().chunks] == [(same, 8)]


def test_several_answers_to_one_prompt_prefill_it_once():
    s = scheduler(step_tokens=16)
    leader = request(22, max_tokens=2)
    answers = [leader, *(request(leader.prompt, max_tokens=2, leader=leader) for _ in range(2))]
    for one in answers:
        s.add(one)
    assert chunks(step(s)) == [(leader, 0, 16, False)]
    assert chunks(step(s)) == [(leader, 16, 6, True), *((follower, 20, 2, True) for follower in answers[1:])]
    assert len({one.blocks[0] for one in answers}) == 1 and len({one.blocks[-1] for one in answers}) == 3


def test_prefix_caching_depends_on_image_content_and_position():
    s, tokens = scheduler(), (9,) * 12

    def read(*images: ImageSpan) -> int:
        """Number of tokens found in the prefix cache."""
        s.add(one := request(tokens, max_tokens=1, images=images))
        step(s)
        return one.cached_tokens

    assert read() == 0
    assert read(ImageSpan(5, 4, b"a")) == 4
    assert read(ImageSpan(5, 4, b"a")) == 8
    assert read(ImageSpan(5, 4, b"b")) == 4
    assert read(ImageSpan(6, 4, b"a")) == 4
    assert read(ImageSpan(5, 2, b"a"), ImageSpan(7, 2, b"a")) == 4
    assert read(ImageSpan(9, 3, b"a")) == 8, "what lies behind the second block makes no difference to it"
    # Without a key nothing from its start on is kept.
    assert read(ImageSpan(5, 2, None)) == read(ImageSpan(5, 2, None)) == 4


def test_images_between_two_places():
    a, b, c = ImageSpan(2, 3, b"a"), ImageSpan(5, 1, b"b"), ImageSpan(8, 4, b"c")
    one = request(13, images=(a, b, c))
    assert one.images_between(0, 13) == (a, b, c)
    assert one.images_between(0, 2) == () and one.images_between(0, 3) == (a,)
    assert one.images_between(4, 6) == (a, b) and one.images_between(5, 6) == (b,)
    assert one.images_between(6, 8) == () and one.images_between(11, 12) == (c,)
    for bad in ((b, a), (a, ImageSpan(4, 2, b"")), (ImageSpan(12, 2, b""),), (ImageSpan(3, 0, b""),)):
        with pytest.raises(AssertionError, match="image"):
            request(13, images=bad)


def test_tokens_continue_from_prompt_to_outputs():
    one = request((1, 2, 3))
    one.outputs += [4, 5]
    for start in range(6):
        for stop in range(start, 6):
            assert list(one.tokens(start, stop)) == [1, 2, 3, 4, 5][start:stop]


@pytest.mark.parametrize("when", ["waiting", "reading", "under way", "decoding", "over"])
def test_cancelling_at_any_moment(when):
    s, one, other = scheduler(step_tokens=8), request(12, max_tokens=4), request(4, max_tokens=4)
    s.add(one)
    s.add(other)
    for _ in range({"waiting": 0, "reading": 1, "under way": 1, "decoding": 3, "over": 10}[when]):
        step(s)
    if when == "under way":
        s.plan()
        assert one.pending == 1
    s.cancel(one)
    assert one.status is (Status.FINISHED if when == "over" else Status.CANCELLED)
    s.check()
    if when == "under way":
        s.append(one, 7)
        s.append(other, 7)
    assert len(one.outputs) == {"decoding": 2, "over": 4}.get(when, 0)
    while not s.idle:
        step(s)
    assert other.outputs == [7] * 4 and s.pool.used == 0
    s.cancel(one)


def test_the_queue_stays_in_order_when_requests_leave():
    s, rng = scheduler(max_rows=1), random.Random(0)
    requests = [request(1, max_tokens=1, priority=rng.randrange(50)) for _ in range(1000)]
    for one in requests:
        s.add(one)
    for one in requests[:900]:
        s.cancel(one)
    order = []
    while not s.idle:
        order += [chunk.request for chunk in step(s).chunks]
    assert order == sorted(requests[900:], key=lambda one: (one.priority, one.arrival))


def test_cancelled_requests_do_not_accumulate_in_the_queue():
    s = scheduler(blocks=4)
    s.add(request(12, max_tokens=4))
    step(s)
    s.add(request(16, max_tokens=1))
    for _ in range(1000):
        s.add(one := request(1))
        s.cancel(one)
    assert s.waiting == 1 and len(s._queue) < 200
    s.check()


def test_planning_does_not_depend_on_the_length_of_the_queue(monkeypatch):
    """Counted in accesses to waiting requests, because times are not reliable."""

    def looks(waiting: int) -> int:
        s = scheduler(max_rows=4)
        for _ in range(4):
            s.add(request(4))
        step(s)
        for _ in range(waiting):
            s.add(request(4))
        seen = 0
        compare = Request.__lt__

        def counted(one: Request, other: Request) -> bool:
            nonlocal seen
            seen += 1
            return compare(one, other)

        monkeypatch.setattr(Request, "__lt__", counted)
        for _ in range(5):
            s.plan()
        monkeypatch.undo()
        return seen

    assert looks(5000) == looks(5)
