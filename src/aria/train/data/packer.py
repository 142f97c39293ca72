"""Sequences into batches of a fixed number of tokens, those first that have waited longest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What is packed."""

    @property
    def tokens(self) -> int: ...

    @property
    def num_crops(self) -> int: ...


Item = TypeVar("Item", bound=Sized)


MANY = 128
"""Sequences that are enough to choose from, if they fill two batches."""
MOST_TOKENS = 1 << 24
"""Tokens that wait, pieces of documents included, at which no more is added: 256 MiB."""


class Packer(Generic[Item]):
    """Holds sequences until there are enough to choose from.

    Pieces of one document enter one by one: each after the one before it was taken, behind all that wait. So a batch,
    and the next ones, hold pieces of as many documents as wait together.

    Args:
        tokens: of a batch.
        crops: most of a batch; None: any number.
        lookahead: how many batches the sequences that can be taken would fill before one is taken.
    """

    def __init__(self, tokens: int, crops: int | None = None, lookahead: int = 8):
        self._tokens, self._crops, self._lookahead = tokens, crops, lookahead
        self.held: list[deque[Item]] = []
        """What waits, oldest first: a sequence that can be taken, and the pieces that follow it."""
        self._first_tokens = self._first_crops = self._all_tokens = 0

    @property
    def ready(self) -> bool:
        """Whether there is enough to choose from."""
        batches = self._first_tokens / self._tokens
        if self._crops is not None:
            batches = max(batches, self._first_crops / self._crops)
        enough = batches >= self._lookahead or (batches >= 2 and len(self.held) >= MANY)
        return enough or self._all_tokens >= max(MOST_TOKENS, self._lookahead * self._tokens)

    def add(self, items: Iterable[Item]) -> None:
        """Sequences that each fit into a batch."""
        for item in items:
            self.add_pieces([item])

    def add_pieces(self, items: Iterable[Item]) -> None:
        """Sequences that each fit into a batch, and of which each is to wait for the one before it."""
        pieces = deque(items)
        for item in pieces:
            assert item.tokens <= self._tokens, f"a sequence of {item.tokens} tokens; {self._tokens} fit"
            assert self._crops is None or item.num_crops <= self._crops, f"{item.num_crops} crops; {self._crops} fit"
            self._all_tokens += item.tokens
        self._enter(pieces)

    def take(self) -> list[Item]:
        """The next batch: those that have waited longest, then the longest of the others that fit into the gap.

        Longest first for the whole batch would fill a percent more, and let short ones wait for hundreds of batches.
        """
        assert self.held, "there is nothing to take"
        room = _Room(self._tokens, self._crops)
        batch = []
        while self.held and room.enter(self.held[0][0]):
            batch.append(self._leave(0))
        # Sorting is stable: among equals the older comes first.
        longest = sorted(range(len(self.held)), key=lambda i: -self.held[i][0].tokens)
        taken = sorted(i for i in longest if room.enter(self.held[i][0]))
        # What left before stood before, and what follows it is at the end.
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


class _Room:
    """What is left of a batch."""

    def __init__(self, tokens: int, crops: int | None):
        self._tokens, self._crops = tokens, float("inf") if crops is None else crops

    def enter(self, item: Sized) -> bool:
        """Take the room of an item, if there is enough."""
        if item.tokens > self._tokens or item.num_crops > self._crops:
            return False
        self._tokens -= item.tokens
        self._crops -= item.num_crops
        return True
