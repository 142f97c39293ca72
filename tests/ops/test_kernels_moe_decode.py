"""The decode kernels against their references, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from aria.ops import MoEWeights, reference

pytest.importorskip("triton")
from aria.ops.kernels import gemv, moe_decode


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def layer(D: int, E: int, F: int, S: int, dtype: torch.dtype = torch.float32) -> dict:
    """Weights of a small layer; experts are laid out [E, out, in], as in the engine."""
    fc1, fc2 = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    shared = (torch.randn(S * F, D) * D**-0.5, torch.randn(S * F, D) * D**-0.5, torch.randn(D, S * F) * F**-0.5)
    return {
        "norm": torch.rand(D).add(0.5).to(dtype),
        "eps": 1e-5,
        "router": torch.randn(E, D).to(dtype),
        "fc1": fc1.to(dtype).transpose(1, 2),
        "fc2": fc2.to(dtype).transpose(1, 2),
        "shared": tuple(w.to(dtype) for w in shared),
    }


def in_double(weights: dict) -> dict:
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in weights.items()}
    return wide | {"shared": tuple(w.double() for w in weights["shared"])}


@pytest.mark.parametrize("T", [1, 2, 17])
@pytest.mark.parametrize(("D", "E", "F", "S", "A"), [(48, 8, 32, 1, 2), (80, 5, 48, 2, 3)])
def test_moe_layer(T, D, E, F, S, A):
    torch.manual_seed(T + D)
    weights, x = layer(D, E, F, S), torch.randn(T, D) * 3
    expected = reference.moe_layer(x.double(), MoEWeights(top_k=A, **in_double(weights)))
    assert relative_error(moe_decode.moe_layer_decode(x, MoEWeights(top_k=A, **weights)), expected) < 1e-5


def test_norm_linear():
    torch.manual_seed(0)
    x, norm = torch.randn(1, 48) * 3, torch.rand(48) + 0.5
    storage = torch.randn(72, 48)
    together = storage[:40], storage[40:56], storage[56:]
    for weights in (together, tuple(w.clone() for w in together), together[::-1], (storage[:41],)):
        expected = reference.norm_linear(x.double(), norm.double(), 1e-5, *(w.double() for w in weights))
        assert relative_error(gemv.norm_linear_matvec(x, norm, 1e-5, *weights), expected) < 1e-5


def test_linear_add():
    torch.manual_seed(0)
    x, weight, residual = torch.randn(1, 48), torch.randn(37, 48), torch.randn(1, 37)
    expected = reference.linear_add(x.double(), weight.double(), residual.double())
    assert relative_error(gemv.linear_add_matvec(x, weight, residual), expected) < 1e-5
    assert relative_error(gemv.linear_matvec(x, weight), expected - residual) < 1e-5


@pytest.mark.parametrize("T", [1, 5, 70])
def test_equal_logits_go_to_the_lower_expert(T):
    torch.manual_seed(0)
    weights, x = layer(32, 8, 16, 1), torch.randn(T, 32)
    weights["router"][:] = 0.0
    first = {name: weights[name][:2] for name in ("router", "fc1", "fc2")}
    expected = reference.moe_layer(x.double(), MoEWeights(top_k=2, **in_double(weights | first)))
    weights["fc2"][2:] = float("nan")  # these must not be read
    assert relative_error(moe_decode.moe_layer_decode(x, MoEWeights(top_k=2, **weights)), expected) < 1e-5


def test_all_tokens_to_the_same_experts():
    torch.manual_seed(0)
    weights, x = layer(32, 8, 16, 2), torch.randn(40, 32).abs()
    weights["router"] = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0])[:, None].expand(8, 32).contiguous()
    expected = reference.moe_layer(x.double(), MoEWeights(top_k=2, **in_double(weights)))
    assert relative_error(moe_decode.moe_layer_decode(x, MoEWeights(top_k=2, **weights)), expected) < 1e-5


def test_unsupported_arguments_are_detected():
    weights, x = layer(32, 8, 16, 1), torch.randn(3, 32)
    laid_out = MoEWeights(top_k=2, **weights)
    assert laid_out.served(moe_decode.serves) and moe_decode.fits(x, laid_out)
    assert not moe_decode.serves(MoEWeights(top_k=2, **weights | {"fc1": weights["fc1"].contiguous()}))
    assert not moe_decode.fits(x.bfloat16(), laid_out)
    assert not moe_decode.fits(torch.randn(3, 64)[:, ::2], laid_out)
    assert not moe_decode.fits(torch.randn(257, 32), laid_out)
    assert gemv.fits_linear(x[:1], *weights["shared"][:2]) and not gemv.fits_linear(x, *weights["shared"][:2])
