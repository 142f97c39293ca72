"""Drawing tokens on the device: the least score kept of each row, then the largest noisy score above it.

N sequences, V vocabulary. Two launches whatever the rows ask for: a row that keeps all its tokens leaves the first at
once, a greedy row draws without noise in the second.

Nothing is sorted. The least score kept is searched for among the bits of the scores. A first pass over the row, which
lies in the L2 cache, leaves the peak of each lane of a block; above any bound lie at least as many scores as peaks, and
that gives a bound below the likeliest. A second pass gathers the scores above it. If all that is kept is among them, as
it is of a trained model's scores, bisection goes on in registers; if not, every further pass over the row makes the
interval eight times narrower.
"""

# Tuples grow by adding: Triton knows no unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops.sampling import GROUP, LANES

SEARCH_BLOCK = 4096
"""Scores that a program of the search looks at together, and most that it gathers."""
GATHERED = 1024
"""Scores that are gathered, about, where top_k does not say."""
MAX_PROGRAMS = 2048
"""Programs of the drawing launch, about as many as an H100 keeps resident."""


@triton.jit
def _scores(row, ids, banned, V: tl.constexpr, BANNED: tl.constexpr):
    scores = tl.load(row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(BANNED):
        scores = tl.where(ids == tl.load(banned + i), float("-inf"), scores)
    return scores


@triton.jit
def _key(scores, SHIFT: tl.constexpr):
    """Integers in the order of the scores; SHIFT drops the bits that are always alike (16 for bfloat16)."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _score(key, SHIFT: tl.constexpr):
    """The largest score of a key."""
    bits = (key << SHIFT) | ((1 << SHIFT) - 1)
    if SHIFT > 0:
        # Bits that were dropped are zeros of a positive score, and turned zeros of a negative one.
        bits = tl.where(key < 0, bits, key << SHIFT)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(
    row, banned, pivots, floor, most, temperature,
    V: tl.constexpr, BANNED: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores lie above each of the pivots; with MASS the probability, times a factor, of those above floor."""
    sums = ()
    for _ in tl.static_range(len(pivots)):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + tl.arange(0, BLOCK), banned, V, BANNED)
        keys = _key(scores, SHIFT)
        weights = tl.full([BLOCK], 1.0, tl.float32)
        if MASS:
            weights = tl.where(keys > floor, tl.exp((scores - most) / temperature), 0.0)
        new = ()
        for i in tl.static_range(len(pivots)):
            new = new + (sums[i] + tl.where(keys > pivots[i], weights, 0.0),)
        sums = new
    totals = ()
    for i in tl.static_range(len(pivots)):
        totals = totals + (tl.sum(sums[i]),)
    return totals


