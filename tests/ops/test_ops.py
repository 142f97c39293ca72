"""Operations: fast implementations against their references, references against independent formulas.

T tokens, S keys, D hidden, H heads, KV key/value heads, K head width, E experts, A experts per token, F expert width.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aria import ops
from aria.ops import Chunks, ExpertWeights, MoEWeights, PagedKV, Segments, reference
from aria.ops.registry import Operation, Weights, Where

# float32: sums of a few hundred terms of size one, added in another order. bfloat16 has 8 bits: the two round at
# different places (inside a fused kernel, or not), a few times by up to 2^-9 of values of about one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# Attention


ATTENTION = {
    "equal lengths": ((6, 6, 6), (6, 6, 6)),
    "one segment": ((9,), (9,)),
    "one token": ((1,), (1,)),
    "unequal lengths": ((5, 1, 17, 2), (5, 1, 17, 2)),
    "one query a segment": ((1, 1, 1), (4, 9, 1)),
    "one query, equal keys": ((1, 1), (7, 7)),
    "more keys than queries": ((3, 2, 5), (8, 2, 6)),
    "more keys than queries, equal": ((3, 3), (8, 8)),
}


@DTYPES
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["one each", "grouped", "one for all"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, heads, causal, dtype):
    (H, KV), (queries, keys) = heads, map(Segments.of, ATTENTION[name])
    q = normal(queries.total, H, 24, dtype=dtype)
    k, v = (normal(keys.total, KV, 24, seed=seed, dtype=dtype) for seed in (1, 2))
    fast = ops.attention(q, k, v, queries, keys, causal=causal)
    close(fast, reference.attention(q, k, v, queries, keys, causal=causal), dtype)


def attend_by_hand(q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, causal: bool) -> Tensor:
    """One segment, one query at a time, in float64, over the keys that it may see."""
    (T, H, K), (S, KV, _) = q_THK.shape, k_SHK.shape
    out = torch.empty(T, H, K, dtype=torch.float64)
    for t in range(T):
        seen = S - T + t + 1 if causal else S
        for h in range(H):
            k, v = (x[:seen, h * KV // H].double() for x in (k_SHK, v_SHK))
            out[t, h] = F.softmax(k @ q_THK[t, h].double() / math.sqrt(K), dim=0) @ v
    return out.float()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_attention_is_the_formula(implementation, causal):
    queries, keys = Segments.of((2, 4)), Segments.of((5, 4))
    q, k, v = normal(6, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    with ops.use(implementation):
        got = ops.attention(q, k, v, queries, keys, causal=causal)
    expected = [attend_by_hand(q[:2], k[:5], v[:5], causal), attend_by_hand(q[2:], k[5:], v[5:], causal)]
    close(got, torch.cat(expected), torch.float32)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_attention_needs_as_many_segments_on_both_sides(implementation):
    x = normal(6, 2, 8)
    with ops.use(implementation), pytest.raises(AssertionError, match="different numbers of segments"):
        ops.attention(x, x, x, Segments.of((3, 3)), Segments.of((6,)), causal=True)


# Experts


def experts(E: int, D: int, F_: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights that preserve the scale of their inputs."""
    return (
        normal(E, D, 2 * F_, seed=3, dtype=dtype, scale=D**-0.5),
        normal(E, F_, D, seed=4, dtype=dtype, scale=F_**-0.5),
    )


