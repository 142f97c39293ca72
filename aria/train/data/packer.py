"""Sequences into batches of a fixed number of tokens: each batch begins with what has waited longest."""

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
        enough_crops = self._crops is not None and self._held_crops >= self._lookahead * self._crops
        return self._held_tokens >= self._lookahead * self._tokens or enough_crops

    def add(self, items: Iterable[Item]) -> None:
        """Sequences that each fit into a batch."""
        for item in items:
            assert item.tokens <= self._tokens, f"a sequence of {item.tokens} tokens; {self._tokens} fit"
            assert self._crops is None or item.num_crops <= self._crops, f"{item.num_crops} crops; {self._crops} fit"
            self.held.append(item)
            self._held_tokens += item.tokens
            self._held_crops += item.num_crops

    def take(self) -> list[Item]:
        """The next batch: the oldest, then of the others whatever fits, the longest first."""
        assert self.held, "there is nothing to take"
        first = self.held[0]
        taken, tokens, crops = [0], self._tokens - first.tokens, (self._crops or 0) - first.num_crops
        # Sorting is stable: among equals the older comes first.
        for i in sorted(range(1, len(self.held)), key=lambda i: -self.held[i].tokens):
            item = self.held[i]
            if item.tokens <= tokens and (self._crops is None or item.num_crops <= crops):
                taken.append(i)
                tokens -= item.tokens
                crops -= item.num_crops
        chosen = set(taken)
        batch = [self.held[i] for i in sorted(taken)]
        self._held_tokens -= sum(item.tokens for item in batch)
        self._held_crops -= sum(item.num_crops for item in batch)
        self.held = [item for i, item in enumerate(self.held) if i not in chosen]
        return batch
