"""State of one request: its prompt and parameters, the tokens so far, its KV-cache blocks and its row on the device."""

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
    """Holds no blocks and no row. Also the state after preemption, which keeps the outputs."""
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    """A step of the model failed."""


@dataclass(eq=False)
class Request:
    """One sequence to generate. Several answers to one prompt are several requests, which share prefix-cache blocks.

    The sequence is the prompt, then ``outputs``, then ``pending`` tokens whose values only the device knows. Only the
    `Scheduler` changes the fields under "State".
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Maximum number of output tokens, already capped by what the prompt leaves of the context length."""
    images: tuple[ImageSpan, ...] = ()
    """In the order of their positions."""
    priority: int = 0
    """Lower runs first."""
    seed: int = 0
    adapter: str | None = None
    """Key of its adapter; None is the base model."""
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, as its last one."""
    end_text: EndText | None = None
    """Text that ends a turn, if ``params.min_tokens`` has to prevent it for a while."""
    matcher: Matcher | None = None
    """Position of the answer in its grammar: the matcher has accepted ``outputs``."""
    end: End | None = None
    """How the grammar ended the answer; None until then."""
    digests: Sequence[bytes] = ()
    """Content hashes of the prompt's leading blocks, from :func:`block_digests`."""
    leader: Request | None = None
    """The first request with the same prompt, whose block hashes this one takes over."""
    id: int = field(default_factory=count().__next__)

    # State.
    status: Status = Status.WAITING
    arrival: int = -1
    """Order of arrival at the scheduler."""
    outputs: list[int] = field(default_factory=list)
    pending: int = 0
    """Tokens that launched steps sample and the host has not read back: at most one, or two while a step runs ahead."""
    computed: int = 0
    """Tokens whose keys and values are in the KV cache once all launched steps have run."""
    prefill: int = 0
    """Tokens to prefill before sampling: the prompt and, after a preemption, the outputs until then."""
    blocks: list[int] = field(default_factory=list)
    """Block table: KV-cache blocks in the order of the sequence."""
    row: int | None = None
    """Row of the device's state while it runs."""
    runs: int = 0
    """Number of admissions. A row's state on the device is valid for one of them, because preemption discards it."""
    published: int = 0
    """Leading blocks that were offered to the prefix cache."""
    prompt_logprobs: PromptLogprobs | None = None
    """Log-probabilities of the prompt, if requested; of several answers to one prompt only the leader has them."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first prefill."""

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
        """Whether this request has precedence over another."""
        return (self.priority, self.arrival) < (other.priority, other.arrival)

    @property
    def known(self) -> int:
        """Number of tokens whose values the host knows."""
        return len(self.prompt) + len(self.outputs)

    @property
    def reusable(self) -> int:
        """Number of leading tokens that may come from the prefix cache. At least one token is computed, to sample from,
        and so are those whose logits are needed for the prompt's log-probabilities."""
        logprobs = self.prompt_logprobs
        return self.known - 1 if logprobs is None or logprobs.complete else min(self.known, logprobs.known) - 1

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in (Status.FINISHED, Status.CANCELLED, Status.FAILED)

    @property
    def prefilling(self) -> bool:
        """Whether a running request has tokens to prefill before it samples."""
        return self.computed < self.prefill

    @property
    def full(self) -> bool:
        """Whether all tokens of the answer were sampled or are pending."""
        return len(self.outputs) + self.pending >= self.max_tokens

    def leave(self, status: Status) -> None:
        """Give up blocks, row and pending tokens."""
        self.status = status
        self.blocks, self.row = [], None
        self.pending = self.computed = self.prefill = self.published = 0

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Token ids at positions ``start`` to ``stop - 1``, which the host has to know."""
        assert 0 <= start <= stop <= self.known, f"tokens {start} to {stop} of {self.known}"
        length = len(self.prompt)
        if stop <= length:
            return self.prompt[start:stop]
        return [*self.prompt[start:], *self.outputs[max(start - length, 0) : stop - length]]

    def images_between(self, start: int, stop: int) -> tuple[ImageSpan, ...]:
        """The images with tokens at positions ``start`` to ``stop - 1``."""
        first = bisect_right(self.images, start, key=lambda image: image.end)
        return self.images[first : bisect_left(self.images, stop, key=lambda image: image.start)]

    def block_hashes(self, block_size: int) -> Sequence[Hashable]:
        """Content hashes of the leading full blocks of known tokens, up to an image without a key."""
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
        # Keys and values depend on the adapter; digests do not, because they are computed before a request names one.
        self._adapted += [(self.adapter, digest) for digest in digests[len(self._adapted) :]]
        return self._adapted


def block_digests(prompt: Sequence[int], images: Sequence[ImageSpan], block_size: int) -> list[bytes]:
    """Content hashes of a prompt's full blocks, to pass to `Request` as ``digests``.

    Safe in any thread. It takes milliseconds for tens of thousands of tokens.
    """
    request = Request(tuple(prompt), SamplingParams(), 1, tuple(images))
    request.block_hashes(block_size)
    return request._digests
