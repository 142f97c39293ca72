"""Sampling tokens on the device: the lowest logit that each row keeps, then the largest noisy logit above it.

N sequences, V vocabulary, C columns of the table of settings. Logits of banned tokens are -inf; "scores" are logits in
float32. There are three launches, whatever the settings: a row that keeps all tokens exits the first two at once, and a
greedy row draws without noise in the third.

Nothing is sorted. The lowest score kept is searched among the bits of the scores, in two passes over a row that many
programs share; the last program to finish continues alone. After the first pass it knows the peak and the mass of each
small group of tokens and one of its scores: the peaks bound the top_k, the mass and the samples estimate where a
nucleus ends. The second pass gathers the scores between two such bounds. If the end is among them, as nearly always, it
is found in registers; if not, each further pass over the row makes the interval eight times narrower.

Masses of gathered scores are integers, so that they do not depend on the order of the programs.
"""

# Tuples are concatenated: Triton has no unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.registry import Where
from aria.ops.sampling import GROUP, LANES

BLOCK = 2048
"""Scores that a program of the search reads at a time."""
PEAKS = 4096
"""Maximum number of groups of scores whose peaks are compared."""
CAPACITY = 4096
"""Maximum number of gathered scores."""
LIKELIEST = 1024
"""Minimum number of gathered scores without top_k."""
SEARCHING = 1024
"""Maximum number of programs of a search, unless there are more rows."""
REGISTERS = 80
"""Maximum registers per thread of the search, so that three programs fit on a multiprocessor."""
DRAWING = 2048
"""Programs of the draw, about as many as are resident on an H100."""


@triton.jit
def _scores(row, ids, banned, V: tl.constexpr, BANNED: tl.constexpr):
    scores = tl.load(row + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    for i in tl.static_range(BANNED):
        scores = tl.where(ids == tl.load(banned + i), float("-inf"), scores)
    return scores


@triton.jit
def _key(scores, SHIFT: tl.constexpr):
    """Integers in the order of the scores; SHIFT drops the bits that are always equal (16 for bfloat16)."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _score(key, SHIFT: tl.constexpr):
    """The largest score of a key."""
    bits = (key << SHIFT) | ((1 << SHIFT) - 1)
    if SHIFT > 0:
        # The dropped bits are zeros of a positive score and inverted zeros of a negative one.
        bits = tl.where(key < 0, bits, key << SHIFT)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(
    row, banned, pivots, bottom, most, temperature,
    V: tl.constexpr, BANNED: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores are above each of the pivots; with MASS, the scaled probability of those above the bottom."""
    sums = ()
    for _ in tl.static_range(len(pivots)):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + tl.arange(0, BLOCK), banned, V, BANNED)
        keys = _key(scores, SHIFT)
        weights = tl.full([BLOCK], 1.0, tl.float32)
        if MASS:
            weights = tl.where(keys > bottom, tl.exp((scores - most) / temperature), 0.0)
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
    row, banned, target, low, high, bottom, most, temperature,
    V: tl.constexpr, BANNED: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest key with less than ``target`` above it, given that ``low`` has more and ``high`` has less."""
    while high - low > 1:
        pivots = ()
        for i in tl.static_range(1, 8):
            pivots = pivots + ((low + (high - low) * i // 8).to(tl.int32),)
        totals = _above(row, banned, pivots, bottom, most, temperature, V, BANNED, MASS, SHIFT, BLOCK)
        for i in tl.static_range(7):
            pivot = pivots[i].to(tl.int64)
            low = tl.where(totals[i] < target, low, tl.maximum(low, pivot))
            high = tl.where(totals[i] < target, tl.minimum(high, pivot), high)
    return high


@triton.jit
def _bisect(keys, weights, target, low, high):
    """Like :func:`_search`, over keys in registers."""
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0)) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return high


@triton.jit
def _settings(rows, table, n, C: tl.constexpr):
    """Temperature, top_k, top_p and min_p of a sequence."""
    settings = table + tl.load(rows + n) * C
    temperature = tl.load(settings).to(tl.float32, bitcast=True)
    top_p = tl.load(settings + 2).to(tl.float32, bitcast=True)
    return temperature, tl.load(settings + 1), top_p, tl.load(settings + 3).to(tl.float32, bitcast=True)


@triton.jit
def _bounds(
    tops, masses, some, most, temperature, top_k, top_p,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, LIKELIEST: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Keys ``low`` and ``high``: the lowest one kept should be above ``low`` and not above ``high``.

    Args:
        tops, masses, some: of each group of WIDTH scores the largest, the sum of the exponentials of their distances to
            it, and the first.
    """
    keys = _key(tops, SHIFT)
    ones = tl.full([GROUPS], 1, tl.int32)
    bottom = _key(tl.full([], float("-inf"), tl.float32), SHIFT).to(tl.int64) - 1
    high = _key(most, SHIFT).to(tl.int64)
    # There are at least as many scores as peaks above any bound.
    wanted = tl.where(top_k > 0, tl.minimum(top_k, GROUPS), LIKELIEST)
    low = _bisect(keys, ones, wanted, bottom, high) - 1
    low = tl.where(top_k > GROUPS, bottom, low)
    if top_k == 0:
        # Scores below the top ones are so even that one of them represents WIDTH.
        mass = tl.sum(tl.where(tops > float("-inf"), masses * tl.exp((tops - most) / temperature), 0.0))
        keys = _key(some, SHIFT)
        rest = tl.where(keys <= low.to(tl.int32), WIDTH * tl.exp((some - most) / temperature), 0.0)
        total = tl.sum(rest)
        if total > 0.5 * (1 - top_p) * mass:
            # Below this all probabilities are 0 in float32.
            bottom = tl.maximum(bottom, _key(most - 104 * temperature, SHIFT).to(tl.int64) - 1)
            middle = low
            if total > (1 - top_p) * mass:
                middle = _bisect(keys, rest, total - (1 - top_p) * mass, bottom, low)
            # As many on both sides as the capacity allows.
            SLACK: tl.constexpr = CAPACITY * 3 // (8 * WIDTH)
            count = tl.sum((keys > middle.to(tl.int32)).to(tl.int32))
            if count > SLACK:
                high = _bisect(keys, ones, count - SLACK, middle, high)
            low = _bisect(keys, ones, count + SLACK, bottom, middle) - 1
    return low, high


