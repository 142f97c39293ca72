"""Step budgets: long prompts beside short ones, image patches, and the blocks that admission reserves."""

from __future__ import annotations

import random

import pytest

from aria.engine.blocks import BlockPool
from aria.engine.request import Request, Status
from aria.engine.scheduler import Scheduler
from aria.processor.image_inputs import ImageSpan
from tests.helpers.scheduling import S, chunks, request, scheduler, step


def decoding(s: Scheduler, count: int = 1) -> list[Request]:
    """Requests that decode for long, so that steps are mixed."""
    decodes = [request(4, max_tokens=200) for _ in range(count)]
    for one in decodes:
        s.add(one)
    step(s)
    return decodes


def test_a_long_prompt_leaves_half_of_each_step_to_later_ones():
    s = scheduler(blocks=200, mixed_step_tokens=33)
    decoding(s)
    s.add(long := request(110))
    assert chunks(step(s)) == [(long, 0, 32, False)], "alone it gets the whole step"
    first, second, third = request(8), request(7), request(8)
    for one in (first, second, third):
        s.add(one)
    # 78 tokens are more than two steps of 32. The third finds one token left of half a step, which is no block.
    assert chunks(step(s)) == [(first, 0, 8, True), (second, 0, 7, True), (long, 32, 16, False)]
    # 62 are more than two of 30, because two more decode; 42 are not.
    assert chunks(step(s)) == [(third, 0, 8, True), (long, 48, 20, False)]
    s.add(fourth := request(8))
    assert chunks(step(s)) == [(long, 68, 28, False)]
    assert chunks(step(s)) == [(long, 96, 14, True), (fourth, 0, 8, True)]


def test_a_step_without_decodes_is_shared_in_the_same_way():
    s, long, short = scheduler(step_tokens=16), request(40), request(5)
    s.add(long)
    s.add(short)
    assert chunks(step(s)) == [(short, 0, 5, True), (long, 0, 8, False)]


def test_short_prompts_wait_at_most_two_steps_for_long_ones():
    s = scheduler(blocks=2000, max_rows=100, mixed_step_tokens=65)
    decoding(s)
    long = [request(600) for _ in range(3)]
    for one in long:
        s.add(one)
    waits: list[int] = []
    arrived: dict[Request, int] = {}
    while not all(one.outputs for one in long):
        s.add(short := request(12, max_tokens=1))
        arrived[short] = len(waits)
        step(s)
        waits.append(max(len(waits) - at for one, at in arrived.items() if not one.over or one is short))
    assert max(waits) <= 2 and waits.count(0) > len(waits) / 2
    assert len(waits) < 50, "1800 tokens at 64 less 12 a step"
    answered = [len(one.outputs) for one in long]
    assert answered == sorted(answered, reverse=True), "the first is done first"


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones():
    s = scheduler(blocks=400, max_rows=50, mixed_step_tokens=33)
    decoding(s)
    s.add(long := request(320))
    steps = 0
    while not long.outputs:
        for _ in range(4):
            s.add(request(12, max_tokens=1))
        step(s)
        steps += 1
    # Half of 32 tokens a step until 64 are left, then all of them.
    assert steps == 256 // 16 + 2


def test_only_prompts_of_its_own_priority_share_a_long_ones_step():
    s = scheduler(blocks=200, mixed_step_tokens=33)
    decoding(s)
    long, later, equal = request(110, priority=-1), request(8), request(8, priority=-1)
    for one in (long, later, equal):
        s.add(one)
    assert chunks(step(s)) == [(equal, 0, 8, True), (long, 0, 24, False)]
    assert not later.computed


@pytest.mark.parametrize("leads", [True, False])
def test_requests_for_the_same_long_prompt_prefill_it_once(leads):
    s = scheduler(blocks=400, mixed_step_tokens=33)
    decoding(s)
    s.add(first := request(202, max_tokens=2))
    step(s)
    others = [request(first.prompt, max_tokens=2, leader=first if leads else None) for _ in range(3)]
    for one in others:
        s.add(one)
    read = 0
    while not all(one.over for one in (first, *others)):
        read += sum(chunk.count for chunk in step(s).chunks)
    assert read == 202 - 32 + 3 * 2, "of the others the last two tokens alone"
    assert [one.cached_tokens for one in others] == [200] * 3 and first.cached_tokens == 0
    assert s.prefix_tokens == 600


def shown(before: int, *images: tuple[int, bytes | None, int], after: int = 2, **settings) -> Request:
    """A prompt with images of so many tokens, one after another, each with its key and its patches."""
    places, start = [], before
    for tokens, key, patches in images:
        places.append(ImageSpan(start, tokens, key, patches=patches))
        start += tokens
    return request(start + after, images=tuple(places), **settings)


