"""Continuous batching: which requests prefill or decode in the next step, in token counts and block numbers.

S tokens of a block. Launched steps run one after another on one stream, and the scheduler relies on it: a block's
content counts as computed as soon as the step that computes it is planned, and a block or row can be given to another
request as soon as it is released, because whatever still writes to it runs before the next step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

from aria.engine.blocks import BlockPool
from aria.engine.request import Request, Status
from aria.processor.image_inputs import ImageSpan

LONG_STEPS = 2
"""A prompt that needs more steps than this leaves half of each to the prompts behind it."""


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a prompt, or after a preemption of prompt and outputs."""

    request: Request
    start: int
    count: int
    samples: bool
    """Whether it is the prompt's last chunk, so that the next token is sampled."""


@dataclass
class StepPlan:
    """One step. A chunk may read blocks that an earlier chunk of the same step fills, when two requests share a prefix:
    in each layer the keys and values of all chunks are written before any chunk attends."""

    decodes: list[Request] = field(default_factory=list)
    """Requests that decode: each reads its last token, known to the device, at position ``computed - 1``."""
    chunks: list[Chunk] = field(default_factory=list)
    drain: bool = False
    """Nothing is planned: read back the tokens of launched steps, then plan again."""

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.chunks)

    @property
    def requests(self) -> list[Request]:
        return [*self.decodes, *(chunk.request for chunk in self.chunks)]

    @property
    def sampling(self) -> list[Request]:
        """Requests that get a token: all that decode, and those whose prompt ends with their chunk."""
        return [*self.decodes, *(chunk.request for chunk in self.chunks if chunk.samples)]

    def halves(self, block_size: int) -> list[StepPlan]:
        """Split into two steps of about equal size, to be launched in this order; into one if there is a single block.
        Requests that have ended since are left out."""
        decodes = [request for request in self.decodes if not request.over]
        chunks = [chunk for chunk in self.chunks if not chunk.request.over]
        left = -(-(len(decodes) + sum(chunk.count for chunk in chunks)) // 2)
        first, second = StepPlan(decodes[:left]), StepPlan(decodes[left:])
        left -= len(first.decodes)
        for chunk in chunks:
            # All chunks after the first one that is split come later: they may begin with blocks that it fills.
            count = chunk.count if chunk.count <= left else left - left % block_size
            if count:
                first.chunks.append(replace(chunk, count=count, samples=chunk.samples and count == chunk.count))
            if count < chunk.count:
                second.chunks.append(replace(chunk, start=chunk.start + count, count=chunk.count - count))
                left = 0
            else:
                left -= count
        return [plan for plan in (first, second) if plan]


class _ImageBudget:
    """Limits the images that one step encodes, in patches. One image is always allowed, whatever its size.

    Args:
        most: Maximum number of patches in the step.
        encoded: As in `Scheduler`.
    """

    def __init__(self, most: int, encoded: Callable[[ImageSpan, str | None], bool]):
        self._most, self._encoded = most, encoded
        self._patches = 0
        self._taken: set[tuple[bytes | None, str | None]] = set()

    def fit(self, request: Request, stop: int, block_size: int) -> int:
        """Where a chunk that would end at ``stop`` has to end for its images to fit into the step."""
        patches = self._patches
        for image in request.images_between(request.computed, stop):
            more = self._cost(request, image)
            # Chunks are whole blocks, so the images of the first block cannot be separated.
            inseparable = not self._patches and image.start < request.computed + block_size
            if more and patches and patches + more > self._most and not inseparable:
                return max(image.start, request.computed)
            patches += more
        return stop

    def take(self, request: Request, stop: int) -> None:
        """Add the images of a chunk that ends at ``stop``."""
        for image in request.images_between(request.computed, stop):
            self._patches += self._cost(request, image)
            self._taken.add((image.key, request.adapter))

    def _cost(self, request: Request, image: ImageSpan) -> int:
        known = image.key is not None and (image.key, request.adapter) in self._taken
        return 0 if known or self._encoded(image, request.adapter) else image.patches


class Scheduler:
    """Continuous batching over a `BlockPool`: decodes first, then prefill chunks up to the step's token budget.

    Requests are served by priority, then arrival. None overtakes the first in the queue, so that a large request does
    not starve. A prompt that needs more than :data:`LONG_STEPS` further steps leaves half of each to later prompts of
    its priority, and takes what they do not use. When a decode finds no free block, the last of the running requests is
    preempted: it releases its blocks, keeps its outputs, waits, and later prefills prompt and outputs again, apart from
    what the prefix cache still has.

    Args:
        pool: Allocator of the KV cache's blocks.
        max_rows: Maximum number of concurrent requests.
        step_tokens: Token budget of a step without decodes.
        mixed_step_tokens: Token budget of a step with decodes, which bounds their latency. At most ``step_tokens``; one
            block of a prompt is always allowed.
        step_patches, mixed_step_patches: Maximum number of image patches to encode in such steps; one image is always
            allowed.
        encoded: Whether the image tokens of an image are cached, for an adapter's key.
        watermark: Fraction of the blocks that has to stay available when a request is admitted beside others, so that
            these can grow; less if their ``max_tokens`` bound their growth.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_rows: int,
        step_tokens: int,
        mixed_step_tokens: int,
        step_patches: int = 320_000,
        mixed_step_patches: int = 4_900,
        encoded: Callable[[ImageSpan, str | None], bool] = lambda image, adapter: False,
        watermark: float = 0.05,
    ):
        assert max_rows >= 1, "no rows"
        assert step_tokens >= pool.block_size, f"a step of {step_tokens} tokens reads no block of {pool.block_size}"
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.mixed_step_tokens = min(mixed_step_tokens, step_tokens)
        self.step_patches = step_patches
        self.mixed_step_patches = min(mixed_step_patches, step_patches)
        self._encoded = encoded
        self._watermark = int(watermark * pool.total)
        self._arrivals = count()
        self._start(pool)
        self.preemptions = 0
        """Number of preemptions so far."""
        self.prefix_queries = 0
        """Tokens looked up in the prefix cache so far."""
        self.prefix_tokens = 0
        """Tokens found there."""

    def _start(self, pool: BlockPool) -> None:
        self.pool = pool
        self._queue: list[Request] = []
        """A heap. Requests that ended while waiting are removed when they come up, or when they are the majority."""
        self._waiting = 0
        self._running: list[Request] = []
        """Sorted by precedence."""
        self._rows = list(range(self.max_rows - 1, -1, -1))
        self._promised = 0
        """Blocks that running requests have yet to allocate for their prefill."""

    def reset(self, requests: Iterable[Request] = ()) -> None:
        """Start over with an empty cache after a failure. Only counters are kept.

        Args:
            requests: Those to continue. They wait in the order of their arrival, and are computed again.
        """
        self._start(BlockPool(self.pool.total + 1, self.pool.block_size))
        for request in sorted(requests, key=lambda one: one.arrival):
            self.preemptions += request.status is Status.RUNNING
            request.leave(Status.WAITING)
            self._enqueue(request)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: It does not fit into the KV cache even alone.
        """
        assert request.status is Status.WAITING and request.arrival < 0, "a request is added once"
        # The last token is sampled and never computed.
        need = self.pool.blocks_for(len(request.prompt) + request.max_tokens - 1)
        if need > self.pool.total:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and an answer of up to {request.max_tokens} need {need} "
                f"blocks of the cache, which has {self.pool.total} of {self.pool.block_size} tokens; ask for a smaller "
                "max_tokens, use fewer or smaller images or less text, or give the cache more memory"
            )
        request.arrival = next(self._arrivals)
        request.block_hashes(self.pool.block_size)  # Here, so that steps need not wait for it.
        self._enqueue(request)

    def finish(self, request: Request) -> None:
        """End a request in any state. Its pending tokens are dropped."""
        self._leave(request, Status.FINISHED)

    def cancel(self, request: Request) -> None:
        """Cancel a request in any state, also while launched steps compute it. One that has ended is left alone."""
        if not request.over:
            self._leave(request, Status.CANCELLED)

    def fail(self, request: Request, place: int) -> list[Request]:
        """End a running request whose cached keys and values are wrong from position ``place`` on.

        Returns:
            All requests that ended with it: those that share one of the wrong blocks.
        """
        wrong = set(request.blocks[place // self.pool.block_size :])
        self.pool.withdraw(wrong)
        failed = [one for one in self._running if not wrong.isdisjoint(one.blocks)]
        for one in failed:
            self._leave(one, Status.FAILED)
        return failed

    def append(self, request: Request, token: int) -> None:
        """Add the oldest pending token of a request, which the host has read back. Ignored if the request has ended."""
        if request.over:
            return
        assert request.pending > 0, f"request {request.id} gets a token that was not sampled"
        request.pending -= 1
        request.outputs.append(token)
        self._publish(request)

    def plan(self) -> StepPlan:
        """Plan the next step, which has to be launched before the next call; its tokens may be read back after it.

        Requests advance here: ``computed`` counts the step as done, ``pending`` the tokens that it will sample.
        """
        plan = StepPlan()
        self._plan_decodes(plan)
        if not plan.drain:
            self._plan_chunks(plan)
        return plan

    def check(self) -> None:
        """Assert that requests, rows and blocks are consistent. Takes time in proportion to them."""
        running = self._running
        self.pool.check(request.blocks for request in running)
        assert all(a < b for a, b in pairwise(running)), "running requests are out of order"
        rows = sorted([*self._rows, *(request.row for request in running if request.row is not None)])
        assert rows == list(range(self.max_rows)), f"rows are lost or shared: {rows}"
        for request in running:
            assert request.status is Status.RUNNING and request.row is not None, f"{request.id} runs without a row"
            assert len(request.blocks) == self.pool.blocks_for(request.computed), f"{request.id} has too many blocks"
            if not request.prefilling:
                assert request.computed == request.known + request.pending - 1, f"{request.id} has a wrong token count"
        promised = sum(self._unallocated(request) for request in running)
        assert promised == self._promised, f"{self._promised} blocks are promised, not {promised}"
        reading = {block for request in running if request.prefilling for block in request.blocks}
        assert promised + len(reading) <= self.pool.total, "running prefills do not fit together"
        waiting = [request for request in self._queue if request.status is Status.WAITING]
        assert len(waiting) == self._waiting, f"{len(waiting)} requests wait, not {self._waiting}"
        assert not any(request.blocks or request.pending for request in waiting), "a waiting request holds blocks"

    def _plan_decodes(self, plan: StepPlan) -> None:
        """Let every decoding request sample its next token, preempting the last ones if blocks run out."""
        S = self.pool.block_size
        decodes = [request for request in self._running if not request.prefilling and not request.full]
        need = sum(request.computed == len(request.blocks) * S for request in decodes)
        while need > self.pool.available:
            victim = self._running[-1]
            if victim.pending:
                # Its sampled token is part of what it has to prefill again.
                plan.drain = True
                return
            if victim is decodes[-1]:
                need -= victim.computed == len(victim.blocks) * S
                decodes.pop()
            self._preempt(victim)
        for request in decodes:
            if request.computed == len(request.blocks) * S:
                request.blocks += self.pool.allocate(1)
            request.computed += 1
            request.pending += 1
        plan.decodes = decodes

    def _plan_chunks(self, plan: StepPlan) -> None:
        """Fill the step with chunks of prompts, of running and waiting requests alike, in order of precedence."""
        S = self.pool.block_size
        mixed = bool(plan.decodes)
        full_budget = budget = max(S, self.mixed_step_tokens - len(plan.decodes)) if mixed else self.step_tokens
        images = _ImageBudget(self.mixed_step_patches if mixed else self.step_patches, self._encoded)
        long: list[Request] = []
        kept_for_long = 0
        prompts = self._prompts()
        # Decodes may have taken blocks that a prompt needs. Without decodes all running prefills fit, so the prompt
        # waits for them, and no request behind it takes the blocks that become free.
        while budget - kept_for_long >= S and self.pool.available:
            request = next(prompts, None)
            if long and (request is None or request.priority > long[0].priority):
                for one in long:
                    budget -= self._plan_chunk(plan, one, budget, images)
                long, kept_for_long = [], 0
            if request is None:
                return
            self._match_prefix(request)
            if request.prefill - request.computed > LONG_STEPS * full_budget:
                if not long:
                    kept_for_long = budget - budget // 2
                long.append(request)
            else:
                budget -= self._plan_chunk(plan, request, budget - kept_for_long, images)
        for one in long:
            budget -= self._plan_chunk(plan, one, budget, images)

    def _prompts(self) -> Iterator[Request]:
        """Requests with tokens to prefill, in order of precedence. A waiting one is admitted when it is its turn."""
        prefilling = deque(request for request in self._running if request.prefilling)
        admitting = True
        while True:
            head = self._head() if admitting else None
            if head is not None and not (prefilling and prefilling[0] < head):
                # If it does not fit, nothing overtakes it in the queue; running prefills continue.
                admitting = self._admit(head)
                if admitting:
                    yield head
            elif prefilling:
                yield prefilling.popleft()
            else:
                return

    def _plan_chunk(self, plan: StepPlan, request: Request, budget: int, image_budget: _ImageBudget) -> int:
        """Plan a chunk of a prompt. Returns its number of tokens, 0 if blocks, images or ``budget`` allow none."""
        S = self.pool.block_size
        stop = min(request.prefill, request.computed + min(budget, self.pool.available * S))
        stop = image_budget.fit(request, stop, S)
        if stop < request.prefill:
            stop -= stop % S
        if stop <= request.computed:
            return 0
        image_budget.take(request, stop)
        plan.chunks.append(self._advance(request, stop))
        return plan.chunks[-1].count

    def _match_prefix(self, request: Request) -> None:
        """Take blocks from the prefix cache that other requests have filled since this one planned its last chunk."""
        S = self.pool.block_size
        names = request.block_hashes(S)
        last = min(len(names), request.reusable // S)
        found = self.pool.match(names[place] for place in range(len(request.blocks), last))
        if found:
            request.blocks += found
            self._promised -= len(found)
            request.published = len(request.blocks)
            request.computed = request.published * S
            self._count_found(request, len(found) * S)

    def _advance(self, request: Request, stop: int) -> Chunk:
        """Advance a request's prefill to ``stop``."""
        start, samples = request.computed, stop == request.prefill
        fresh = self.pool.allocate(self.pool.blocks_for(stop) - len(request.blocks))
        self._promised -= len(fresh)
        request.blocks += fresh
        request.computed = stop
        request.pending += samples
        self._publish(request)
        return Chunk(request, start, stop - start, samples)

    def _head(self) -> Request | None:
        """The first waiting request."""
        while self._queue and self._queue[0].status is not Status.WAITING:
            heapq.heappop(self._queue)
        return self._queue[0] if self._queue else None

    def _admit(self, head: Request) -> bool:
        """Let the first waiting request run if there are a row and blocks for its whole prefill."""
        pool = self.pool
        names = head.block_hashes(pool.block_size)[: head.reusable // pool.block_size]
        # Cached blocks that are not in use count as available, so only shared ones in use reduce the need.
        _, shared = pool.peek(names)
        need = pool.blocks_for(head.known) - shared
        spare = pool.available - self._promised - need
        if not self._rows or spare < 0 or (spare < self._watermark and spare < self._growth()):
            return False
        heapq.heappop(self._queue)
        self._waiting -= 1
        head.blocks = pool.match(names)
        head.published = len(head.blocks)
        head.computed = head.published * pool.block_size
        head.prefill = head.known
        head.row = self._rows.pop()
        head.runs += 1
        head.status = Status.RUNNING
        insort(self._running, head)
        self._promised += self._unallocated(head)
        self.prefix_queries += head.known
        self._count_found(head, head.computed)
        return True

    def _growth(self) -> int:
        """Blocks that running requests may still need for decoding."""
        most = (self.pool.blocks_for(len(one.prompt) + one.max_tokens - 1) for one in self._running)
        return sum(most) - sum(len(one.blocks) for one in self._running) - self._promised

    def _count_found(self, request: Request, tokens: int) -> None:
        self.prefix_tokens += tokens
        if request.runs == 1:
            request.cached_tokens += tokens

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self._queue, request)
        self._waiting += 1

    def _leave(self, request: Request, status: Status) -> None:
        assert request.arrival >= 0 and not request.over, f"request {request.id} was never added, or has already ended"
        if request.status is Status.RUNNING:
            self._vacate(request, status)
        else:
            self._waiting -= 1
            request.status = status
        if len(self._queue) > 2 * self._waiting + 64:
            self._queue = [waiting for waiting in self._queue if waiting.status is Status.WAITING]
            heapq.heapify(self._queue)

    def _preempt(self, victim: Request) -> None:
        assert not victim.pending, f"request {victim.id} is preempted with a pending token"
        assert not victim.full, f"request {victim.id} has all its tokens, but was not finished"
        self._vacate(victim, Status.WAITING)
        self._enqueue(victim)
        self.preemptions += 1

    def _vacate(self, request: Request, status: Status) -> None:
        """Release a running request's blocks and row."""
        del self._running[bisect_left(self._running, request)]
        self._promised -= self._unallocated(request)
        self.pool.release(request.blocks)
        assert request.row is not None, f"request {request.id} runs without a row"
        self._rows.append(request.row)
        request.leave(status)

    def _unallocated(self, request: Request) -> int:
        return self.pool.blocks_for(request.prefill) - len(request.blocks) if request.prefilling else 0

    def _publish(self, request: Request) -> None:
        """Offer full, computed blocks of known tokens to the prefix cache."""
        full = min(request.computed, request.known) // self.pool.block_size
        if full > request.published:
            names = request.block_hashes(self.pool.block_size)[:full]
            for place in range(request.published, len(names)):
                self.pool.publish(request.blocks[place], names[place])
            request.published = full