def routed(T: int, E: int, A: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return ops.route(normal(T, E, seed=5, dtype=dtype), A)


EXPERTS = {
    "some": (37, 8, 3, 24, 20),
    "one token": (1, 8, 3, 24, 20),
    "all experts": (5, 4, 4, 16, 8),
    "one expert": (6, 1, 1, 16, 8),
    "most experts empty": (2, 64, 6, 40, 12),
    "odd widths": (11, 5, 2, 13, 7),
}


@DTYPES
@pytest.mark.parametrize("name", EXPERTS)
def test_expert_mlp(name, dtype):
    T, E, A, D, F_ = EXPERTS[name]
    x, (fc1, fc2), (weights, index) = normal(T, D, dtype=dtype), experts(E, D, F_, dtype), routed(T, E, A, dtype)
    close(
        ops.expert_mlp(x, ExpertWeights(fc1, fc2), weights, index),
        reference.expert_mlp(x, ExpertWeights(fc1, fc2), weights, index),
        dtype,
    )


def test_expert_mlp_with_all_tokens_on_the_last_expert():
    x, (fc1, fc2) = normal(9, 16), experts(5, 16, 8)
    weights, index = torch.full((9, 1), 0.5), torch.full((9, 1), 4)
    expected = 0.5 * (F.silu(x @ fc1[4, :, :8]) * (x @ fc1[4, :, 8:])) @ fc2[4]
    for implementation in ("fast", "reference"):
        with ops.use(implementation):
            close(ops.expert_mlp(x, ExpertWeights(fc1, fc2), weights, index), expected, torch.float32)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_expert_mlp_is_the_formula(implementation):
    """Token by token: gate is the first half of fc1's outputs, up the second."""
    T, E, A, D, F_ = 7, 6, 2, 10, 5
    x, (fc1, fc2), (weights, index) = normal(T, D), experts(E, D, F_), routed(T, E, A)
    with ops.use(implementation):
        got = ops.expert_mlp(x, ExpertWeights(fc1, fc2), weights, index)
    expected = torch.zeros(T, D)
    for t in range(T):
        for weight, e in zip(weights[t], index[t].tolist(), strict=True):
            gate, up = fc1[e].T[:F_] @ x[t], fc1[e].T[F_:] @ x[t]
            expected[t] += weight * (fc2[e].T @ (gate * gate.sigmoid() * up))
    close(got, expected, torch.float32)


def test_expert_mlp_gradients():
    T, E, A, D, F_ = 9, 16, 2, 12, 6
    weights, index = routed(T, E, A)
    empty = sorted(set(range(E)) - set(index.unique().tolist()))
    assert empty, "the case should leave experts empty"
    start = (normal(T, D), *experts(E, D, F_), weights)
    gradients = {}
    for implementation in ("fast", "reference"):
        x, fc1, fc2, weights = leaves = [tensor.clone().requires_grad_() for tensor in start]
        with ops.use(implementation):
            y = ops.expert_mlp(x, ExpertWeights(fc1, fc2), weights, index)
        gradients[implementation] = torch.autograd.grad(y, leaves, normal(T, D, seed=7))
    for name, fast, slow in zip(("x", "fc1", "fc2", "weights"), *gradients.values(), strict=True):
        assert slow.abs().max() > 0.01, name
        close(fast, slow, torch.float32)
    assert not gradients["fast"][1][empty].any()


def test_route_is_the_full_softmax_renormalised_over_the_chosen():
    logits = normal(50, 64, seed=8)
    weights, index = ops.route(logits, 6)
    assert (weights.shape, index.shape, index.dtype) == ((50, 6), (50, 6), torch.int64)
    probs = logits.double().softmax(-1)
    chosen = probs.gather(-1, index)
    close(weights, (chosen / chosen.sum(-1, keepdim=True)).float(), torch.float32)
    others = probs.scatter(-1, index, 0.0)
    assert (chosen.min(-1).values > others.max(-1).values).all(), "not the most likely experts"
    assert (weights.diff(dim=-1) <= 0).all(), "the most likely comes first"
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))


def test_route_computes_in_float32_and_returns_the_dtype_of_the_logits():
    logits = normal(20, 16, seed=9, dtype=torch.bfloat16, scale=3.0)
    weights, index = ops.route(logits, 4)
    exact = logits.float().gather(-1, index).softmax(-1)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, exact.bfloat16())


def test_route_over_all_experts_is_the_softmax():
    logits = normal(5, 4)
    weights, index = ops.route(logits, 4)
    torch.testing.assert_close(torch.zeros(5, 4).scatter(-1, index, weights), logits.softmax(-1))


# Norms, activation, positions


@DTYPES
def test_rms_norm(dtype):
    x, weight, eps = normal(5, 3, 48, dtype=dtype, scale=4.0), normal(48, seed=1, dtype=dtype), 1e-6
    wide = x.double()
    normed = (wide / (wide.pow(2).sum(-1, keepdim=True) / 48 + eps).sqrt()).to(dtype)
    close(ops.rms_norm(x, weight, eps), normed * weight, dtype)


def test_rms_norm_of_zeros_and_of_values_too_large_to_square_in_float16():
    ones = torch.ones(8)
    assert torch.equal(ops.rms_norm(torch.zeros(2, 8), ones, 1e-6), torch.zeros(2, 8))
    large = torch.full((1, 8), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(ops.rms_norm(large, ones.half(), 1e-6), torch.ones(1, 8, dtype=torch.float16))


def test_swiglu_gates_with_the_first_half():
    gate, up = normal(4, 6), normal(4, 6, seed=1)
    close(ops.swiglu(torch.cat((gate, up), -1)), gate * torch.sigmoid(gate) * up, torch.float32)


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_rotary_rotates_complex_numbers(theta):
    """Elements k and k + K/2 of a head are one complex number, rotated by position / theta^(2k/K)."""
    K, positions = 128, torch.tensor([0, 1, 7, 500, 4095])
    x = normal(len(positions), 3, K)
    got = ops.rotary(x, *ops.rotary_table(positions, K, theta, torch.float32))
    k = torch.arange(K // 2, dtype=torch.float64)
    turn = torch.exp(1j * positions.double()[:, None] * theta ** (-2 * k / K))
    turned = torch.complex(*x.double().chunk(2, -1)) * turn[:, None]
    # An angle of 4095 is accurate to about 2e-4 in float32.
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1).float(), atol=2e-3, rtol=0)
    assert torch.equal(got[0], x[0]), "position 0 is not rotated"
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


