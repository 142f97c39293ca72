"""The scheduler with a simulated device that lags behind: every request must get the tokens that it would get alone.

The pretended model keeps one number for each slot of the cache: a hash of all that came before, read from the slot
before. The next token is a hash of all slots of the sequence, read through its block table. So a wrong block, a place
off by one, a block shared by what differs, or overwritten too early, gives wrong tokens.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from aria.engine.blocks import BlockPool
from aria.engine.request import Request, Status
from aria.engine.sampling_params import SamplingParams
from aria.engine.scheduler import Chunk, Scheduler, StepPlan
from aria.processor.image_inputs import ImageSpan

VOCABULARY = 40
END = 0
IMAGE = 9


def contents(request: Request, start: int, stop: int) -> list[Any]:
    """What the model reads from ``start`` to ``stop``: tokens, and where images lie their content."""
    seen: list[Any] = list(request.tokens(start, stop))
    for image in request.images:
        for place in range(max(image.start, start), min(image.end, stop)):
            seen[place - start] = (image.data, place - image.start)
    return seen


def first_state(adapter: str | None) -> int:
    return hash((1, len(adapter or "")))


def next_token(states: list[int], seed: int) -> int:
    return hash((tuple(states), seed)) % VOCABULARY


def tokens_alone(request: Request) -> list[int]:
    """Expected tokens of a request, computed alone and without cache."""
    states, outputs = [], []
    state = first_state(request.adapter)
    for content in contents(request, 0, len(request.prompt)):
        state = hash((state, content))
        states.append(state)
    while len(outputs) < request.max_tokens and END not in outputs:
        outputs.append(next_token(states, request.seed))
        states.append(hash((states[-1], outputs[-1])))
    return outputs


class Work(NamedTuple):
    """One sequence's part of a launched step, with copies of all that the host may change afterwards."""

    request: Request
    row: int
    blocks: tuple[int, ...]
    start: int
    contents: list[Any] | None
    """None for a decode: the device itself knows the token."""
    samples: bool


class Device:
    """Runs launched steps one after another, each when it is waited for."""

    def __init__(self, pool: BlockPool, max_rows: int):
        self.S = pool.block_size
        self.slots: list[Any] = [None] * ((pool.total + 1) * self.S)
        self.tokens: list[Any] = [None] * max_rows
        self.steps: deque[list[Work]] = deque()

    def launch(self, plan: StepPlan, wrong: tuple[Request | None, int] = (None, 0)) -> None:
        """``wrong``: of which request something else is read, and from which place on."""
        works = [Work(r, r.row, tuple(r.blocks), r.computed - 1, None, True) for r in plan.decodes]
        for chunk in plan.chunks:
            r, stop = chunk.request, chunk.start + chunk.count
            seen = contents(r, chunk.start, stop)
            if r is wrong[0]:
                seen = [(place, "wrong") if chunk.start + place >= wrong[1] else x for place, x in enumerate(seen)]
            works.append(Work(r, r.row, tuple(r.blocks), chunk.start, seen, chunk.samples))
        self.steps.append(works)

    def wait(self) -> list[tuple[Request, int]]:
        """Run the oldest launched step; what it sampled."""
        sampled = []
        for work in self.steps.popleft():
            seen = [self.tokens[work.row]] if work.contents is None else work.contents
            slots = [block * self.S + offset for block in work.blocks for offset in range(self.S)]
            state = self.slots[slots[work.start - 1]] if work.start else first_state(work.request.adapter)
            for slot, content in zip(slots[work.start :], seen, strict=False):
                assert slot >= self.S, "a sequence writes to block 0"
                state = hash((state, content))
                self.slots[slot] = state
            length = work.start + len(seen)
            assert length <= len(slots), "a sequence has fewer blocks than tokens"
            if work.samples:
                token = next_token([self.slots[slot] for slot in slots[:length]], work.request.seed)
                self.tokens[work.row] = token
                sampled.append((work.request, token))
        return sampled


