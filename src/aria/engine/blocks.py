"""KV-cache block allocator with prefix caching and eviction.  S tokens of a block.

Only block numbers are handled here; keys and values are in `aria.model.context.PagedCache`.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from struct import pack

_DIGEST_BYTES = 32

ROOT = bytes(_DIGEST_BYTES)
"""Parent hash of a sequence's first block."""


def block_hash(parent: bytes, tokens: Sequence[int], images: Iterable[tuple[int, int, bytes]] = ()) -> bytes:
    """Hash of a full block's content and of all blocks before it.

    Args:
        parent: Hash of the previous block, or :data:`ROOT`.
        tokens: The S token ids of the block.
        images: For each image with tokens in the block: the offset of its first token from the block's first, negative
            if it starts in an earlier block; its number of tokens; and the digest of its content.

    Returns:
        32 bytes, cryptographically strong, so that a match needs no further comparison.
    """
    digest = blake2b(parent, digest_size=_DIGEST_BYTES)
    digest.update(array("q", tokens).tobytes())
    for offset, length, key in images:
        digest.update(pack("<qqq", offset, length, len(key)) + key)
    return digest.digest()


class BlockPool:
    """Allocates blocks 1 to ``num_blocks - 1``; the padding rows of a batch write to block 0.

    A block is *used* while sequences hold references to it. Without references it is *cached* if its content has a
    hash, for later sequences with the same prefix, and *free* otherwise. When no block is free, eviction overwrites the
    cached block that has been unused for longest.

    Args:
        num_blocks: Blocks of the KV cache, block 0 included.
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
        """In the order of eviction: least recently used first."""
        self._references = [0] * num_blocks
        self._hash: list[Hashable | None] = [None] * num_blocks
        self._by_hash: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Number of blocks that :meth:`allocate` can return, by eviction if needed."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that a sequence of ``tokens`` tokens takes."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Allocate blocks with one reference each and undefined content, evicting cached blocks when none is free."""
        assert count <= self.available, f"{count} blocks are needed, but {self.available} are available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._drop_hash(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in the sequence's order."""
        # Last block first: a prefix is useless without its beginning, so its end should be evicted first.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, content: Hashable) -> None:
        """Record the content hash of a full block in use. If another block has the same hash, that one is kept."""
        assert self._references[block] > 0, f"block {block} was published without being in use"
        assert self._hash[block] is None, f"block {block} was published twice"
        if content not in self._by_hash:
            self._hash[block] = content
            self._by_hash[content] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Drop the hashes of used blocks whose content turned out to be wrong."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} was withdrawn without being in use"
            if self._hash[block] is not None:
                self._drop_hash(block)

    def peek(self, hashes: Iterable[Hashable]) -> tuple[int, int]:
        """Number of leading hashes that have a block, and number of these blocks in use, which are free to share."""
        blocks = self._find(hashes)
        return len(blocks), sum(self._references[block] > 0 for block in blocks)

    def match(self, hashes: Iterable[Hashable]) -> list[int]:
        """Take a reference to the block of each leading hash that has one, and return these blocks."""
        blocks = self._find(hashes)
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        return blocks

    def clear(self) -> None:
        """Empty the prefix cache, as when weights change. No block may be in use."""
        assert self.used == 0, f"{self.used} blocks are in use"
        for block in self._cached:
            self._drop_hash(block)
        self._free += self._cached
        self._cached.clear()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the allocator is consistent, with itself and with the blocks that sequences hold."""
        held = Counter(block for blocks in holders for block in blocks)
        assert 0 not in held, "block 0 is in use"
        references = {block: count for block, count in enumerate(self._references) if count}
        assert references == held, f"references {references} are not what sequences hold, {dict(held)}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not (free | cached) & references.keys(), "a block is in two states"
        assert len(free) + len(cached) + len(references) == self.total, "blocks are lost"
        named = {block: name for block, name in enumerate(self._hash) if name is not None}
        assert named == {block: name for name, block in self._by_hash.items()}, "hashes and blocks disagree"
        assert cached == named.keys() - references.keys(), (
            "a block without content is cached, or one with content is not"
        )

    def _find(self, hashes: Iterable[Hashable]) -> list[int]:
        blocks = []
        for name in hashes:
            block = self._by_hash.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _drop_hash(self, block: int) -> None:
        name = self._hash[block]
        assert name is not None, f"block {block} is cached without content"
        self._hash[block] = None
        del self._by_hash[name]
