"""The kernels of training in Triton's interpreter: results and gradients against formulas in float64.

T tokens, D hidden, E experts, A experts per token, F expert width, R rank of an adapter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria import ops
from aria.ops import ExpertWeights, LoRA, reference
from aria.ops.kernels import lora_train, moe_train, pointwise, swiglu
from aria.ops.moe import expert_mlp_sorted
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", [moe_train.expert_mlp_train, expert_mlp_sorted], ids=["kernels", "plain"]
)


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading uninitialised values shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def gradients(run, inputs: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
    """The result and the gradient of every input; zeros for inputs without a gradient."""
    out = run(**inputs)
    found = torch.autograd.grad(out, list(inputs.values()), seed.to(out.dtype), allow_unused=True)
    return {"out": out.detach()} | {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), found, strict=True)
    }


def check(run, expected_run, inputs: dict[str, Tensor], shape: tuple[int, ...], tolerance: float) -> None:
    seed = torch.randn(shape)
    got = gradients(run, inputs, seed)
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = gradients(expected_run, wide, seed)
    for name, value in expected.items():
        assert got[name].isfinite().all(), name
        assert error(got[name], value) < tolerance, f"{name}: {error(got[name], value):.2e}"


# Experts

CASES = {
    "some": (37, 24, 5, 2, 40),
    "one token": (1, 16, 4, 3, 8),
    "most experts empty": (5, 16, 64, 2, 8),
    "more than a tile each": (150, 40, 2, 1, 72),
}


class Experts:
    """Random experts with LoRA weights, which any implementation can run."""

    def __init__(self, name: str, dtype: torch.dtype, ranks: tuple[int, int]):
        T, D, E, A, F = CASES[name]
        self.shape = (T, D)
        self.index = torch.stack([torch.randperm(E)[:A] for _ in range(T)])
        self.inputs = {
            "x": normal(T, D, dtype=dtype),
            "fc1": normal(E, D, 2 * F, dtype=dtype, scale=D**-0.5),
            "fc2": normal(E, F, D, dtype=dtype, scale=F**-0.5),
            "weights": normal(T, A, dtype=dtype),
        }
        for n, (rank, width, out) in enumerate(zip(ranks, (D, F), (2 * F, D), strict=True), start=1):
            if rank:
                self.inputs |= {f"a{n}": normal(E, width, rank, scale=width**-0.5), f"b{n}": normal(E, rank, out)}

    def run(self, implementation, index=None, **how):
        index = self.index if index is None else index

        def apply(x, fc1, fc2, weights, a1=None, b1=None, a2=None, b2=None):
            loras = None if a1 is None else LoRA(a1, b1, 0.7), None if a2 is None else LoRA(a2, b2, 1.3)
            return implementation(x, ExpertWeights(fc1, fc2, *loras), weights, index, **how)

        return apply


@pytest.mark.slow
@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_experts(name, dtype, implementation):
    case = Experts(name, dtype, ranks=(4, 8))
    check(case.run(implementation), case.run(reference.expert_mlp), case.inputs, case.shape, TOLERANCE[dtype])


@IMPLEMENTATIONS
@pytest.mark.parametrize("ranks", [(0, 0), (3, 0), (0, 20)], ids=["none", "first", "second"])
def test_experts_with_fewer_lora_weights(ranks, implementation):
    case = Experts("some", torch.float32, ranks)
    check(case.run(implementation), case.run(reference.expert_mlp), case.inputs, case.shape, TOLERANCE[torch.float32])


@IMPLEMENTATIONS
@DTYPES
def test_experts_on_other_ranks_add_nothing(dtype, implementation):
    """Choices with the index E equal choices of any expert with zero weight, whatever their weights."""
    case = Experts("some", dtype, ranks=(4, 8))
    experts_here = len(case.inputs["fc1"])
    case.index[::3] = experts_here  # some tokens have none here
    case.index[1::4, 0] = experts_here
    here = case.index < experts_here

    def expected(weights, **inputs):
        masked = case.run(reference.expert_mlp, case.index.where(here, 0))
        return masked(weights=weights * here, **inputs)

    run = case.run(implementation, present=int(here.sum()))
    check(run, expected, case.inputs, case.shape, TOLERANCE[dtype])


@IMPLEMENTATIONS
def test_experts_without_tokens_have_gradients_of_zeros(implementation):
    """A rank of several may have none of them."""
    case = Experts("some", torch.float32, ranks=(8, 8))
    case.index = case.index[:0]
    inputs = case.inputs | {name: case.inputs[name].detach()[:0].requires_grad_() for name in ("x", "weights")}
    out = case.run(implementation)(**inputs)
    assert out.shape == (0, 24)
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(grad.shape == x.shape and not grad.any() for grad, x in zip(grads, inputs.values(), strict=True))


@pytest.mark.slow
def test_frozen_inputs_get_no_gradient_and_do_not_change_others():
    case = Experts("one token", torch.float32, ranks=(8, 8))
    whole = gradients(case.run(moe_train.expert_mlp_train), case.inputs, torch.ones(case.shape))
    for name in ("x", "fc1", "fc2", "weights", "a1", "b1", "a2", "b2"):
        alone = {key: x.detach().requires_grad_(key == name) for key, x in case.inputs.items()}
        case.run(moe_train.expert_mlp_train)(**alone).sum().backward()
        assert all((x.grad is not None) == (key == name) for key, x in alone.items()), name
        assert torch.equal(alone[name].grad, whole[name]), name


@pytest.mark.slow
def test_backward_of_experts_uses_the_same_dropout():
    """With a fixed mask, numerical derivatives equal those of backward."""
    case = Experts("some", torch.float32, ranks=(8, 8))
    x, fc1, fc2, weights, a1, b1, a2, b2 = case.inputs.values()

    def loss(a1: Tensor, a2: Tensor) -> Tensor:
        torch.manual_seed(3)
        experts = ExpertWeights(fc1, fc2, LoRA(a1, b1, 0.5, 0.4), LoRA(a2, b2, 0.5, 0.3))
        return moe_train.expert_mlp_train(x, experts, weights, case.index).square().mean()

    value = loss(a1, a2)
    plain = moe_train.expert_mlp_train(x, ExpertWeights(fc1, fc2), weights, case.index)
    assert not torch.equal(value, plain.square().mean())
    dx, d1, d2 = torch.autograd.grad(value, [x, a1, a2])
    for given, grad in ((a1, d1), (a2, d2)):
        step = torch.randn_like(given) * 1e-2
        ends = [(a1 + s * step, a2) if given is a1 else (a1, a2 + s * step) for s in (1, -1)]
        measured = (loss(*ends[0]) - loss(*ends[1])) / 2
        assert abs(measured - (grad * step).sum()) < 2e-2 * abs(measured) + 1e-5
    step = torch.randn_like(x) * 1e-3
    keep, moved = x, []
    for s in (1, -1):
        x = keep + s * step
        moved.append(loss(a1, a2))
    assert abs((moved[0] - moved[1]) / 2 - (dx * step).sum()) < 2e-2 * abs(moved[0] - moved[1]) + 1e-5


# Linears


@DTYPES
@pytest.mark.parametrize(("T", "I", "O", "R"), [(1, 8, 24, 1), (70, 100, 300, 5), (64, 64, 256, 16)])
def test_linear_with_lora(T, I, O, R, dtype):
    inputs = {
        "x": normal(T, I, dtype=dtype),
        "weight": normal(O, I, dtype=dtype, scale=I**-0.5),
        "bias": normal(O, dtype=dtype),
        "a": normal(R, I, scale=I**-0.5),
        "b": normal(O, R),
    }

    def run(lora_linear):
        return lambda x, weight, bias, a, b: lora_linear(x, weight, bias, LoRA(a, b, 0.6))

    check(run(lora_train.lora_linear_train), run(reference.lora_linear), inputs, (T, O), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("scalings", [(0.6, 0.6, 0.6), (0.6, 1.0, 0.6)], ids=["equal", "different"])
def test_linears_of_one_input(dtype, scalings):
    T, I, widths, ranks = 37, 24, (40, 8, 16), (3, 8, 1)
    inputs = {"x": normal(T, I, dtype=dtype)}
    for n, (width, rank) in enumerate(zip(widths, ranks, strict=True)):
        inputs |= {f"w{n}": normal(width, I, dtype=dtype, scale=I**-0.5), f"a{n}": normal(rank, I, scale=I**-0.5)}
        inputs |= {f"b{n}": normal(width, rank)}

    def run(lora_linears):
        def apply(x, **matrices):
            layers = [(matrices[f"w{n}"], None) for n in range(3)]
            adapters = [LoRA(matrices[f"a{n}"], matrices[f"b{n}"], scalings[n]) for n in range(3)]
            return torch.cat(lora_linears(x, layers, adapters), dim=1)

        return apply

    check(run(lora_train.lora_linears_train), run(reference.lora_linears), inputs, (T, sum(widths)), TOLERANCE[dtype])


def test_dropout_keeps_the_right_share_and_mean():
    x = torch.ones(500, 300)
    noise = lora_train.Noise(0.3)
    rows, _ = lora_train.gather(x, noise=noise, dropped=True)
    again, _ = lora_train.gather(x, noise=noise, dropped=True)
    assert torch.equal(rows, again)
    assert rows.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    taken = (rows == 0).double()
    assert abs(taken.mean() - 0.3) < 0.005
    # Rows, columns and neighbours are independent: deviations are those of independent draws.
    assert abs(taken.mean(0).std() / (0.21 / 500) ** 0.5 - 1) < 0.15
    assert abs(taken.mean(1).std() / (0.21 / 300) ** 0.5 - 1) < 0.15
    for a, b in ((taken[1:], taken[:-1]), (taken[:, 1:], taken[:, :-1])):
        assert abs(((a - 0.3) * (b - 0.3)).mean()) < 0.003
    other, _ = lora_train.gather(x, noise=lora_train.Noise(0.3), dropped=True)
    assert abs(((other == 0).double() * taken).mean() - 0.09) < 0.004


def test_backward_of_a_linear_uses_the_same_dropout():
    x, weight, a = normal(40, 30), normal(20, 30), normal(4, 30)
    b = normal(20, 4)
    torch.manual_seed(5)
    y = lora_train.lora_linear_train(x, weight, None, LoRA(a, b, 2.0, 0.5))
    torch.manual_seed(5)
    dropped, _ = lora_train.gather(x.detach(), noise=lora_train.Noise(0.5), dropped=True)
    mask = dropped / x.detach()
    expected = lambda x, weight, a, b: x @ weight.T + 2.0 * (x * mask) @ a.T @ b.T  # noqa: E731
    assert error(y, expected(x, weight, a, b)) < 1e-6
    seed = torch.randn_like(y)
    inputs = [x, weight, a, b]
    for got, want in zip(
        torch.autograd.grad(y, inputs, seed), torch.autograd.grad(expected(*inputs), inputs, seed), strict=True
    ):
        assert error(got, want) < 1e-5


# Between products


@DTYPES
def test_gated(dtype):
    inputs = {"gate_TF": normal(70, 100, dtype=dtype), "up_TF": normal(70, 100, dtype=dtype)}
    check(swiglu.gated_train, reference.gated, inputs, (70, 100), TOLERANCE[dtype])


@DTYPES
def test_rotary(dtype):
    cos, sin = ops.rotary_table(torch.randint(50, (45,)), 16, 1e4, dtype)
    x = normal(45, 5, 16, dtype=dtype)
    wide = (cos.double(), sin.double())
    check(lambda x: pointwise.rotary_train(x, cos, sin), lambda x: reference.rotary(x, *wide), {"x": x}, (45, 5, 16),
          TOLERANCE[dtype])  # fmt: skip


@DTYPES
def test_route_gradients(dtype):
    logits = {"logits": normal(37, 9, dtype=dtype)}
    ours, plain = (
        lambda logits, route=route: route(logits, 3)[0] for route in (pointwise.route_train, reference.route)
    )
    check(ours, plain, logits, (37, 3), TOLERANCE[dtype])
    assert torch.equal(pointwise.route_train(logits["logits"], 3)[1], reference.route(logits["logits"], 3)[1])
