"""The KV-cache block allocator: states of blocks, references, content hashes, eviction."""

from __future__ import annotations

import itertools
import random

import pytest

from aria.engine.blocks import ROOT, BlockPool, block_hash


def name(number: int) -> bytes:
    return block_hash(ROOT, [number])


def states(pool: BlockPool) -> tuple[int, int, int]:
    return pool.free, pool.used, pool.cached


def test_blocks_are_allocated_once_and_block_0_never():
    pool = BlockPool(9, 4)
    blocks = pool.allocate(3) + pool.allocate(5)
    assert sorted(blocks) == list(range(1, 9))
    assert states(pool) == (0, 8, 0) and pool.available == 0 and pool.total == 8
    pool.check([blocks])
    pool.release(blocks)
    assert states(pool) == (8, 0, 0)
    pool.check([])


def test_eviction_takes_the_least_recently_used_block_when_none_is_free():
    pool = BlockPool(5, 4)
    old, new = pool.allocate(2), pool.allocate(2)
    for number, block in enumerate([*old, *new]):
        pool.publish(block, name(number))
    pool.release(old)
    pool.release(new)
    assert states(pool) == (0, 0, 4) and pool.available == 4
    # Of the older sequence its end goes first, because a beginning alone is still of use.
    assert pool.allocate(1) == [old[1]]
    assert pool.peek([name(0), name(1)]) == (1, 0)
    assert pool.match([name(0), name(1)]) == [old[0]]
    assert pool.peek([name(0)]) == (1, 1)
    assert pool.allocate(1) == [new[1]]
    assert states(pool) == (0, 3, 1)
    pool.check([old, [new[1]]])


def test_a_match_takes_references_and_stops_at_the_first_gap():
    pool = BlockPool(9, 4)
    blocks = pool.allocate(3)
    for number, block in zip((0, 1, 3), blocks, strict=True):
        pool.publish(block, name(number))
    assert pool.match([name(0), name(1), name(2), name(3)]) == blocks[:2]
    pool.release(blocks)
    assert states(pool) == (5, 2, 1)
    pool.release(blocks[:2])
    assert states(pool) == (5, 0, 3)
    pool.check([])


def test_the_first_of_two_blocks_with_the_same_content_is_kept():
    pool = BlockPool(9, 4)
    first, second = pool.allocate(2)
    pool.publish(first, name(7))
    pool.publish(second, name(7))
    assert pool.match([name(7)]) == [first]
    pool.release([second])
    assert states(pool) == (7, 1, 0), "the second has no name and is free"
    pool.release([first])
    pool.release([first])
    pool.check([])


def test_clear_empties_the_prefix_cache():
    pool = BlockPool(9, 4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], name(1))
    with pytest.raises(AssertionError, match="in use"):
        pool.clear()
    pool.release(blocks)
    pool.clear()
    assert states(pool) == (8, 0, 0) and pool.match([name(1)]) == []
    pool.check([])


def test_misuse_is_detected():
    pool = BlockPool(5, 4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="3 blocks are needed, but 2 are available"):
        pool.allocate(3)
    pool.publish(blocks[0], name(0))
    with pytest.raises(AssertionError, match="published twice"):
        pool.publish(blocks[0], name(1))
    with pytest.raises(AssertionError, match="not what sequences hold"):
        pool.check([blocks[:1]])
    with pytest.raises(AssertionError, match="not what sequences hold"):
        pool.check([blocks, blocks])
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="without being in use"):
        pool.publish(blocks[1], name(1))
    with pytest.raises(ValueError, match="expected at least 2"):
        BlockPool(1, 4)


def test_the_hash_depends_on_tokens_images_and_parents():
    tokens, image = [1, 2, 3, 4], (2, 2, b"p")
    names = [
        ROOT,
        block_hash(ROOT, tokens),
        block_hash(block_hash(ROOT, tokens), tokens),
        block_hash(ROOT, [1, 2, 4, 3]),
        block_hash(ROOT, tokens, [image]),
        block_hash(ROOT, tokens, [(2, 2, b"q")]),
        block_hash(ROOT, tokens, [(-2, 2, b"p")]),
        block_hash(ROOT, tokens, [(2, 3, b"p")]),
        block_hash(ROOT, tokens, [image, image]),
        block_hash(ROOT, tokens, [image, (4, 1, b"")]),
    ]
    assert len(set(names)) == len(names) and {len(one) for one in names} == {32}
    assert block_hash(ROOT, tuple(tokens), iter([image])) == block_hash(ROOT, tokens, [image])


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_calls_keeps_the_allocator_consistent(seed):
    """Against a plain model: the holders and the content of each block."""
    rng, fresh = random.Random(seed), itertools.count(100)
    pool = BlockPool(rng.randint(3, 20), 1)
    held: list[list[int]] = []
    content: dict[int, int] = {}
    for _ in range(600):
        action = rng.choice(["allocate", "release", "publish", "match"])
        if action == "allocate" and pool.available:
            blocks = pool.allocate(rng.randint(1, pool.available))
            assert not {block for other in held for block in other} & set(blocks), "a block in use was handed out"
            for block in blocks:
                content.pop(block, None)
            held.append(blocks)
        elif action == "release" and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif action == "publish" and held:
            block = rng.choice(rng.choice(held))
            number = rng.choice([rng.randrange(5), next(fresh)])
            if block not in content:
                pool.publish(block, name(number))
                if number not in content.values():
                    content[block] = number
        elif action == "match":
            wanted = [rng.choice([rng.randrange(5), *content.values()]) for _ in range(rng.randint(1, 4))]
            where = {number: block for block, number in content.items()}
            expected = [where[number] for number in itertools.takewhile(where.__contains__, wanted)]
            found = pool.match([name(number) for number in wanted])
            assert found == expected, "a content was lost or is another's"
            if found:
                held.append(found)
        pool.check(held)
    for blocks in held:
        pool.release(blocks)
    pool.check([])
    assert states(pool) == (pool.total - len(content), 0, len(content))