@triton.jit
def _search(
    row, banned, target, low, high, floor, most, temperature,
    V: tl.constexpr, BANNED: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least key that has less than ``target`` above it, given that ``low`` has not and ``high`` has."""
    while high - low > 1:
        pivots = ()
        for i in tl.static_range(1, 8):
            pivots = pivots + ((low + (high - low) * i // 8).to(tl.int32),)
        totals = _above(row, banned, pivots, floor, most, temperature, V, BANNED, MASS, SHIFT, BLOCK)
        for i in tl.static_range(7):
            pivot = pivots[i].to(tl.int64)
            low = tl.where(totals[i] < target, low, tl.maximum(low, pivot))
            high = tl.where(totals[i] < target, tl.minimum(high, pivot), high)
    return high


@triton.jit
def _bisect(keys, weights, target, low, high):
    """As _search, over keys that are at hand."""
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0.0)) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return high


@triton.jit
def _gather(
    row, banned, low, most, temperature, gathered, with_mass,
    V: tl.constexpr, BANNED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write keys above ``low`` to ``gathered``, at most BLOCK. Gives how many there are, and the mass of the row."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + tl.arange(0, BLOCK), banned, V, BANNED)
        keys = _key(scores, SHIFT)
        if with_mass:
            mass += tl.exp((scores - most) / temperature)
        above = (keys > low).to(tl.int32)
        if tl.max(above) > 0:
            place = count + tl.cumsum(above) - above
            tl.store(gathered + place, keys, mask=(above > 0) & (place < BLOCK))
            count += tl.sum(above)
    tl.debug_barrier()
    return count, tl.sum(mass)


# One variant serves all batches: where rows and positions start, and how a row is split, changes with their size.
@triton.jit(do_not_specialize_on_alignment=["rows"])
def _threshold_kernel(
    logits, rows, table, banned, gathered, thresholds, arrived, stride,
    C: tl.constexpr, V: tl.constexpr, BANNED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """The least score that each sequence keeps; also sets its count of finished programs to 0."""
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    gathered += n * BLOCK
    settings = table + tl.load(rows + n) * C
    temperature = tl.load(settings).to(tl.float32, bitcast=True)
    top_k = tl.load(settings + 1)
    top_p = tl.load(settings + 2).to(tl.float32, bitcast=True)
    min_p = tl.load(settings + 3).to(tl.float32, bitcast=True)
    threshold = tl.full([], float("-inf"), tl.float32)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        lanes = tl.arange(0, BLOCK)
        peaks = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            peaks = tl.maximum(peaks, _scores(row, start + lanes, banned, V, BANNED))
        most = tl.max(peaks)
        if (top_k > 0) | (top_p < 1):
            high = _key(most, SHIFT).to(tl.int64)
            floor = _key(tl.full([], float("-inf"), tl.float32), SHIFT).to(tl.int64) - 1
            k = top_k.to(tl.float32)
            wanted = tl.where(top_k > 0, tl.minimum(k, BLOCK), GATHERED)
            low = _bisect(_key(peaks, SHIFT), tl.full([BLOCK], 1.0, tl.float32), wanted, floor, high) - 1
            low = tl.where(top_k > BLOCK, floor, low)
            count, mass = _gather(row, banned, low, most, temperature, gathered, (top_k == 0), V, BANNED, SHIFT, BLOCK)
            least = high
            found = count <= BLOCK
            if found:
                keys = tl.load(gathered + lanes, mask=lanes < count, other=-(1 << 31))
                weights = (lanes < count).to(tl.float32)
                if top_k > 0:
                    least = _bisect(keys, weights, k, low, high)
                    low = least - 1
                if top_p < 1:
                    probability = tl.exp((_score(keys, SHIFT) - most) / temperature)
                    weights = tl.where((lanes < count) & (keys > low.to(tl.int32)), probability, 0.0)
                    inside = tl.sum(weights)
                    mass = tl.where(top_k > 0, inside, mass)
                    found = inside >= top_p * mass
                    if found:
                        least = _bisect(keys, weights, top_p * mass, low, high)
            if not found:
                if top_k > 0:
                    least = _search(row, banned, k, low, high, floor, most, temperature, V, BANNED, False, SHIFT, BLOCK)
                    floor = least - 1
                if top_p < 1:
                    # Below this all probabilities are 0 in float32.
                    low = tl.maximum(floor, _key(most - 104 * temperature, SHIFT).to(tl.int64) - 1)
                    mass = _above(row, banned, (low,), low, most, temperature, V, BANNED, True, SHIFT, BLOCK)[0]
                    least = _search(
                        row, banned, top_p * mass, low, high, low, most, temperature, V, BANNED, True, SHIFT, BLOCK
                    )
            threshold = _score(least.to(tl.int32), SHIFT)
        if min_p > 0:
            threshold = tl.maximum(threshold, most + temperature * tl.log(min_p))
    tl.store(thresholds + n, threshold)
    tl.store(arrived + n, 0)


@triton.jit
def _gumbel(bits):
    """See :func:`aria.ops.sampling.gumbel_noise`; the series takes over where 1 - u loses the bits of u."""
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1 - u)))


@triton.jit(do_not_specialize=["stretch", "splits"], do_not_specialize_on_alignment=["rows", "positions"])
def _draw_kernel(
    logits, rows, positions, table, banned, thresholds, arrived, values, places, tokens, stride, stretch, splits,
    C: tl.constexpr, V: tl.constexpr, BANNED: tl.constexpr, LANES: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """``stretch`` groups of one sequence's ids; the program that ends last compares what all ``splits`` have found."""
    n, split = tl.program_id(0), tl.program_id(1)
    row = logits + n.to(tl.int64) * stride
    settings = table + tl.load(rows + n) * C
    temperature = tl.load(settings).to(tl.float32, bitcast=True)
    threshold = tl.load(thresholds + n)
    key_low, key_high = tl.load(settings + 4).to(tl.uint32), tl.load(settings + 5).to(tl.uint32)
    position = tl.load(positions + n).to(tl.uint32)
    lanes = tl.arange(0, LANES)
    best = tl.full([LANES], float("-inf"), tl.float32)
    place = tl.zeros([LANES], tl.int32)
    for group in range(split * stretch, (split + 1) * stretch):
        ids = group * LANES * 4 + lanes
        if temperature > 0:
            scores = ()
            for w in tl.static_range(4):
                scores = scores + (_scores(row, ids + w * LANES, banned, V, BANNED),)
            top = tl.maximum(tl.maximum(scores[0], scores[1]), tl.maximum(scores[2], scores[3]))
            if (tl.max(top) >= threshold) & (tl.max(top) > float("-inf")):
                zero = tl.zeros([LANES], tl.uint32)
                counters = (group * LANES + lanes).to(tl.uint32)
                words = tl.philox_impl(counters, zero + position, zero, zero, zero + key_low, zero + key_high)
                for w in tl.static_range(4):
                    noisy = scores[w] / temperature + _gumbel(words[w])
                    better = (scores[w] >= threshold) & (noisy > best)
                    place = tl.where(better, ids + w * LANES, place)
                    best = tl.where(better, noisy, best)
        else:
            for w in tl.static_range(4):
                scores_w = _scores(row, ids + w * LANES, banned, V, BANNED)
                place = tl.where(scores_w > best, ids + w * LANES, place)
                best = tl.maximum(best, scores_w)
    value = tl.max(best)
    place_of_value = tl.min(tl.where(best == value, place, V))
    tl.store(values + n * splits + split, value)
    tl.store(places + n * splits + split, place_of_value)
    tl.debug_barrier()
    if tl.atomic_add(arrived + n, 1, sem="acq_rel") == splits - 1:
        part = tl.arange(0, MOST_SPLITS)
        found = tl.load(values + n * splits + part, mask=part < splits, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(places + n * splits + part, mask=part < splits, other=V, cache_modifier=".cg")
        # The lowest id of those that are alike, as everywhere.
        token = tl.min(tl.where(found == tl.max(found), where, V))
        tl.store(tokens + n, tl.minimum(token, V - 1).to(tl.int64))


def sample(logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor, table_RC: Tensor, banned: Tensor) -> Tensor:
    """See :func:`aria.ops.sampling.sample`; nothing waits for the host, and shapes do not depend on the rows."""
    N, V = logits_NV.shape
    assert logits_NV.stride(1) == 1, "each sequence's scores should lie together"
    assert table_RC.is_contiguous() and table_RC.dtype == torch.int32, "the table of settings is int32, row by row"
    device = logits_NV.device
    block = min(SEARCH_BLOCK, triton.next_power_of_2(V))
    groups = -(-V // GROUP)
    stretch = -(-groups // min(groups, -(-MAX_PROGRAMS // N)))
    splits = -(-groups // stretch)
    thresholds = torch.empty(N, dtype=torch.float32, device=device)
    arrived = torch.empty(N, dtype=torch.int32, device=device)
    gathered = torch.empty(N, block, dtype=torch.int32, device=device)
    values = torch.empty(N, splits, dtype=torch.float32, device=device)
    places = torch.empty(N, splits, dtype=torch.int32, device=device)
    tokens = torch.empty(N, dtype=torch.int64, device=device)
    stride, columns = logits_NV.stride(0), table_RC.shape[1]
    shift = 16 if logits_NV.dtype == torch.bfloat16 else 0
    _threshold_kernel[(N,)](
        logits_NV, rows_N, table_RC, banned, gathered, thresholds, arrived, stride,
        C=columns, V=V, BANNED=len(banned), SHIFT=shift, BLOCK=block, GATHERED=min(GATHERED, block // 2),
        num_warps=max(4, block // 256),
    )  # fmt: skip
    _draw_kernel[(N, splits)](
        logits_NV, rows_N, positions_N, table_RC, banned, thresholds, arrived, values, places, tokens,
        stride, stretch, splits,
        C=columns, V=V, BANNED=len(banned), LANES=LANES, MOST_SPLITS=triton.next_power_of_2(groups), num_warps=4,
    )  # fmt: skip
    return tokens
