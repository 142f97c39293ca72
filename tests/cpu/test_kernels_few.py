"""The kernels for few tokens against their references, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from aria.ops import reference

pytest.importorskip("triton")
from aria.ops.kernels import few


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def layer(D: int, E: int, F: int, S: int, dtype: torch.dtype = torch.float32) -> dict:
    """Weights of a small layer; experts with outputs before inputs in memory, as the engine lays them out."""
    fc1, fc2 = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    shared = (torch.randn(S * F, D) * D**-0.5, torch.randn(S * F, D) * D**-0.5, torch.randn(D, S * F) * F**-0.5)
    return {
        "norm_D": torch.rand(D).add(0.5).to(dtype),
        "eps": 1e-5,
        "router_ED": torch.randn(E, D).to(dtype),
        "fc1_EDF": fc1.to(dtype).transpose(1, 2),
        "fc2_EFD": fc2.to(dtype).transpose(1, 2),
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
    expected = reference.moe_layer(x.double(), top_k=A, **in_double(weights))
    assert relative_error(few.moe_layer(x, top_k=A, **weights), expected) < 1e-5


@pytest.mark.parametrize("T", [1, 3, 20])
def test_norm_linear(T):
    torch.manual_seed(T)
    x, norm = torch.randn(T, 48) * 3, torch.rand(48) + 0.5
    storage = torch.randn(72, 48)
    together = storage[:40], storage[40:56], storage[56:]
    for weights in (together, tuple(w.clone() for w in together), together[::-1], (storage[:41],)):
        expected = reference.norm_linear(x.double(), norm.double(), 1e-5, *(w.double() for w in weights))
        assert relative_error(few.norm_linear(x, norm, 1e-5, *weights), expected) < 1e-5


@pytest.mark.parametrize("T", [1, 3, 20])
def test_linear_add(T):
    torch.manual_seed(T)
    x, weight, residual = torch.randn(T, 48), torch.randn(37, 48), torch.randn(T, 37)
    expected = reference.linear_add(x.double(), weight.double(), residual.double())
    assert relative_error(few.linear_add(x, weight, residual), expected) < 1e-5