def test_a_mixed_step_keeps_to_its_patch_budget():
    encoded = set()
    s = scheduler(mixed_step_tokens=101, mixed_step_patches=50, encoded=lambda image, _: image.key in encoded)
    decoding(s)
    album = shown(3, *((8, bytes([i]), 20) for i in range(5)))
    text, other = request(9), shown(1, (8, b"other", 20))
    for one in (album, text, other):
        s.add(one)

    def encodes() -> list[tuple[Request, int, int, bool]]:
        plan = step(s)
        for chunk in plan.chunks:
            encoded.update(p.key for p in chunk.request.images_between(chunk.start, chunk.start + chunk.count))
        return chunks(plan)

    # The third image starts at place 19; what is behind the album does not wait for it.
    assert encodes() == [(album, 0, 16, False), (text, 0, 9, True)]
    # Of the second one a part is still to be read. The fifth starts at place 35.
    assert encodes() == [(album, 16, 16, False)]
    assert encodes() == [(album, 32, 13, True), (other, 0, 11, True)]


def test_a_step_without_decodes_has_a_larger_patch_budget():
    s = scheduler(step_patches=70, mixed_step_patches=50)
    s.add(album := shown(0, *((8, bytes([i]), 20) for i in range(5))))
    assert chunks(step(s)) == [(album, 0, 24, False)]
    assert chunks(step(s)) == [(album, 24, 18, True)]


def test_images_count_once_and_cached_ones_not_at_all():
    encoded = set()
    s = scheduler(mixed_step_tokens=101, mixed_step_patches=50, encoded=lambda image, _: image.key in encoded)
    decoding(s)
    same = [shown(i, (8, b"same", 30)) for i in (1, 2, 3)]
    for one in same:
        s.add(one)
    assert [chunk.request for chunk in step(s).chunks] == same
    encoded.add(b"known")
    both = shown(1, (8, b"known", 90), (8, b"new", 90)), shown(2, (8, b"known", 90))
    for one in both:
        s.add(one)
    assert [chunk.request for chunk in step(s).chunks] == list(both)
    unnamed = [shown(1, (8, None, 30)), shown(1, (8, None, 30))]
    for one in unnamed:
        s.add(one)
    assert [chunk.request for chunk in step(s).chunks] == unnamed[:1], (
        "without a key it is unknown whether they are equal"
    )


def test_an_image_beyond_the_limit_is_encoded_alone_and_small_ones_of_a_block_together():
    s = scheduler(mixed_step_tokens=101, mixed_step_patches=50)
    decoding(s)
    s.add(huge := shown(1, (8, b"a", 1000), (8, b"b", 1)))
    assert chunks(step(s)) == [(huge, 0, 8, False)]
    assert chunks(step(s)) == [(huge, 8, 11, True)]
    s.add(tiny := shown(1, *((1, bytes([i]), 40) for i in range(5)), after=6))
    assert chunks(step(s)) == [(tiny, 0, 4, False)]
    assert chunks(step(s)) == [(tiny, 4, 8, True)]


def test_patches_are_estimated_from_tokens():
    assert ImageSpan(0, 256, b"").patches == 5120 > 70**2
    assert ImageSpan(0, 256, b"", patches=0).patches == 0


def test_admission_reserves_blocks_for_decoding():
    def preemptions(**settings) -> int:
        """Of a backlog of answers that are longer than their prompts."""
        s = Scheduler(BlockPool(601, S), max_rows=64, step_tokens=512, mixed_step_tokens=64, **settings)
        rng = random.Random(1)
        for _ in range(120):
            s.add(request(rng.randrange(8, 32), max_tokens=rng.randrange(20, 90)))
        while not s.idle:
            step(s)
        return s.preemptions

    assert preemptions() == preemptions(watermark=0.05) < preemptions(watermark=0.01) / 2


def test_no_more_blocks_are_reserved_than_answers_may_need():
    s = scheduler(blocks=20 * 11, max_rows=20, step_tokens=1000, watermark=0.05)
    # A batch that fills the cache to its last block: 40 tokens each, and four more of which the last is never read.
    together = [request(40, max_tokens=5) for _ in range(20)]
    for one in together:
        s.add(one)
    step(s)
    assert s.running == 20
    while not s.idle:
        step(s)
    assert s.preemptions == 0


def test_a_request_of_nearly_the_whole_cache_waits_for_the_others_and_runs():
    s = scheduler(blocks=40, watermark=0.05)
    before, huge, after = request(8, max_tokens=6), request(150, max_tokens=8), request(8)
    for one in (before, huge, after):
        s.add(one)
    while not before.over:
        assert huge.status is Status.WAITING
        step(s)
    while not s.idle:
        step(s)
    assert huge.status is after.status is Status.FINISHED and s.preemptions == 0