def test_rotary_scores_depend_only_on_distances():
    q, k = normal(1, 2, 32), normal(1, 2, 32, seed=1)

    def score(q_at: int, k_at: int) -> Tensor:
        turned = (
            ops.rotary(x, *ops.rotary_table(torch.tensor([at]), 32, 10_000.0, torch.float32))
            for x, at in ((q, q_at), (k, k_at))
        )
        return torch.einsum("thk,thk->th", *turned)

    torch.testing.assert_close(score(13, 4), score(113, 104), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(13, 4), score(4, 13), atol=1e-2)


def test_rotary_table_is_computed_in_float32_and_then_cast():
    positions = torch.tensor([300])
    wide = ops.rotary_table(positions, 64, 5e6, torch.float32)
    for narrow, exact in zip(ops.rotary_table(positions, 64, 5e6, torch.bfloat16), wide, strict=True):
        assert narrow.shape == (1, 64)
        assert torch.equal(narrow, exact.bfloat16())


# Segments


def test_segments():
    segments = Segments.of([3, 1, 4])
    assert segments.lengths == (3, 1, 4)
    assert (segments.total, segments.longest, segments.equal) == (8, 4, False)
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert segments.last.dtype == segments.positions().dtype == torch.int64
    assert segments.last.tolist() == [2, 3, 7]
    assert segments.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_segments_of_one_length_and_of_none():
    assert Segments.of((2, 2)).equal
    assert Segments.of((5,)).equal
    none = Segments.of(())
    assert (none.total, none.longest, none.equal, none.cu_seqlens.tolist()) == (0, 0, False, [0])
    assert none.positions().tolist() == []


def test_segments_take_lengths_from_a_tensor():
    segments = Segments.of(torch.tensor([2, 5]).tolist(), device="meta")
    assert segments.lengths == (2, 5)
    assert segments.cu_seqlens.device.type == "meta"


# Choice of implementation


def test_use_forces_an_implementation_and_restores():
    def name(x: Tensor) -> str:
        return "reference"

    named = Operation(name)

    @named.register(Where.ANYWHERE)
    def fast(x: Tensor) -> str:
        return "fast"

    def call() -> str:
        return named(torch.zeros(1))

    assert call() == "fast"
    with ops.use("reference"):
        assert call() == "reference"
        with ops.use("fast"):
            assert call() == "fast"
        assert call() == "reference"
    assert call() == "fast"
    with pytest.raises(KeyError), ops.use("reference"):
        raise KeyError
    assert call() == "fast", "an error inside the block should restore the choice"


def test_the_first_implementation_that_fits_runs():
    def name(x: Tensor, weights: Weights, most: int = 9) -> str:
        """What it is."""
        return "reference"

    named, asked = Operation(name), []

    def serves(weights: Weights) -> bool:
        asked.append(weights)
        return weights is good

    named.register(Where.GPU)(lambda x, weights, most=9: "gpu")
    named.register(Where.ANYWHERE, serves=serves)(lambda x, weights, most=9: "serving")
    small = named.register(Where.ANYWHERE, fits=lambda x, weights, most=9: len(x) < most, graph_safe=lambda *_: False)
    small(lambda x, weights, most=9: "small")
    good, bad, x = Weights(), Weights(), torch.zeros(3)
    assert named(x, good) == named(x, good) == "serving" and named.is_graph_safe(x, good)
    assert named(x, bad) == "small" and not named.is_graph_safe(x, bad)
    assert named(x, bad, most=2) == "reference"
    assert asked == [good, bad], "each set of weights is checked once"
    assert named.__doc__ == "What it is."


def test_use_rejects_unknown_names():
    with (
        pytest.raises(ValueError, match="unknown implementation 'triton'; expected one of fast, reference"),
        ops.use("triton"),
    ):
        pass


def test_what_waits_for_the_host_is_not_graph_safe():
    x, fc1, fc2 = torch.randn(4, 16), torch.randn(3, 16, 24), torch.randn(3, 12, 16)
    shared = torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)
    weights = MoEWeights(torch.ones(16), 1e-6, torch.randn(3, 16), fc1, fc2, shared, 2)
    assert not ops.moe_is_graph_safe(x, weights), "counted on the host"
    heads, cache = torch.randn(4, 2, 8), torch.randn(3, 2, 4, 8)
    paged = PagedKV(cache, cache, ops.rope_angles(1, 8, 1e4))
    assert not ops.chunks_are_graph_safe(heads, paged), "no kernel here"
    assert not ops.paged_kernel(heads, paged), "no kernel here"
    blocks, spans = torch.ones(1, 1, dtype=torch.int32), torch.tensor([[0, 4, 0]], dtype=torch.int32)
    known = Chunks(blocks, [4], [0], spans)
    assert ops.chunks_attention(heads, heads, heads, paged, known).shape == (4, 2, 8)
    with pytest.raises(AssertionError, match="spans"):
        ops.chunks_attention(heads, heads, heads, paged, known._replace(pasts=None))
