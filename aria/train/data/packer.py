"""Sequences into batches of a fixed number of tokens, those first that have waited longest."""

from __future__ import annotations

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


class Packer(Generic[Item]):
    """Holds sequences until there are enough to choose from.

    Args:
        tokens: of a batch.
        crops: most of a batch; None: any number.
        lookahead: how many batches the sequences that wait would fill before one is taken.
    """

    def __init__(self, tokens: int, crops: int | None = None, lookahead: int = 8):
        self._tokens, self._crops, self._lookahead = tokens, crops, lookahead
        self.held: list[Item] = []
        """What waits, oldest first."""
        self._held_tokens = self._held_crops = 0

    @property
    def ready(self) -> bool:
        """Whether there is enough to choose from."""
        batches = self._held_tokens / self._tokens
        if self._crops is not None:
            batches = max(batches, self._held_crops / self._crops)
        return batches >= self._lookahead or (batches >= 2 and len(self.held) >= MANY)

    def add(self, items: Iterable[Item]) -> None:
        """Sequences that each fit into a batch."""
        for item in items:
            assert item.tokens <= self._tokens, f"a sequence of {item.tokens} tokens; {self._tokens} fit"
            assert self._crops is None or item.num_crops <= self._crops, f"{item.num_crops} crops; {self._crops} fit"
            self.held.append(item)
            self._held_tokens += item.tokens
            self._held_crops += item.num_crops

    def take(self) -> list[Item]:
        """The next batch: those that have waited longest, then the longest of the others that fit into the gap.

        Longest first for the whole batch would fill a percent more, and let short ones wait for hundreds of batches.
        """
        assert self.held, "there is nothing to take"
        room = _Room(self._tokens, self._crops)
        oldest = next((i for i, item in enumerate(self.held) if not room.enter(item)), len(self.held))
        taken = set(range(oldest))
        # Sorting is stable: among equals the older comes first.
        for i in sorted(range(oldest, len(self.held)), key=lambda i: -self.held[i].tokens):
            if room.enter(self.held[i]):
                taken.add(i)
        batch = [self.held[i] for i in sorted(taken)]
        self._held_tokens -= sum(item.tokens for item in batch)
        self._held_crops -= sum(item.num_crops for item in batch)
        self.held = [item for i, item in enumerate(self.held) if i not in taken]
        return batch


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
