"""The prefill kernels of the mixture of experts on a GPU: all tile shapes, any imbalance, inside a CUDA graph.

T tokens, D hidden, E experts, A experts per token, F expert width, W width of the shared experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aria.ops import ExpertWeights, MoEWeights, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
    ),
]

D, E, A, F, W = 640, 16, 3, 208, 416
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def layer(dtype: torch.dtype) -> MoEWeights:
    """Weights laid out as in the engine."""
    gate_up = normal(2 * W, D, dtype=dtype, scale=D**-0.5)
    return MoEWeights(
        normal(D, dtype=dtype),
        1e-6,
        normal(E, D, dtype=dtype, scale=D**-0.5),
        normal(E, 2 * F, D, dtype=dtype, scale=D**-0.5).transpose(1, 2),
        normal(E, D, F, dtype=dtype, scale=F**-0.5).transpose(1, 2),
        (gate_up[:W], gate_up[W:], normal(D, W, dtype=dtype, scale=W**-0.5)),
        A,
    )


def error(got: Tensor, x: Tensor, layer: MoEWeights) -> float:
    """Error against float64, with the kernel's choice of experts, which depends on rounding."""
    from aria.ops.kernels.permute import norm_route

    normed, weights, index, _ = norm_route(x, layer.norm, layer.eps, layer.router, layer.top_k)
    normed, weights, fc1, fc2 = (tensor.double() for tensor in (normed, weights, layer.fc1, layer.fc2))
    gate, up, down = (weight.double() for weight in layer.shared)
    routed = reference.expert_mlp(normed, ExpertWeights(fc1, fc2), weights, index.long())
    hidden = torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    expected = x.double() + routed + hidden @ down.T
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading uninitialised values shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 513, 2048, 8191])
def test_layer(tokens, dtype):
    from aria.ops.kernels import moe_prefill

    weights, x = layer(dtype), normal(tokens, D, dtype=dtype)
    assert moe_prefill.serves(weights) and moe_prefill.fits(x, weights)
    with torch.no_grad():
        got = moe_prefill.moe_layer_prefill(x, weights)
        again = moe_prefill.moe_layer_prefill(x, weights)
    assert torch.equal(got, again)
    assert error(got, x, weights) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [129, 3000])
def test_all_tokens_to_the_same_experts(tokens):
    from aria.ops.kernels import moe_prefill

    weights, x = layer(torch.bfloat16), normal(tokens, D, dtype=torch.bfloat16)
    weights.norm.fill_(1.0)
    x[:, 0] = 20.0  # the input that the router of three experts uses
    weights.router[:, 0] = 0.0
    weights.router[5:8, 0] = 4.0
    assert error(moe_prefill.moe_layer_prefill(x, weights), x, weights) < TOLERANCE[torch.bfloat16]


def test_inside_a_graph_and_with_other_tokens():
    from aria.ops.kernels import moe_prefill

    weights, x = layer(torch.bfloat16), normal(777, D, dtype=torch.bfloat16)
    moe_prefill.moe_layer_prefill(x, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = moe_prefill.moe_layer_prefill(x, weights)
    for _ in range(2):
        x.copy_(normal(777, D, dtype=torch.bfloat16))
        graph.replay()
        assert torch.equal(got, moe_prefill.moe_layer_prefill(x, weights))


def test_route():
    from aria.ops.kernels.permute import route_triton

    logits = normal(5000, 64, dtype=torch.float32)
    weights, index = route_triton(logits, 6)
    expected_weights, expected_index = reference.route(logits, 6)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(weights, expected_weights)