# One variant serves all batches: the alignment of rows and positions and the split of a row change with the batch.
@triton.jit(do_not_specialize=["stretch"], do_not_specialize_on_alignment=["rows"])
def _bounds_kernel(
    logits, rows, table, banned, groups, bounds, sums, counts, thresholds, arrivals, stride, stretch,
    C: tl.constexpr, V: tl.constexpr, BANNED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, LIKELIEST: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """The first pass, by programs of ``stretch`` blocks. Writes bounds ``(N, 3)``, low, high and the bits of the
    largest score, and zeros to sums and counts; or a threshold, if that is enough."""
    n, split = tl.program_id(0), tl.program_id(1)
    temperature, top_k, top_p, min_p = _settings(rows, table, n, C)
    searched = (temperature > 0) & ((top_k > 0) | (top_p < 1))
    if (not searched) & ((temperature <= 0) | (min_p <= 0)):
        if split == 0:
            tl.store(thresholds + n, float("-inf"))
            tl.store(counts + n * 3 + 2, 0)
        return
    row = logits + n.to(tl.int64) * stride
    groups += n * 3 * GROUPS
    PART: tl.constexpr = BLOCK // WIDTH
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, BLOCKS)):
        scores = _scores(row, block * BLOCK + tl.arange(0, BLOCK), banned, V, BANNED)
        scores = tl.reshape(scores, (PART, WIDTH))
        peaks = tl.max(scores, axis=1)
        distances = tl.where(scores > float("-inf"), tl.exp((scores - peaks[:, None]) / temperature), 0.0)
        part = block * PART + tl.arange(0, PART)
        tl.store(groups + part, peaks)
        tl.store(groups + GROUPS + part, tl.sum(distances, axis=1))
        tl.store(groups + 2 * GROUPS + part, _scores(row, part * WIDTH, banned, V, BANNED))
    tl.debug_barrier()
    if tl.atomic_add(arrivals + n, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        group = tl.arange(0, GROUPS)
        there = group < BLOCKS * PART
        tops = tl.load(groups + group, mask=there, other=float("-inf"), cache_modifier=".cg")
        most = tl.max(tops)
        if searched:
            masses = tl.load(groups + GROUPS + group, mask=there, other=0.0, cache_modifier=".cg")
            some = tl.load(groups + 2 * GROUPS + group, mask=there, other=float("-inf"), cache_modifier=".cg")
            low, high = _bounds(
                tops, masses, some, most, temperature, top_k, top_p, SHIFT, WIDTH, GROUPS, LIKELIEST, CAPACITY
            )
            tl.store(bounds + n * 3, low.to(tl.int32))
            tl.store(bounds + n * 3 + 1, high.to(tl.int32))
            tl.store(bounds + n * 3 + 2, most.to(tl.int32, bitcast=True))
            tl.store(sums + n * 2 + tl.arange(0, 2), tl.zeros([2], tl.int64))
        else:
            tl.store(thresholds + n, most + temperature * tl.log(min_p))
        tl.store(counts + n * 3, 0)
        tl.store(counts + n * 3 + 1, 0)
        tl.store(counts + n * 3 + 2, 0)
        tl.store(arrivals + n, 0)


@triton.jit
def _mass(scores, most, temperature):
    """Scaled probabilities as integers of 45 bits."""
    return tl.where(scores > float("-inf"), tl.exp((scores - most) / temperature) * 2.0**44, 0.0).to(tl.int64)


@triton.jit
def _least(
    row, banned, keys, there, mass, beyond, low, high, most, temperature, top_k, top_p, found,
    V: tl.constexpr, BANNED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest key kept: among the gathered ``keys`` if it is there, else by passes over the row."""
    top = _key(most, SHIFT).to(tl.int64)
    k = top_k.to(tl.int64)
    least = high
    if found:
        inside = there
        if top_k > 0:
            least = _bisect(keys, there.to(tl.int64), k, low, high)
            inside = there & (keys >= least.to(tl.int32))
            low = least - 1
        if top_p < 1:
            weights = tl.where(inside, _mass(_score(keys, SHIFT), most, temperature), 0)
            gathered = tl.sum(weights)
            target = top_p.to(tl.float64) * tl.where(top_k > 0, gathered, mass).to(tl.float64) - beyond.to(tl.float64)
            found = (target > 0) & (gathered.to(tl.float64) >= target)
            if found:
                least = _bisect(keys, weights, target, low, high)
    if not found:
        bottom = _key(tl.full([], float("-inf"), tl.float32), SHIFT).to(tl.int64) - 1
        if top_k > 0:
            least = _search(
                row, banned, k.to(tl.float32), bottom, top, bottom, most, temperature,
                V, BANNED, False, SHIFT, BLOCK,
            )  # fmt: skip
            bottom = least - 1
        if top_p < 1:
            # Below this all probabilities are 0 in float32.
            low = tl.maximum(bottom, _key(most - 104 * temperature, SHIFT).to(tl.int64) - 1)
            total = _above(row, banned, (low,), low, most, temperature, V, BANNED, True, SHIFT, BLOCK)[0]
            least = _search(row, banned, top_p * total, low, top, low, most, temperature, V, BANNED, True, SHIFT, BLOCK)
    return least


@triton.jit(do_not_specialize=["stretch"], do_not_specialize_on_alignment=["rows"])
def _gather_kernel(
    logits, rows, table, banned, bounds, sums, counts, gathered, thresholds, stride, stretch,
    C: tl.constexpr, V: tl.constexpr, BANNED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The second pass, and the lowest score that each sequence keeps."""
    n, split = tl.program_id(0), tl.program_id(1)
    temperature, top_k, top_p, min_p = _settings(rows, table, n, C)
    if (temperature <= 0) | ((top_k == 0) & (top_p >= 1)):
        return
    row = logits + n.to(tl.int64) * stride
    low, high = tl.load(bounds + n * 3), tl.load(bounds + n * 3 + 1)
    most = tl.load(bounds + n * 3 + 2).to(tl.float32, bitcast=True)
    sums += n * 2
    counts += n * 3
    gathered += n * CAPACITY
    for block in range(split * stretch, tl.minimum((split + 1) * stretch, (V + BLOCK - 1) // BLOCK)):
        scores = _scores(row, block * BLOCK + tl.arange(0, BLOCK), banned, V, BANNED)
        keys = _key(scores, SHIFT)
        if top_k == 0:
            weights = _mass(scores, most, temperature)
            tl.atomic_add(sums, tl.sum(weights), sem="relaxed")
            tl.atomic_add(sums + 1, tl.sum(tl.where(keys > high, weights, 0)), sem="relaxed")
        inside = (keys > low) & (keys <= high)
        amount = tl.sum(inside.to(tl.int32))
        if amount > 0:
            place = tl.atomic_add(counts, amount, sem="relaxed") + tl.cumsum(inside.to(tl.int32)) - 1
            tl.store(gathered + place, keys, mask=inside & (place < CAPACITY))
    tl.debug_barrier()
    if tl.atomic_add(counts + 1, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        count = tl.load(counts, cache_modifier=".cg")
        mass, beyond = tl.load(sums, cache_modifier=".cg"), tl.load(sums + 1, cache_modifier=".cg")
        lanes = tl.arange(0, CAPACITY)
        there = lanes < count
        found = tl.load(gathered + lanes, mask=there, other=-(1 << 31), cache_modifier=".cg")
        least = _least(
            row, banned, found, there, mass, beyond, low.to(tl.int64), high.to(tl.int64), most, temperature,
            top_k, top_p, count <= CAPACITY, V, BANNED, SHIFT, BLOCK,
        )  # fmt: skip
        threshold = _score(least.to(tl.int32), SHIFT)
        if min_p > 0:
            threshold = tl.maximum(threshold, most + temperature * tl.log(min_p))
        tl.store(thresholds + n, threshold)


@triton.jit
def _gumbel(bits):
    """See :func:`aria.ops.sampling.gumbel_noise`; a series is used where 1 - u loses the bits of u."""
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1 - u)))


@triton.jit(do_not_specialize=["stretch", "splits"], do_not_specialize_on_alignment=["rows", "positions"])
def _draw_kernel(
    logits, rows, positions, table, banned, thresholds, counts, values, places, tokens, stride, stretch, splits,
    C: tl.constexpr, V: tl.constexpr, BANNED: tl.constexpr, LANES: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """``stretch`` groups of one sequence's ids; the last program to finish compares the results of all ``splits``."""
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
    if tl.atomic_add(counts + n * 3 + 2, 1, sem="acq_rel") == splits - 1:
        part = tl.arange(0, MOST_SPLITS)
        found = tl.load(values + n * splits + part, mask=part < splits, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(places + n * splits + part, mask=part < splits, other=V, cache_modifier=".cg")
        # The lowest id among equal ones, as everywhere.
        token = tl.min(tl.where(found == tl.max(found), where, V))
        tl.store(tokens + n, tl.minimum(token, V - 1).to(tl.int64))


def thresholds(
    logits_NV: Tensor, rows_N: Tensor, table_RC: Tensor, banned: Tensor, arrivals: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The lowest score that each sequence keeps, float32 ``(N,)``, -inf where it keeps all; and counters for the draw.

    Like :func:`aria.ops.sampling.thresholds`. ``arrivals`` are those of :func:`aria.ops.sample`.
    """
    N, V = logits_NV.shape
    device, pow2 = logits_NV.device, triton.next_power_of_2
    block = min(BLOCK, pow2(V))
    blocks, width = -(-V // block), min(block, pow2(-(-V // PEAKS)))
    groups = pow2(blocks * block // width)
    stretch = -(-blocks // min(blocks, -(-SEARCHING // N)))
    splits = -(-blocks // stretch)
    tables = torch.empty(N, 3, groups, dtype=torch.float32, device=device)
    bounds, counts = (torch.empty(N, 3, dtype=torch.int32, device=device) for _ in range(2))
    sums = torch.empty(N, 2, dtype=torch.int64, device=device)
    gathered = torch.empty(N, CAPACITY, dtype=torch.int32, device=device)
    least = torch.empty(N, dtype=torch.float32, device=device)
    if arrivals is None:
        arrivals = torch.zeros(N, dtype=torch.int32, device=device)
    assert arrivals.numel() >= N, f"{N} sequences are more than {arrivals.numel()}"
    assert V < 1 << 18, f"masses of {V} scores may not fit into 64 bits"
    sizes = {"C": table_RC.shape[1], "V": V, "BANNED": len(banned), "BLOCK": block, "CAPACITY": CAPACITY}
    sizes |= {"SHIFT": 16 if logits_NV.dtype == torch.bfloat16 else 0}
    options = {"num_warps": max(4, block // 256), "maxnreg": REGISTERS}
    _bounds_kernel[N, splits](
        logits_NV, rows_N, table_RC, banned, tables, bounds, sums, counts, least, arrivals,
        logits_NV.stride(0), stretch,
        WIDTH=width, GROUPS=groups, LIKELIEST=min(LIKELIEST, groups), **sizes, **options,
    )  # fmt: skip
    _gather_kernel[N, splits](
        logits_NV, rows_N, table_RC, banned, bounds, sums, counts, gathered, least,
        logits_NV.stride(0), stretch, **sizes, **options,
    )  # fmt: skip
    return least, counts


@operations.sample.register(Where.GPU)
def sample_triton(
    logits_NV: Tensor, rows_N: Tensor, positions_N: Tensor, table_RC: Tensor, banned: Tensor,
    arrivals: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Nothing waits for the host, and shapes do not depend on the rows."""
    N, V = logits_NV.shape
    assert logits_NV.stride(1) == 1, "each sequence's logits must be contiguous"
    assert table_RC.is_contiguous() and table_RC.dtype == torch.int32, (
        "the table of settings must be int32 and contiguous"
    )
    device = logits_NV.device
    groups = -(-V // GROUP)
    stretch = -(-groups // min(groups, -(-DRAWING // N)))
    splits = -(-groups // stretch)
    least, counts = thresholds(logits_NV, rows_N, table_RC, banned, arrivals)
    values = torch.empty(N, splits, dtype=torch.float32, device=device)
    places = torch.empty(N, splits, dtype=torch.int32, device=device)
    tokens = torch.empty(N, dtype=torch.int64, device=device)
    _draw_kernel[(N, splits)](
        logits_NV, rows_N, positions_N, table_RC, banned, least, counts, values, places, tokens,
        logits_NV.stride(0), stretch, splits,
        C=table_RC.shape[1], V=V, BANNED=len(banned), LANES=LANES, MOST_SPLITS=triton.next_power_of_2(groups),
        num_warps=4,
    )  # fmt: skip
    return tokens
