"""Packing of sequences into batches of a fixed number of tokens; the oldest come first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A sequence to pack."""

    @property
    def tokens(self) -> int: ...

    @property
    def num_crops(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


MANY = 128
"""Enough sequences to choose from, if they fill two batches."""
MOST_TOKENS = 1 << 24
"""Maximum waiting tokens, pieces of documents included: 256 MiB."""


class Packer(Generic[Item]):
    """Holds sequences until there are enough to choose from.

    Pieces of one document enter one by one, each at the end of the queue when the one before it was taken, so that
    batches mix pieces of many documents.

    Args:
        tokens: Tokens of a batch.
        crops: Maximum crops of a batch; None: any number.
        lookahead: Number of batches that the available sequences must fill before one is taken.
    """

    def __init__(self, tokens: int, crops: int | None = None, lookahead: int = 8):
        self._tokens, self._crops, self._lookahead = tokens, crops, lookahead
        self.held: list[deque[Item]] = []
        """The queue, oldest first: an available sequence, and the pieces that follow it."""
        self._first_tokens = self._first_crops = self._all_tokens = 0

    @property
    def ready(self) -> bool:
        """Whether there are enough sequences to choose from."""
        batches = self._first_tokens / self._tokens
        if self._crops is not None:
            batches = max(batches, self._first_crops / self._crops)
        enough = batches >= self._lookahead or (batches >= 2 and len(self.held) >= MANY)
        return enough or self._all_tokens >= max(MOST_TOKENS, self._lookahead * self._tokens)

    def add(self, items: Iterable[Item]) -> None:
        """Add sequences that each fit into a batch."""
        for item in items:
            self.add_pieces([item])

    def add_pieces(self, items: Iterable[Item]) -> None:
        """Add sequences that each fit into a batch; each waits for the one before it."""
        pieces = deque(items)
        for item in pieces:
            assert item.tokens <= self._tokens, f"a sequence of {item.tokens} tokens; {self._tokens} fit"
            assert self._crops is None or item.num_crops <= self._crops, f"{item.num_crops} crops; {self._crops} fit"
            self._all_tokens += item.tokens
        self._enter(pieces)

    def take(self) -> list[Item]:
        """The next batch: the oldest sequences, then the longest of the others that fit into the gap.

        Longest first for the whole batch would fill one percent more, and delay short ones for hundreds of batches.
        """
        assert self.held, "no sequences wait"
        space = _Space(self._tokens, self._crops)
        batch = []
        while self.held and space.enter(self.held[0][0]):
            batch.append(self._leave(0))
        # Sorting is stable: among equal lengths the older comes first.
        longest = sorted(range(len(self.held)), key=lambda i: -self.held[i][0].tokens)
        taken = sorted(i for i in longest if space.enter(self.held[i][0]))
        # Indices shift by the sequences that left before; following pieces enter at the end.
        return batch + [self._leave(i - gone) for gone, i in enumerate(taken)]

    def _enter(self, pieces: deque[Item]) -> None:
        if pieces:
            self.held.append(pieces)
            self._first_tokens += pieces[0].tokens
            self._first_crops += pieces[0].num_crops

    def _leave(self, index: int) -> Item:
        pieces = self.held.pop(index)
        item = pieces.popleft()
        self._first_tokens -= item.tokens
        self._first_crops -= item.num_crops
        self._all_tokens -= item.tokens
        self._enter(pieces)
        return item


class _Space:
    """The remaining space of a batch."""

    def __init__(self, tokens: int, crops: int | None):
        self._tokens, self._crops = tokens, float("inf") if crops is None else crops

    def enter(self, item: Sized) -> bool:
        """Take the space of an item, if there is enough."""
        if item.tokens > self._tokens or item.num_crops > self._crops:
            return False
        self._tokens -= item.tokens
        self._crops -= item.num_crops
        return True
