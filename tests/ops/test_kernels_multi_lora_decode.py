"""The second half of a layer with several adapters: decode kernels in Triton's interpreter, operation by operation, and
the reference, against each token's merged weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria import ops
from aria.ops import LoRA, MoEAdapters, MoEWeights, reference
from aria.ops.kernels import moe_decode, multi_lora_decode
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

D, E, F, S, A = 48, 8, 32, 2, 3
SHAPES = {"fc1": (E, D, 2 * F), "fc2": (E, F, D), "gate_up": (D, 2 * S * F), "down": (S * F, D)}
"""Inputs and outputs last."""
RANKS = (3, 8, 2)


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading uninitialised values shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights_of_a_layer() -> dict:
    """Experts are laid out [E, out, in], as in the engine."""
    fc1, fc2 = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    return {
        "norm": torch.rand(D) + 0.5,
        "eps": 1e-5,
        "router": torch.randn(E, D),
        "fc1": fc1.mT,
        "fc2": fc2.mT,
        "shared": tuple(torch.randn(*s) * s[1] ** -0.5 for s in ((S * F, D), (S * F, D), (D, S * F))),
    }


def change(part: str, rank: int) -> LoRA:
    *experts, size, out = SHAPES[part]
    if experts:
        return LoRA(torch.randn(E, size, rank) * 0.3, torch.randn(E, rank, out) * 0.3, 0.5 + rank / 4)
    return LoRA(torch.randn(rank, size) * 0.3, torch.randn(out, rank) * 0.3, 0.5 + rank / 4)


def adapters_of(changes: list[dict[str, LoRA]], adapter_ids: Tensor) -> MoEAdapters:
    found: dict[str, list[tuple[int, int, LoRA]]] = {}
    for adapter_id, parts in enumerate(changes, 1):
        for part, one in parts.items():
            found.setdefault(part, []).append((adapter_id, 0, one))
    loras = {part: ops.stack_loras(some, SHAPES[part][-1], torch.zeros(1)) for part, some in found.items()}
    return MoEAdapters(adapter_ids, **loras)


def merged(weights: dict, changes: dict[str, LoRA]) -> dict:
    """The layer in float64, with an adapter merged."""

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
        "fc1": add(weights["fc1"], "fc1"),
        "fc2": add(weights["fc2"], "fc2"),
        "shared": (gate, up, add(down, "down")),
    }


def kernels(x: Tensor, weights: dict, adapters: MoEAdapters) -> Tensor:
    return moe_decode.moe_layer_decode(x, MoEWeights(top_k=A, **weights), adapters)


def one_by_one(x: Tensor, weights: dict, adapters: MoEAdapters) -> Tensor:
    return ops.moe_layer(x, MoEWeights(top_k=A, **weights), adapters)


def by_reference(x: Tensor, weights: dict, adapters: MoEAdapters) -> Tensor:
    return reference.moe_layer(x, MoEWeights(top_k=A, **weights), adapters)


@pytest.mark.parametrize("run", [kernels, one_by_one, by_reference])
@pytest.mark.parametrize("tokens", [1, 5, 19], ids="{} tokens".format)
@pytest.mark.parametrize("parts", [tuple(SHAPES), ("fc1",), ("fc2", "gate_up"), ("down",)], ids="+".join)
def test_each_token_uses_its_own_adapter(run, parts, tokens):
    torch.manual_seed(tokens)
    weights, x = weights_of_a_layer(), torch.randn(tokens, D) * 3
    # The last adapter has weights for one part only, where others have more.
    changes = [
        {part: change(part, rank) for part in (parts if adapter_id < 2 else parts[-1:])}
        for adapter_id, rank in enumerate(RANKS)
    ]
    adapter_ids = torch.randint(0, 1 + len(RANKS), (tokens,), dtype=torch.int32)
    got = run(x, weights, adapters_of(changes, adapter_ids))
    for t, adapter_id in enumerate(adapter_ids.tolist()):
        own = merged(weights, changes[adapter_id - 1] if adapter_id else {})
        expected = reference.moe_layer(x[t : t + 1].double(), MoEWeights(top_k=A, **own))[0]
        assert (got[t] - expected).norm() < 1e-5 * expected.norm(), f"token {t} of {adapter_id}"


@pytest.mark.parametrize("tokens", [1, 5, 19], ids="{} tokens".format)
def test_a_linear_with_each_tokens_adapter(tokens):
    torch.manual_seed(tokens)
    x, y = torch.randn(tokens, D), torch.randn(tokens, 70)
    adapter_ids = torch.randint(0, 4, (tokens,), dtype=torch.int32)
    # Like q, k and v: each has its own part of the outputs.
    sizes = (1, 0, 40, 3), (1, 40, 30, 2), (2, 0, 40, 8), (3, 40, 30, 5)
    parts = [(n, first, LoRA(torch.randn(R, D), torch.randn(out, R), 0.7)) for n, first, out, R in sizes]
    stack = ops.stack_loras(parts, 70, x)
    expected = y.double()
    for adapter_id, first, lora in parts:
        more = x.double() @ lora.a.double().t() @ lora.b.double().t() * lora.scaling
        expected[:, first : first + more.shape[1]] += more * (adapter_ids == adapter_id)[:, None]
    got = multi_lora_decode.multi_lora_linear_add_decode(y, x, stack, adapter_ids)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert multi_lora_decode.add_in_place(y, x, stack, adapter_ids) is y and torch.equal(y, got)


@pytest.mark.slow
def test_infinities_of_one_adapter_do_not_reach_others():
    torch.manual_seed(0)
    weights, x = weights_of_a_layer(), torch.randn(6, D)
    changes = [{part: change(part, 4) for part in SHAPES} for _ in range(2)]
    wild = [changes[0], {part: one._replace(a=one.a * 1e30) for part, one in changes[1].items()}]
    adapter_ids = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    calm, torn = (kernels(x, weights, adapters_of(some, adapter_ids)) for some in (changes, wild))
    assert not torn[adapter_ids == 2].isfinite().all()
    assert torch.equal(calm[adapter_ids < 2], torn[adapter_ids < 2])


def test_too_many_ranks_are_detected():
    ids = torch.zeros(1, dtype=torch.int32)
    fit, unfit = (adapters_of([{"fc2": change("fc2", rank)}], ids).loras for rank in (128, 129))
    assert multi_lora_decode.fits(*fit) and not multi_lora_decode.fits(*unfit)
