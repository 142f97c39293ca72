"""The prefill kernels of the mixture of experts in Triton's interpreter, against their references in float64.

T tokens, D hidden, E experts, A experts per token, F expert width, W width of the shared experts, P rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria.ops import MoEWeights, reference
from aria.ops.kernels import grouped_gemm, moe_prefill, permute
from tests.helpers import interpreter  # noqa: F401  before any kernel

# Rows that only pad a tile are uninitialised, and NumPy warns about their sums.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading uninitialised values shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# Routing


@pytest.mark.parametrize(("T", "E", "A"), [(1, 8, 3), (37, 64, 6), (300, 5, 2), (20, 4, 4), (3, 1, 1)])
def test_route(T, E, A):
    logits = normal(T, E, seed=T)
    weights, index = permute.route_triton(logits, A)
    expected_weights, expected_index = reference.route(logits, A)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights)


def test_of_equal_logits_the_lower_index_wins():
    _, index = permute.route_triton(torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]]).repeat(17, 1), 4)
    assert index.tolist() == [[1, 2, 4, 3]] * 17


def test_a_token_with_nan_does_not_affect_others():
    case = Case(T=20, E=5, A=3)
    x = case.x.clone()
    x[7] = float("nan")
    got, expected = case.run(x), case.run(case.x)
    others = torch.arange(20) != 7
    # Its experts differ, so other rows move within tiles, and some CPUs round differently by position.
    torch.testing.assert_close(got[others], expected[others])
    assert got[7].isnan().all()


@DTYPES
def test_norm_route(dtype):
    T, D, E, A = 45, 136, 6, 2
    x, norm, router = normal(T, D, dtype=dtype), normal(D, seed=1, dtype=dtype), normal(E, D, seed=2, dtype=dtype)
    normed, weights, index, counts = permute.norm_route(x, norm, 1e-5, router, A)
    expected = reference.rms_norm(x, norm, 1e-5)
    assert error(normed, expected) < TOLERANCE[dtype]
    chosen_weights, chosen = reference.route(normed.double() @ router.double().T, A)
    assert torch.equal(index.long(), chosen)
    assert error(weights, chosen_weights) < 1e-5
    assert torch.equal(counts, torch.stack([block.flatten().bincount(minlength=E) for block in index.split(16)]).int())


# Places


def routed(name: str) -> tuple[Tensor, int]:
    """Experts of each token, int32, and the number of experts."""
    if name == "one token":
        return torch.tensor([[3, 0]], dtype=torch.int32), 5
    if name == "all tokens to one expert":
        return torch.full((70, 1), 2, dtype=torch.int32), 9
    if name == "whole tiles":
        return torch.arange(64, dtype=torch.int32).remainder(2)[:, None], 2
    A, E = {"some": (3, 8), "most experts empty": (6, 64)}[name]
    T = 50 if name == "some" else 2
    return normal(T, E, seed=9).topk(A).indices.int(), E


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("name", ["some", "one token", "all tokens to one expert", "whole tiles", "most experts empty"])
def test_place(name, tile):
    index, E = routed(name)
    T, A = index.shape
    blocks = index.split(permute.block_of(T))
    counts = torch.stack([block.flatten().bincount(minlength=E) for block in blocks]).int()
    position, table = permute.place(index, counts, tile)
    # By hand: sorted by expert, each starting at a whole tile, its tokens in order.
    row, expected, owners = 0, torch.full((T, A), -1), []
    for expert in range(E):
        token, choice = torch.where(index == expert)
        expected[token, choice] = row + torch.arange(len(token))
        tiles = -(-len(token) // tile)
        owners += [expert] * tiles
        row += tiles * tile
    assert position.tolist() == expected.tolist()
    assert table[0] == len(owners)
    assert table[1 : 1 + len(owners)].tolist() == owners


def test_permute_and_combine():
    x, shared, y = normal(9, 50), normal(9, 50, seed=1), normal(64, 50, seed=2)
    position = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:18].view(9, 2).int()
    weights = normal(9, 2, seed=4)
    rows = permute.permute(x, position, 64)
    assert torch.equal(rows[position.long()], x[:, None].expand(-1, 2, -1))
    assert rows.isnan().all(1).sum() == 64 - 18
    expected = x.double() + shared + (weights[:, :, None].double() * y[position.long()]).sum(1)
    assert error(permute.combine(x, shared, y, weights, position), expected) < 1e-6


# Products


@DTYPES
@pytest.mark.parametrize("swiglu", [True, False], ids=["swiglu", "plain"])
def test_grouped(swiglu, dtype):
    E, inputs, outputs = 3, 40, 24  # neither a multiple of the tile
    shape = grouped_gemm.Tiles(rows=16, columns=16, inputs=32, warps=4, stages=3, group=2)
    owners = [0, 0, 2, 2, 2]
    table = torch.tensor([len(owners), *owners, 99], dtype=torch.int32)  # an unused entry is never read
    x = normal(6 * 16, inputs, dtype=dtype)
    w = normal(E, 2, outputs, inputs, seed=1, dtype=dtype, scale=inputs**-0.5)
    out = torch.full((6 * 16, outputs * (1 if swiglu else 2)), float("nan"), dtype=dtype)
    got = grouped_gemm.grouped(x, w, out, table, swiglu=swiglu, shape=shape)
    assert got is out
    assert got[-16:].isnan().all()
    both = torch.cat([x[16 * i : 16 * i + 16].double() @ w[e].double().flatten(0, 1).T for i, e in enumerate(owners)])
    assert error(got[:-16], reference.swiglu(both) if swiglu else both) < TOLERANCE[dtype]


# The layer


class Case:
    """Weights of one layer, laid out as in the engine, and tokens."""

    def __init__(self, T: int, E: int, A: int, D: int = 48, F: int = 24, W: int = 48, dtype=torch.float32):
        self.top_k = A
        self.x = normal(T, D, dtype=dtype)
        self.norm = normal(D, seed=1, dtype=dtype)
        self.router = normal(E, D, seed=2, dtype=dtype)
        self.fc1 = normal(E, 2 * F, D, seed=3, dtype=dtype, scale=D**-0.5).transpose(1, 2)
        self.fc2 = normal(E, D, F, seed=4, dtype=dtype, scale=F**-0.5).transpose(1, 2)
        gate_up = normal(2 * W, D, seed=5, dtype=dtype, scale=D**-0.5)
        self.shared = (gate_up[:W], gate_up[W:], normal(D, W, seed=6, dtype=dtype, scale=W**-0.5))

    def run(self, x: Tensor) -> Tensor:
        weights = MoEWeights(self.norm, 1e-6, self.router, self.fc1, self.fc2, self.shared, self.top_k)
        return moe_prefill.moe_layer_prefill(x, weights)

    def expected(self) -> Tensor:
        x, norm, *weights = (w.double() for w in (self.x, self.norm, self.router, self.fc1, self.fc2))
        shared = tuple(w.double() for w in self.shared)
        return reference.moe_layer(x, MoEWeights(norm, 1e-6, *weights, shared, self.top_k))


CASES = {
    "some": Case(T=37, E=8, A=3),
    "one token": Case(T=1, E=8, A=3),
    "most experts empty": Case(T=2, E=64, A=6),
    "all experts": Case(T=20, E=4, A=4),
    "one expert": Case(T=70, E=1, A=1),
    "high tiles": Case(T=210, E=2, A=1),
    "odd widths": Case(T=19, E=5, A=2, D=80, F=40, W=72),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layer(name):
    case = CASES[name]
    assert error(case.run(case.x), case.expected()) < TOLERANCE[torch.float32]


def test_layer_in_half_precision():
    case = Case(T=37, E=8, A=3, dtype=torch.float16)
    assert error(case.run(case.x), case.expected()) < TOLERANCE[torch.float16]


def test_layer_with_shared_weights_that_are_not_adjacent():
    case = Case(T=17, E=4, A=2)
    together = case.run(case.x)
    case.shared = tuple(weight.clone() for weight in case.shared)
    torch.testing.assert_close(case.run(case.x), together)


def test_weights_in_the_hubs_order_are_rejected():
    case = Case(T=3, E=4, A=2)
    case.fc1 = case.fc1.contiguous()
    with pytest.raises(AssertionError, match=r"laid out \[E, out, in\]"):
        case.run(case.x)
