"""The second half of a layer with adapters of many requests: few tokens' kernels in Triton's interpreter, and the
operations one by one, against each token's own merged weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria import ops
from aria.ops import LowRank, MoEStacks, reference
from aria.ops.kernels import few, thin
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

D, E, F, S, A = 48, 8, 32, 2, 3
SHAPES = {"fc1": (E, D, 2 * F), "fc2": (E, F, D), "gate_up": (D, 2 * S * F), "down": (S * F, D)}
"""Inputs and outputs last."""
RANKS = (3, 8, 2)


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is full of NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_of_a_layer() -> dict:
    """Experts with outputs before inputs in memory, as the engine lays them out."""
    fc1, fc2 = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    return {
        "norm_D": torch.rand(D) + 0.5,
        "eps": 1e-5,
        "router_ED": torch.randn(E, D),
        "fc1_EDF": fc1.mT,
        "fc2_EFD": fc2.mT,
        "shared": tuple(torch.randn(*s) * s[1] ** -0.5 for s in ((S * F, D), (S * F, D), (D, S * F))),
    }


def change(part: str, rank: int) -> LowRank:
    *experts, size, out = SHAPES[part]
    if experts:
        return LowRank(torch.randn(E, size, rank) * 0.3, torch.randn(E, rank, out) * 0.3, 0.5 + rank / 4)
    return LowRank(torch.randn(rank, size) * 0.3, torch.randn(out, rank) * 0.3, 0.5 + rank / 4)


def stacks_of(changes: list[dict[str, LowRank]]) -> MoEStacks:
    found: dict[str, list[tuple[int, int, LowRank]]] = {}
    for owner, parts in enumerate(changes, 1):
        for part, one in parts.items():
            found.setdefault(part, []).append((owner, 0, one))
    return MoEStacks(
        **{part: ops.stack_adapters(some, SHAPES[part][-1], torch.zeros(1)) for part, some in found.items()}
    )


def merged(weights: dict, changes: dict[str, LowRank]) -> dict:
    """The layer in float64, with an adapter in its weights."""

    def add(weight: Tensor, part: str) -> Tensor:
        if part not in changes:
            return weight.double()
        a, b, scaling, _ = changes[part]
        more = a.double() @ b.double() if a.ndim == 3 else b.double() @ a.double()
        return weight.double() + scaling * more

    gate, up, down = weights["shared"]
    gate, up = add(torch.cat((gate, up)), "gate_up").chunk(2)
    return {
        **{name: value.double() if isinstance(value, Tensor) else value for name, value in weights.items()},
        "fc1_EDF": add(weights["fc1_EDF"], "fc1"),
        "fc2_EFD": add(weights["fc2_EFD"], "fc2"),
        "shared": (gate, up, add(down, "down")),
    }


def kernels(x: Tensor, weights: dict, stacks: MoEStacks, owners: Tensor) -> Tensor:
    return few.moe_layer(x, top_k=A, stacks=stacks, owners_T=owners, **weights)


def one_by_one(x: Tensor, weights: dict, stacks: MoEStacks, owners: Tensor) -> Tensor:
    return ops.stacked_moe_layer(x, top_k=A, stacks=stacks, owners_T=owners, **weights)


@pytest.mark.parametrize("run", [kernels, one_by_one])
@pytest.mark.parametrize("tokens", [1, 5, 19], ids="{} tokens".format)
@pytest.mark.parametrize("parts", [tuple(SHAPES), ("fc1",), ("fc2", "gate_up"), ("down",)], ids="+".join)
def test_each_token_has_the_adapters_of_its_owner(run, parts, tokens):
    torch.manual_seed(tokens)
    weights, x = weights_of_a_layer(), torch.randn(tokens, D) * 3
    # The last adapter changes one part only, wherever others change more.
    changes = [
        {part: change(part, rank) for part in (parts if owner < 2 else parts[-1:])} for owner, rank in enumerate(RANKS)
    ]
    owners = torch.randint(0, 1 + len(RANKS), (tokens,), dtype=torch.int32)
    got = run(x, weights, stacks_of(changes), owners)
    for t, owner in enumerate(owners.tolist()):
        own = merged(weights, changes[owner - 1] if owner else {})
        expected = reference.moe_layer(x[t : t + 1].double(), top_k=A, **own)[0]
        assert (got[t] - expected).norm() < 1e-5 * expected.norm(), f"token {t} of {owner}"


@pytest.mark.parametrize("tokens", [1, 5, 19], ids="{} tokens".format)
def test_a_linear_with_each_tokens_adapter(tokens):
    torch.manual_seed(tokens)
    x, y, owners = torch.randn(tokens, D), torch.randn(tokens, 70), torch.randint(0, 4, (tokens,), dtype=torch.int32)
    # As those of q, k and v: each changes its own part of the outputs.
    parts = [(owner, first, LowRank(torch.randn(rank, D), torch.randn(out, rank), 0.7)) for owner, first, out, rank in
             ((1, 0, 40, 3), (1, 40, 30, 2), (2, 0, 40, 8), (3, 40, 30, 5))]  # fmt: skip
    stack = ops.stack_adapters(parts, 70, x)
    expected = y.double()
    for owner, first, low_rank in parts:
        more = x.double() @ low_rank.a.double().t() @ low_rank.b.double().t() * low_rank.scaling
        expected[:, first : first + more.shape[1]] += more * (owners == owner)[:, None]
    got = thin.linear_add(y, x, stack, owners)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert thin.linear_add(y, x, stack, owners, out=y) is y and torch.equal(y, got)


def test_what_one_adapter_makes_infinite_stays_its_own():
    torch.manual_seed(0)
    weights, x = weights_of_a_layer(), torch.randn(6, D)
    changes = [{part: change(part, 4) for part in SHAPES} for _ in range(2)]
    wild = [changes[0], {part: one._replace(a=one.a * 1e30) for part, one in changes[1].items()}]
    owners = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    calm, torn = (kernels(x, weights, stacks_of(some), owners) for some in (changes, wild))
    assert not torn[owners == 2].isfinite().all()
    assert torch.equal(calm[owners < 2], torn[owners < 2])


def test_many_ranks_are_left_to_others():
    fit, unfit = (stacks_of([{"fc2": change("fc2", rank)}]) for rank in (128, 129))
    assert thin.fits(*fit) and not thin.fits(*unfit)