@dataclass
class Setting:
    """Sizes of one simulation."""

    seed: int
    ahead: int
    """Steps that are planned and launched before the tokens of an earlier one are read back."""
    block_size: int
    room: int
    """Blocks beyond what the largest request takes."""
    max_rows: int
    requests: int = 150
    cancel: float = 0.03
    """How often, at each step, a request is dropped."""
    fail: float = 0.03
    """The same for failures of a step."""


class Simulation:
    def __init__(self, setting: Setting):
        self.setting = setting
        self.random = random.Random(setting.seed)
        S = setting.block_size
        # Long prompts read block by block beside answers that grow, so that prompts compete.
        self.crowded = self.random.random() < 0.3
        self.prefixes = [self._prompt(self.random.randint(1, 8 * S)) for _ in range(4)]
        self.arriving = deque(self._requests())
        most = max(-(-(len(r.prompt) + r.max_tokens - 1) // S) for r in self.arriving)
        pool = BlockPool(1 + most + setting.room, S)
        self.scheduler = Scheduler(
            pool,
            max_rows=setting.max_rows,
            step_tokens=S if self.crowded else self.random.choice([S, 3 * S + 1, 20 * S]),
            mixed_step_tokens=self.random.choice([1, 2 * S, 10 * S]),
            step_patches=self.random.choice([40, 10**6]),
            mixed_step_patches=self.random.choice([1, 40, 10**6, 10**6]),
            encoded=lambda image, adapter: (image.key or image, adapter) in self.encoded,
            watermark=self.random.choice([0, 0.1]),
        )
        self.rate = self.random.choice([0.05, 0.3, 0.95])
        self.device = Device(pool, setting.max_rows)
        self.encoded: set[tuple[bytes | ImageSpan, str | None]] = set()
        self.all = list(self.arriving)
        self.expected = {request: tokens_alone(request) for request in self.all}
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        live: list[Request] = []
        idle = 0
        while self.arriving or not self.scheduler.idle or self.device.steps:
            while self.arriving and self.random.random() < self.rate:
                request = self.arriving.popleft()
                self.scheduler.add(request)
                live.append(request)
            live = [request for request in live if not request.over]
            if live and self.random.random() < self.setting.cancel:
                self._cancel(self.random.choice(live))
            if self.random.random() < self.setting.fail / 10:
                self._reset(live)
            queued = {request for request in live if request.status is Status.WAITING}
            reading = {request for request in live if request.prefilling}
            runs = {request: request.runs for request in live if request.status is Status.RUNNING}
            plan = self.scheduler.plan()
            self._check(plan, queued, reading, runs, live)
            if plan:
                self._launch(plan)
            idle = 0 if plan or self.arriving or self.device.steps else idle + 1
            assert idle < 2, "nothing runs, and something waits"
            while len(self.device.steps) > (self.setting.ahead if plan else 0):
                self._collect()
            self.scheduler.check()
        self._check_end()

    def _requests(self) -> list[Request]:
        requests: list[Request] = []
        rng, S = self.random, self.setting.block_size
        priorities = range(-5, 5) if self.crowded else [0, 0, 0, 1, -1]
        while len(requests) < self.setting.requests:
            tokens, images = rng.choice(self.prefixes)
            keep = rng.choice([0, len(tokens), rng.randint(0, len(tokens))])
            images = [image for image in images if image.end <= keep]
            more, more_images = self._prompt(rng.randint(1, (12 if self.crowded else 6) * S), keep)
            leader = None
            for copy in range(rng.choice([1, 1, 1, 3])):
                request = Request(
                    prompt=leader.prompt if leader else (*tokens[:keep], *more),
                    params=SamplingParams(),
                    max_tokens=rng.choice([1, rng.randint(1, 30), 5 * S])
                    if not self.crowded
                    else rng.randint(1, 12 * S),
                    images=leader.images if leader else (*images, *more_images),
                    priority=leader.priority if leader else rng.choice(priorities),
                    seed=copy,
                    adapter=leader.adapter if leader else rng.choice([None, None, None, "other"]),
                    leader=leader,
                )
                leader = leader or request
                requests.append(request)
        return requests

    def _prompt(self, length: int, start: int = 0) -> tuple[list[int], list[ImageSpan]]:
        """Tokens, some of them an image's; contents repeat, also where the places differ."""
        tokens = [self.random.randrange(VOCABULARY) for _ in range(length)]
        images = []
        at = self.random.randint(0, 3 * length)
        if at < length:
            size, content = self.random.randint(1, length - at), self.random.randrange(3)
            tokens[at : at + size] = [IMAGE] * size
            key = bytes([content]) if self.random.random() < 0.8 else None
            # Without a key nobody can tell contents apart.
            data = content if key is not None else self.random.randrange(100, 10**9)
            images.append(ImageSpan(start + at, size, key, data))
        return tokens, images

    def _cancel(self, request: Request) -> None:
        self.counts[f"cancelled {request.status.value}"] += 1
        self.counts["cancelled under way"] += any(
            work.request is request for step in self.device.steps for work in step
        )
        self.scheduler.cancel(request)

    def _reset(self, live: list[Request]) -> None:
        """As after a step that failed: everything that was computed or is under way is lost."""
        self.counts["reset"] += bool(self.device.steps)
        self.counts["preempted"] += sum(request.status is Status.RUNNING for request in live)
        self.device.steps.clear()
        self.scheduler.reset(live)

    def _launch(self, plan: StepPlan) -> None:
        if self.random.random() < self.setting.fail:
            # The step lacked memory.
            while self.device.steps:
                self._collect()
            halves = plan.halves(self.setting.block_size)
            self.counts["halves"] += len(halves) > 1
            for half in halves:
                self.device.launch(half)
                self._collect()
            return
        shown = [
            (chunk, image)
            for chunk in plan.chunks
            for image in chunk.request.images_between(chunk.start, chunk.start + chunk.count)
        ]
        if not shown or self.random.random() >= self.setting.fail:
            self.device.launch(plan)
            return
        # An image could not be encoded.
        chunk, image = self.random.choice(shown)
        place = max(chunk.start, image.start)
        self.device.launch(plan, (chunk.request, place))
        failed = self.scheduler.fail(chunk.request, place)
        assert chunk.request in failed and all(one.status is Status.FAILED for one in failed)
        assert all(any(p.key == image.key for p in one.images) for one in failed)
        self.counts["failed"] += 1

    def _collect(self) -> None:
        for request, token in self.device.wait():
            late = request.over
            before = list(request.outputs)
            self.scheduler.append(request, token)
            if late:
                self.counts["dropped"] += 1
                assert request.outputs == before, "a token came after the end"
            elif token == END or len(request.outputs) == request.max_tokens:
                self.scheduler.finish(request)

    def _check(
        self, plan: StepPlan, queued: set[Request], reading: set[Request], runs: dict[Request, int], live: list[Request]
    ) -> None:
        """What every plan keeps to. ``runs``: of the requests that ran before, how often they had been admitted."""
        self.counts["drains"] += plan.drain
        preempted = [one for one, times in runs.items() if one.status is Status.WAITING or one.runs > times]
        self.counts["preempted"] += len(preempted)
        if plan.drain:
            assert not plan and self.device.steps, "a drain with nothing under way, or with work"
            return
        scheduler, S = self.scheduler, self.setting.block_size
        planned = [*plan.decodes, *(chunk.request for chunk in plan.chunks)]
        assert len(set(planned)) == len(planned), "a request is planned twice"
        assert all(request.status is Status.RUNNING for request in planned)
        running = [request for request in live if request.status is Status.RUNNING]
        for request in running:
            assert request in planned or request.prefilling or request.full, "a decode is left out"
            assert len(request.outputs) + request.pending <= request.max_tokens, "too many tokens"
        read = sum(chunk.count for chunk in plan.chunks)
        limit = max(S, scheduler.mixed_step_tokens - len(plan.decodes)) if plan.decodes else scheduler.step_tokens
        assert read <= limit, f"{read} tokens are read, {limit} are allowed"
        self._check_images(plan)
        for chunk in plan.chunks:
            assert chunk.count > 0 and chunk.samples == (not chunk.request.prefilling)
            assert chunk.samples or (chunk.start + chunk.count) % S == 0, "a chunk ends inside a block"
        admitted = queued & set(running)
        waiting = [request for request in live if request.status is Status.WAITING]
        assert not any(late < early for early in admitted for late in waiting), "the queue was overtaken"
        for victim in preempted:
            assert not any(victim < request for request in running), "not the last was preempted"
        self.counts["preempted while reading"] += sum(victim in reading for victim in preempted)
        blocked = any(request.prefilling and request not in planned for request in running)
        self.counts["prompt without room"] += blocked and self.scheduler.pool.available == 0
        positions = [request.arrival for request in (chunk.request for chunk in plan.chunks)]
        self.counts["shared with long prompts"] += not self.crowded and positions != sorted(positions)
        starts = [chunk.request for chunk in plan.chunks if chunk.request in admitted]
        self.counts["started together"] += len(starts) > 1
        blocks_written = set()
        for chunk in plan.chunks:
            first = chunk.start // S
            self.counts["read in the step that wrote"] += bool(blocks_written & set(chunk.request.blocks[:first]))
            blocks_written |= set(chunk.request.blocks[first:])

    def _check_images(self, plan: StepPlan) -> None:
        """Beyond the limit a step encodes only what the first block of its first images holds."""
        S, limit = self.setting.block_size, self.scheduler.step_patches
        if plan.decodes:
            limit = self.scheduler.mixed_step_patches
        new: dict[Any, tuple[Chunk, ImageSpan]] = {}
        for chunk in plan.chunks:
            adapter = chunk.request.adapter
            for image in chunk.request.images_between(chunk.start, chunk.start + chunk.count):
                if (image.key or image, adapter) not in self.encoded:
                    new.setdefault((image.key or image, adapter), (chunk, image))
        if sum(image.patches for _, image in new.values()) > limit:
            (chunk, _), *others = new.values()
            assert all(other is chunk and image.start < chunk.start + S for other, image in others)
            self.counts["images beyond the limit"] += 1
        self.counts["images"] += len(new)
        self.encoded |= new.keys()

    def _check_end(self) -> None:
        for request in self.all:
            assert (request.blocks, request.row, request.pending) == ([], None, 0)
            if request.status is Status.FINISHED:
                assert request.outputs == self.expected[request], f"request {request.arrival} got wrong tokens"
            else:
                assert request.status in (Status.CANCELLED, Status.FAILED)
                assert request.outputs == self.expected[request][: len(request.outputs)]
        pool = self.scheduler.pool
        assert pool.used == 0 and pool.available == pool.total, "blocks leaked"
        assert self.scheduler.running == self.scheduler.waiting == 0
        self.counts["preemptions"] = self.scheduler.preemptions
        self.counts["prefix tokens"] = self.scheduler.prefix_tokens
        assert self.scheduler.preemptions == self.counts["preempted"]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_every_request_gets_its_own_tokens(ahead):
    counts: Counter[str] = Counter()
    rng = random.Random(ahead)
    for seed in range(18):
        block_size, rows, room = rng.choice([1, 2, 4, 8]), rng.choice([1, 2, 5, 12]), rng.choice([0, 0, 1, 5, 60])
        simulation = Simulation(Setting(seed, ahead, block_size, room, rows))
        simulation.run()
        counts += simulation.counts
    # Whatever can go wrong has been there to go wrong.
    expected = [
        "preempted",
        "preempted while reading",
        "prompt without room",
        "prefix tokens",
        "started together",
        "read in the step that wrote",
        "cancelled waiting",
        "cancelled running",
        "images",
        "images beyond the limit",
        "shared with long prompts",
        "halves",
        "failed",
    ]
    if ahead:
        expected += ["drains", "cancelled under way", "dropped", "reset"]
    assert all(counts[what] > 10 for what in expected), counts


def test_no_preemption_with_enough_blocks_and_no_interruptions():
    simulation = Simulation(Setting(seed=1, ahead=1, block_size=4, room=2000, max_rows=64, cancel=0.0, fail=0.0))
    simulation.run()
    assert simulation.scheduler.preemptions == 0
    assert all(request.status is Status.FINISHED for request in simulation.all)
