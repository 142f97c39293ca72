"""One answer on its way: what is asked, what there is of it, and its place in the cache and on the device."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count, pairwise

from aria.engine.blocks import ROOT, block_hash
from aria.engine.matcher import End, Matcher
from aria.engine.prompt_logprobs import PromptLogprobs
from aria.engine.sampler import EndText
from aria.engine.sampling_params import SamplingParams
from aria.processor.image_inputs import ImageSpan


class Status(Enum):
    WAITING = "waiting"
    """Holds no blocks and no row. Also the state after preemption, with outputs kept."""
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    """The model could not compute it."""


@dataclass(eq=False)
class Request:
    """One answer's state. Several answers to one prompt are several requests, which meet in the prefix cache.

    Only the `Scheduler` changes what stands under "state". At any time the sequence is the prompt, then ``outputs``,
    then ``pending`` tokens that only the device knows.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Most tokens of the answer, capped already by the room that the prompt leaves."""
    images: tuple[ImageSpan, ...] = ()
    """In order."""
    priority: int = 0
    """Lower runs first."""
    seed: int = 0
    adapter: str | None = None
    end_token_ids: frozenset[int] = frozenset()
    """Tokens at which the answer ends, itself included as its last."""
    end_text: EndText | None = None
    """Of the text that ends a turn, where ``params.min_tokens`` keeps it from being drawn too early."""
    matcher: Matcher | None = None
    """Where the answer stands in its grammar: it has accepted ``outputs``."""
    end: End | None = None
    """How the grammar ended the answer, once it has."""
    digests: Sequence[bytes] = ()
    """Of the prompt's blocks, as far as :func:`block_digests` has made them."""
    leader: Request | None = None
    """The request of the first answer to the same prompt, added before: this one finds its blocks."""
    id: int = field(default_factory=count().__next__)

    # State.
    status: Status = Status.WAITING
    arrival: int = -1
    """Order of arrival among all requests of a scheduler."""
    outputs: list[int] = field(default_factory=list)
    pending: int = 0
    """Tokens that launched steps sample and that have not been read back: up to one, two while a step is ahead."""
    computed: int = 0
    """Tokens whose keys and values are in the cache once launched steps are done."""
    prefill: int = 0
    """Tokens to read before the first is sampled: the prompt, and after a preemption the outputs till then."""
    blocks: list[int] = field(default_factory=list)
    row: int | None = None
    """Place in the state on the device while it runs."""
    runs: int = 0
    """Times it was admitted. What the device has in its row serves one of them: preemption in between loses it."""
    published: int = 0
    """Blocks whose content has been offered to the prefix cache."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of the prompt's tokens, where they are asked for; several answers to one prompt have the leader's alone."""
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had when it was first read."""

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt has at least one token"
        assert self.max_tokens >= 1, "an answer has at least one token"
        assert all(a.end <= b.start for a, b in pairwise(self.images)), "images overlap or are out of order"
        assert all(0 <= p.start < p.end <= len(self.prompt) for p in self.images), "an image is not in the prompt"
        unnamed = [image.start for image in self.images if image.key is None]
        self._cacheable = min(unnamed, default=None)
        self._digests = list(self.digests)
        self._adapted: list[tuple[str, bytes]] = []
        leader = self.leader
        if leader is not None:
            assert leader.prompt is self.prompt or leader.prompt == self.prompt, "a leader has the same prompt"
            assert (leader.images, leader.adapter) == (self.images, self.adapter), "a leader has the same prompt"

    def __lt__(self, other: Request) -> bool:
        """Whether this request comes before another wherever they compete."""
        return (self.priority, self.arrival) < (other.priority, other.arrival)

    @property
    def known(self) -> int:
        """Tokens whose values are on the host."""
        return len(self.prompt) + len(self.outputs)

    @property
    def reusable(self) -> int:
        """Leading tokens whose keys and values may come from the prefix cache: one at least is read, to have something
        to sample from, and so are those that the prompt's next tokens have yet to be scored from."""
        logprobs = self.prompt_logprobs
        return self.known - 1 if logprobs is None or logprobs.complete else min(self.known, logprobs.known) - 1

    @property
    def over(self) -> bool:
        """Whether it takes no more tokens."""
        return self.status in (Status.FINISHED, Status.CANCELLED, Status.FAILED)

    @property
    def prefilling(self) -> bool:
        """Whether a running request has tokens to read before it samples."""
        return self.computed < self.prefill

    @property
    def full(self) -> bool:
        """Whether all tokens of the answer are there or on their way."""
        return len(self.outputs) + self.pending >= self.max_tokens

    def leave(self, status: Status) -> None:
        """Hold no blocks and no row any more, and no tokens that only the device knows."""
        self.status = status
        self.blocks, self.row = [], None
        self.pending = self.computed = self.prefill = self.published = 0

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Known token ids from ``start`` up to ``stop``."""
        assert 0 <= start <= stop <= self.known, f"tokens {start} to {stop} of {self.known}"
        length = len(self.prompt)
        if stop <= length:
            return self.prompt[start:stop]
        return [*self.prompt[start:], *self.outputs[max(start - length, 0) : stop - length]]

    def images_between(self, start: int, stop: int) -> tuple[ImageSpan, ...]:
        """The images that have tokens from ``start`` up to ``stop``."""
        first = bisect_right(self.images, start, key=lambda image: image.end)
        return self.images[first : bisect_left(self.images, stop, key=lambda image: image.start)]

    def block_hashes(self, block_size: int) -> Sequence[Hashable]:
        """Names of the content of all leading full blocks of known tokens, up to an image without a key."""
        digests = self._digests
        if not digests and self.leader is not None:
            digests += self.leader._digests[: len(self.prompt) // block_size]
        end = self.known if self._cacheable is None else self._cacheable
        for start in range(len(digests) * block_size, end - block_size + 1, block_size):
            stop = start + block_size
            touching = (
                (image.start - start, image.tokens, image.key)
                for image in self.images_between(start, stop)
                if image.key is not None
            )
            digests.append(block_hash(digests[-1] if digests else ROOT, self.tokens(start, stop), touching))
        if self.adapter is None:
            return digests
        # Keys and values depend on the adapter, and digests do not: they are made before anybody names one.
        self._adapted += [(self.adapter, digest) for digest in digests[len(self._adapted) :]]
        return self._adapted


def block_digests(prompt: Sequence[int], images: Sequence[ImageSpan], block_size: int) -> list[bytes]:
    """What `Request` takes as ``digests``. It takes milliseconds for tens of thousands of tokens, in any thread."""
    request = Request(tuple(prompt), SamplingParams(), 1, tuple(images))
    request.block_hashes(block_size)
    return request._digests
