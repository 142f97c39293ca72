"""The paged cache's books: which block is free, used, or kept for its content.  S tokens of a block.

Only numbers live here; the keys and values themselves are in `aria.model.context.PagedCache`.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from struct import pack

_DIGEST_BYTES = 32

ROOT = bytes(_DIGEST_BYTES)
"""Parent of a sequence's first block."""


def block_hash(parent: bytes, tokens: Sequence[int], images: Iterable[tuple[int, int, bytes]] = ()) -> bytes:
    """Name of a full block's content, that of all blocks before it included.

    Args:
        parent: name of the block before, or :data:`ROOT`.
        tokens: the S token ids of the block.
        images: of each image with tokens in the block: its first token's place counted from the block's first,
            negative if it starts in an earlier block; how many tokens it has; and the digest of its content.

    Returns:
        32 bytes; equal only for equal content, so a match needs no further comparison.
    """
    digest = blake2b(parent, digest_size=_DIGEST_BYTES)
    digest.update(array("q", tokens).tobytes())
    for offset, length, key in images:
        digest.update(pack("<qqq", offset, length, len(key)) + key)
    return digest.digest()


class BlockPool:
    """Hands out blocks 1 to ``num_blocks - 1``; block 0 is scratch for rows that only fill up a batch.

    A block is *used* while sequences hold references to it; *cached* when none does but its content has a name, so
    that a later sequence may take it, or anyone may have it overwritten, the longest unused first; else *free*.

    Args:
        num_blocks: blocks of the cache, the scratch block included.
        block_size: S.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"a cache of {num_blocks} blocks of {block_size} tokens; expected at least 2 of at least 1"
            )
        self.total = num_blocks - 1
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Longest unused first."""
        self._references = [0] * num_blocks
        self._name: list[Hashable | None] = [None] * num_blocks
        self._named: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that :meth:`allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each and any content; what was cached goes when nothing is free."""
        assert count <= self.available, f"{count} blocks wanted of {self.available}"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each of a sequence's blocks, which are in its order."""
        # The last first: a chain is useless without its beginning, so its end should be overwritten first.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was given back twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._name[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, name: Hashable) -> None:
        """Say what a used block holds once it is full. If another block holds the same already, that one stays."""
        assert self._references[block] > 0, f"block {block} was published without being in use"
        assert self._name[block] is None, f"block {block} was published twice"
        if name not in self._named:
            self._name[block] = name
            self._named[name] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Forget what used blocks hold: it was published and turned out to be wrong."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} was withdrawn without being in use"
            if self._name[block] is not None:
                self._forget(block)

    def peek(self, names: Iterable[Hashable]) -> tuple[int, int]:
        """How many leading names are known, and how many of those blocks are in use (so that sharing them is free)."""
        blocks = self._find(names)
        return len(blocks), sum(self._references[block] > 0 for block in blocks)

    def match(self, names: Iterable[Hashable]) -> list[int]:
        """The blocks of the leading names that are known, with a reference taken to each."""
        blocks = self._find(names)
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return blocks

    def clear(self) -> None:
        """Forget all content, as when weights change. No block may be in use."""
        assert self.used == 0, f"{self.used} blocks are in use"
        for block in self._cached:
            self._forget(block)
        self._free += self._cached
        self._cached.clear()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with each other and with the blocks that sequences hold."""
        held = Counter(block for blocks in holders for block in blocks)
        assert 0 not in held, "the scratch block is in use"
        references = {block: count for block, count in enumerate(self._references) if count}
        assert references == held, f"references {references} are not what sequences hold, {dict(held)}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not (free | cached) & references.keys(), "a block is in two states"
        assert len(free) + len(cached) + len(references) == self.total, "blocks are lost"
        named = {block: name for block, name in enumerate(self._name) if name is not None}
        assert named == {block: name for name, block in self._named.items()}, "names and blocks disagree"
        assert cached == named.keys() - references.keys(), "a block is cached without content, or has content unkept"

    def _find(self, names: Iterable[Hashable]) -> list[int]:
        blocks = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _forget(self, block: int) -> None:
        name = self._name[block]
        assert name is not None, f"block {block} is cached without content"
        self._name[block] = None
        del self._named[name]
