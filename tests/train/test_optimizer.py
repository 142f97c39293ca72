"""Optimizers: a step by formula in float64, PyTorch's own, small steps in bf16, resumed state, clipping."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from aria.train.optimizer import OptimizerSettings, clip_gradients, make_optimizer, orthogonal, stochastic_round
from aria.train.state import RunState, trained_weights
from tests.helpers import few_rows
from tests.helpers.repository import environment

BASE = OptimizerSettings(learning_rate=0.01, weight_decay=0.1)
KINDS = [
    "adamw",
    "muon",
    pytest.param(
        "adamw8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
    ),
]


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "fc1.weight": (4, 32, 48),
        "q_proj.weight": (64, 64),
        "norm.weight": (64,),
        "embed_tokens.weight": (99, 8),
    }
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).mul(0.3).to(dtype)) for name, shape in shapes.items()
    }


def give_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_adamw_is_its_formula():
    named = parameters()
    before = {name: p.detach().double() for name, p in named.items()}
    optimizer = make_optimizer(named.items(), replace(BASE, rates={"q_proj*": 0.5}))
    give_gradients(named, 1)
    optimizer.step()
    for name, parameter in named.items():
        lr = 0.005 if name == "q_proj.weight" else 0.01
        g, w = parameter.grad.double(), before[name]
        w = w * (1 - lr * (0.0 if w.ndim == 1 else 0.1))
        # After one step the corrected moments are the gradient and its square.
        expected = w - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_muon_is_pytorchs_on_a_matrix_and_the_same_on_each_expert():
    named = parameters()
    optimizer = make_optimizer(named.items(), replace(BASE, kind="muon"))
    rules = {optimizer.names[id(p)]: group["rule"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, rule in rules.items() if rule == "muon"} == {"fc1.weight", "q_proj.weight"}
    experts = [nn.Parameter(expert.clone()) for expert in named["fc1.weight"].detach()]
    matrix = nn.Parameter(named["q_proj.weight"].detach().clone())
    theirs = torch.optim.Muon([matrix, *experts], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients(named, step)
        matrix.grad = named["q_proj.weight"].grad.clone()
        for expert, grad in zip(experts, named["fc1.weight"].grad, strict=True):
            expert.grad = grad.clone()
        optimizer.step()
        theirs.step()
    # The iteration runs in bf16, in other orders: the ways gone agree, not every number.
    for name, ended in (("q_proj.weight", matrix), ("fc1.weight", torch.stack([*experts]))):
        start = parameters()[name]
        assert (named[name] - ended).norm() < 0.03 * (ended - start).norm(), name


@pytest.mark.parametrize("shape", [(3, 40, 16), (16, 40), (32, 32)])
def test_orthogonal_steps_have_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)).float())
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_identically(kind, dtype):
    def run(steps: list[int], named, state=None):
        torch.manual_seed(0)
        optimizer = make_optimizer(named.items(), replace(BASE, kind=kind))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            torch.manual_seed(step)
            give_gradients(named, step)
            optimizer.step()
        return optimizer.state_dict()

    whole, halves = parameters(dtype), parameters(dtype)
    run([1, 2, 3, 4], whole)
    state = run([1, 2], halves)
    run([3, 4], halves, state)
    for name, parameter in whole.items():
        assert torch.equal(parameter, halves[name]), name
        assert not torch.equal(parameter, parameters(dtype)[name])


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_reduces_the_loss(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    optimizer = make_optimizer(model.named_parameters(), replace(BASE, kind=kind))
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    losses = []
    for _ in range(20):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("rounding, moves", [("masters", True), ("stochastic", True), ("nearest", False)])
def test_steps_below_the_precision_of_bf16_add_up(rounding, moves):
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    settings = OptimizerSettings(learning_rate=1e-4, weight_decay=0.0, rounding=rounding)
    optimizer = make_optimizer([("w", weight)], settings)
    torch.manual_seed(0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 100 steps of 1e-4 are 0.01; numbers below 1 are 0.0039 apart.
    assert abs(weight.float().mean().item() - (0.99 if moves else 1.0)) < 0.002
    assert set(optimizer.masters()) == ({"w"} if rounding == "masters" else set())


def test_stochastic_rounding_is_unbiased_and_keeps_exact_values():
    torch.manual_seed(0)
    wide = torch.tensor([1.001, -3.3333, 1e-30, 7.7e30])
    mean = torch.stack([stochastic_round(wide).double() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, wide.double(), rtol=2e-4, atol=0)
    exact = torch.tensor([1.5, -0.25, 0.0, float("inf"), float("-inf")])
    assert torch.equal(stochastic_round(exact).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped_on_the_device(kind):
    named = parameters()
    optimizer = make_optimizer(named.items(), replace(BASE, kind=kind))
    assert optimizer.defaults["fused"]
    give_gradients(named, 1)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in named.items()}
    state = {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.state_dict()["state"].items()}
    give_gradients(named, 2)
    named["norm.weight"].grad[3] = float("nan")
    norm = clip_gradients(named.values(), 1.0)
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in named.items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(t, after[n][k]) for n, s in state.items() for k, t in s.items())


def test_gradients_are_clipped_by_the_norm_of_all_together():
    named = parameters()
    give_gradients(named, 5)
    theirs = [nn.Parameter(p.detach().clone()) for p in named.values()]
    for parameter, other in zip(named.values(), theirs, strict=True):
        other.grad = parameter.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    torch.testing.assert_close(clip_gradients(named.values(), 0.7), expected)
    for parameter, other in zip(named.values(), theirs, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"learning_rate": 0.0}, "learning_rate should be above 0"),
        ({"betas": (0.9, 1.0)}, "betas should be at least 0 and below 1"),
        ({"rates": {"q": -1.0}}, "rates.q should be 0 or above"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(BASE, **wrong)


def test_a_rate_for_nothing_and_the_state_of_another_kind_are_refused():
    named = parameters()
    with pytest.raises(ValueError, match="nothing that trains is called 'vision\\*'"):
        make_optimizer(named.items(), replace(BASE, rates={"vision*": 0.1}))
    state = make_optimizer(named.items(), BASE).state_dict()
    with pytest.raises(ValueError, match="the state is that of adamw"):
        make_optimizer(named.items(), replace(BASE, kind="muon")).load_state_dict(state)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What six, then five, then three ranks left, most of which hold no row of any parameter."""
    folder = tmp_path_factory.mktemp("few rows")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.few_rows", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks processes after PyTorch was imported")


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_without_rows_save_resume_and_export(ranks, kind):
    alone, ended = few_rows.Training(kind, 1), torch.load(ranks / f"{kind}.pt")
    for _ in range(few_rows.STEPS * len(few_rows.WORLDS)):
        alone.step()
    assert ended["steps"] == alone.position.step
    saved = trained_weights(ranks / kind)
    for name, parameter in alone.named.items():
        # Matrices that are gathered for Muon are rounded to bf16 in another order.
        torch.testing.assert_close(ended["weights"][name], parameter.detach(), rtol=0, atol=0.01 * (kind == "muon"))
        assert torch.equal(saved[name], ended["weights"][name]), name


@needs_fork
def test_a_checkpoint_that_fails_on_one_rank_fails_on_all_and_is_tried_again_after_the_next_step(ranks):
    seen = torch.load(ranks / "failures.pt")
    assert "could not be written: no space left" in seen[1]["prepared"]
    assert all("could not be written: another process failed" in seen[rank]["prepared"] for rank in (0, 2))
    assert seen[0]["left"] == [], "what was half written goes away"
    for rank in seen:
        assert rank["due"] and rank["whole"] == "step-00000002"
        [line] = rank["lines"]
        assert "could not be written: rank 0: no space left" in line and "trying again" in line
    assert RunState.latest_in(ranks / "failing").name == "step-00000002"
