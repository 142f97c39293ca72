"""The training kernels on a GPU: results and gradients against float64, next to the error of plain PyTorch.

T tokens, D hidden, E experts, A experts per token, F expert width, R rank of an adapter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria import ops
from aria.ops import ExpertWeights, LoRA, reference
from aria.ops.moe import expert_mlp_sorted

pytestmark = pytest.mark.gpu
lora_train = pytest.importorskip("aria.ops.kernels.lora_train")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
CASES = {
    "some": (137, 64, 5, 2, 40),
    "one token": (1, 16, 4, 3, 8),
    "most experts empty": (5, 16, 64, 2, 8),
    "all on a few": (700, 256, 64, 6, 104),
    "Aria's": (300, 2560, 64, 6, 1664),
}


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading uninitialised values shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


def errors(run, expected: dict[str, Tensor], inputs: dict[str, Tensor], seed: Tensor) -> dict[str, float]:
    """Of the result and of all gradients."""
    out = run(**inputs)
    grads = torch.autograd.grad(out, list(inputs.values()), seed.to(out.dtype))
    got = {"out": out.detach(), **dict(zip(inputs, grads, strict=True))}
    return {name: float((got[name].double() - value).norm() / value.norm()) for name, value in expected.items()}


def check(run, expected_run, inputs: dict[str, Tensor], tolerance: float, plain=None) -> None:
    """Against a run in float64; the error is at most ``tolerance``, plus twice that of plain PyTorch if given."""
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out = expected_run(**wide)
    seed = torch.randn_like(out).to(inputs[next(iter(inputs))].dtype).double()
    expected = {
        "out": out.detach(),
        **dict(zip(wide, torch.autograd.grad(out, list(wide.values()), seed), strict=True)),
    }
    bounds = dict.fromkeys(expected, 0.0) if plain is None else errors(plain, expected, inputs, seed)
    found = errors(run, expected, inputs, seed)
    assert all(error < tolerance + 2 * bounds[name] for name, error in found.items()), (found, bounds)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [(8, 8), (0, 0), (4, 16)], ids=str)
def test_experts(name, ranks, dtype):
    T, _, E, A, _ = CASES[name]
    if name != "some" and (ranks != (8, 8) or (dtype == torch.float32 and name == "Aria's")):
        pytest.skip("each shape takes seconds to compile")
    most = 4 if name == "all on a few" else E
    index = torch.stack([torch.randperm(max(most, A), device="cuda")[:A] for _ in range(T)])
    inputs = expert_inputs(name, ranks, dtype)
    check(
        experts(ops.expert_mlp, index),
        experts(reference.expert_mlp, index),
        inputs,
        TOLERANCE[dtype],
        experts(expert_mlp_sorted, index),
    )


@DTYPES
@pytest.mark.parametrize("name", ["some", "Aria's"])
def test_experts_on_other_ranks_add_nothing(name, dtype):
    T, _, E, A, _ = CASES[name]
    index = torch.stack([torch.randperm(E + A // 2, device="cuda")[:A] for _ in range(T)]).clamp(max=E)
    index[::5] = E  # some tokens have none here
    present = int((index < E).sum())
    inputs = expert_inputs(name, (8, 8), dtype)
    ours, plain = experts(ops.expert_mlp, index, present=present), experts(expert_mlp_sorted, index, present=present)
    check(ours, experts(reference.expert_mlp, index), inputs, TOLERANCE[dtype], plain)


def expert_inputs(name, ranks, dtype):
    T, D, E, A, F = CASES[name]
    inputs = {
        "x": normal(T, D, dtype=dtype),
        "fc1": normal(E, D, 2 * F, dtype=dtype, scale=D**-0.5),
        "fc2": normal(E, F, D, dtype=dtype, scale=F**-0.5),
        "weights": normal(T, A, dtype=dtype),
    }
    for n, (rank, width, out) in enumerate(zip(ranks, (D, F), (2 * F, D), strict=True), start=1):
        if rank:
            inputs |= {f"a{n}": normal(E, width, rank, scale=width**-0.5), f"b{n}": normal(E, rank, out, scale=0.3)}
    return inputs


def experts(expert_mlp, index, **how):
    def apply(x, fc1, fc2, weights, a1=None, b1=None, a2=None, b2=None):
        loras = None if a1 is None else LoRA(a1, b1, 0.7), None if a2 is None else LoRA(a2, b2, 1.3)
        return expert_mlp(x, ExpertWeights(fc1, fc2, *loras), weights, index, **how)

    return apply


@DTYPES
@pytest.mark.parametrize(("T", "I", "O", "R"), [(1, 8, 24, 5), (700, 104, 304, 5), (300, 2560, 3328, 8)])
def test_linear_with_lora(T, I, O, R, dtype):
    inputs = {
        "x": normal(T, I, dtype=dtype),
        "weight": normal(O, I, dtype=dtype, scale=I**-0.5),
        "bias": normal(O, dtype=dtype),
        "a": normal(R, I, scale=I**-0.5),
        "b": normal(O, R),
    }

    def run(module):
        return lambda x, weight, bias, a, b: module.lora_linear(x, weight, bias, LoRA(a, b, 0.6))

    check(run(ops), run(reference), inputs, TOLERANCE[dtype], run(reference))


@DTYPES
def test_linears_of_one_input(dtype):
    inputs = {"x": normal(300, 200, dtype=dtype)}
    for n, width in enumerate((320, 64, 64)):
        inputs |= {f"w{n}": normal(width, 200, dtype=dtype, scale=0.07), f"a{n}": normal(8, 200, scale=0.07)}
        inputs |= {f"b{n}": normal(width, 8)}

    def run(module):
        def apply(x, **matrices):
            layers = [(matrices[f"w{n}"], None) for n in range(3)]
            adapters = [LoRA(matrices[f"a{n}"], matrices[f"b{n}"], 0.6) for n in range(3)]
            return torch.cat(module.lora_linears(x, layers, adapters), dim=1)

        return apply

    check(run(ops), run(reference), inputs, TOLERANCE[dtype], run(reference))


@DTYPES
def test_backward_uses_the_same_dropout(dtype):
    x, weight = normal(300, 200, dtype=dtype), normal(96, 200, dtype=dtype, scale=0.1)
    a, b = normal(8, 200, scale=0.1), normal(96, 8)
    torch.manual_seed(5)
    y = ops.lora_linear(x, weight, None, LoRA(a, b, 2.0, 0.25))
    torch.manual_seed(5)
    ones, _ = lora_train.gather(torch.ones_like(x), noise=lora_train.Noise(0.25), dropped=True)
    mask = (ones > 0).double() / 0.75
    assert abs((ones == 0).double().mean() - 0.25) < 0.01
    inputs = {"x": x, "weight": weight, "a": a, "b": b}
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs.values()]
    expected = wide[0] @ wide[1].T + 2.0 * (wide[0] * mask) @ wide[2].T @ wide[3].T
    seed = torch.randn_like(expected)
    for got, want in zip(
        (y, *torch.autograd.grad(y, list(inputs.values()), seed.to(dtype))),
        (expected, *torch.autograd.grad(expected, wide, seed)),
        strict=True,
    ):
        assert float((got.detach().double() - want.detach()).norm() / want.detach().norm()) < TOLERANCE[dtype]


@DTYPES
def test_between_products(dtype):
    pair = {"gate_TF": normal(700, 3328, dtype=dtype), "up_TF": normal(700, 3328, dtype=dtype)}
    check(ops.gated, reference.gated, pair, TOLERANCE[dtype])
    cos, sin = ops.rotary_table(torch.randint(5000, (300,), device="cuda"), 128, 5e6, dtype)
    wide, x = (cos.double(), sin.double()), {"x": normal(300, 20, 128, dtype=dtype)}
    check(lambda x: ops.rotary(x, cos, sin), lambda x: reference.rotary(x, *wide), x, TOLERANCE[dtype])


@DTYPES
def test_norm(dtype):
    inputs = {"x_TD": normal(300, 2560, dtype=dtype), "weight_D": normal(2560, dtype=dtype)}
    run = lambda module: lambda x_TD, weight_D: module.rms_norm(x_TD, weight_D, 1e-5)  # noqa: E731
    check(run(ops), run(reference), inputs, TOLERANCE[dtype])


@DTYPES
def test_route(dtype):
    # Logits far enough apart for the same choice in any precision.
    scores = torch.stack([torch.randperm(64, device="cuda") for _ in range(300)]).to(dtype) / 16
    inputs = {"x": scores.requires_grad_()}
    check(lambda x: ops.route(x, 6)[0], lambda x: reference.route(x, 6)[0], inputs, TOLERANCE[dtype])
    assert torch.equal(ops.route(scores, 6)[1], reference.route(scores, 6)[1])


def test_a_layer_never_waits():
    """With Aria's dtype the host launches forward and backward without waiting for the device."""
    index = torch.stack([torch.randperm(16, device="cuda")[:3] for _ in range(200)])
    x, fc1 = normal(200, 64, dtype=torch.bfloat16), normal(16, 64, 128, dtype=torch.bfloat16)
    fc2, weights = normal(16, 64, 64, dtype=torch.bfloat16), normal(200, 3, dtype=torch.bfloat16)
    experts = ExpertWeights(fc1, fc2, LoRA(normal(16, 64, 8), normal(16, 8, 128), 1.0, 0.1))
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("PyTorch's grouped products wait on this generation")
    run = lambda: ops.expert_mlp(x, experts, weights, index).sum().backward()  # noqa: E731
    run()
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
