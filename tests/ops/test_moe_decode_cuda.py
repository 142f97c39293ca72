"""The decode kernels on a GPU: against float64, in a CUDA graph, over buffers full of NaN."""

from __future__ import annotations

import pytest
import torch

from aria.ops import MoEWeights, reference

pytestmark = pytest.mark.gpu
if torch.cuda.is_available():
    from aria.ops.kernels import gemv, moe_decode

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def layer(D: int, E: int, F: int, S: int, dtype: torch.dtype) -> dict:
    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    return {
        "norm": (torch.rand(D, device="cuda") + 0.5).to(dtype),
        "eps": 1e-6,
        "router": normal(E, D, scale=1.0),
        "fc1": normal(E, 2 * F, D, scale=D**-0.5).transpose(1, 2),
        "fc2": normal(E, D, F, scale=F**-0.5).transpose(1, 2),
        "shared": tuple(normal(*s, scale=s[1] ** -0.5) for s in ((S * F, D), (S * F, D), (D, S * F))),
    }


def in_double(weights: dict) -> dict:
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in weights.items()}
    return wide | {"shared": tuple(w.double() for w in weights["shared"])}


def poison() -> None:
    """Leave NaN in the memory of the next allocations."""
    held = [torch.full((n,), float("nan"), device="cuda") for n in (2**10, 2**14, 2**18, 2**22)]
    del held


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 2, 8, 33, 200, 512])
@pytest.mark.parametrize(("D", "E", "F", "S", "A"), [(256, 8, 176, 1, 2), (512, 64, 208, 2, 6), (1024, 5, 80, 2, 3)])
def test_moe_layer(dtype, T, D, E, F, S, A):
    torch.manual_seed(T)
    weights, x = layer(D, E, F, S, dtype), (torch.randn(T, D, device="cuda") * 2).to(dtype)
    poison()
    got = moe_decode.moe_layer_decode(x, MoEWeights(top_k=A, **weights))
    expected = reference.moe_layer(x.double(), MoEWeights(top_k=A, **in_double(weights)))
    # Near ties of the router may be resolved differently in 16 bits: such rows differ, and are few.
    error = (got.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < TOLERANCE[dtype]
    assert (error < 10 * TOLERANCE[dtype]).double().mean() > (0.999 if dtype == torch.float32 else 0.9)


@pytest.mark.parametrize("T", [2, 40, 300])
def test_all_tokens_to_the_same_experts(T):
    torch.manual_seed(T)
    weights, x = layer(256, 16, 176, 2, torch.bfloat16), torch.randn(T, 256, device="cuda", dtype=torch.bfloat16).abs()
    weights["router"][:] = -1.0
    weights["router"][[3, 7, 11]] = 1.0 + torch.arange(3, device="cuda", dtype=torch.bfloat16)[:, None]
    got = moe_decode.moe_layer_decode(x, MoEWeights(top_k=3, **weights))
    assert relative_error(got, reference.moe_layer(x.double(), MoEWeights(top_k=3, **in_double(weights)))) < 1e-2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("outputs", [(256, 64, 64), (2560, 2560, 2560), (424,)])
def test_norm_linear(dtype, outputs):
    torch.manual_seed(0)
    x, norm = (torch.randn(1, 256, device="cuda") * 2).to(dtype), torch.rand(256, device="cuda").add(0.5).to(dtype)
    storage = (torch.randn(sum(outputs), 256, device="cuda") / 16).to(dtype)
    for weights in (storage.split(outputs), tuple(w.clone() for w in storage.split(outputs))):
        poison()
        got = gemv.norm_linear_matvec(x, norm, 1e-6, *weights)
        expected = reference.norm_linear(x.double(), norm.double(), 1e-6, *(w.double() for w in weights))
        assert relative_error(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("O", "I"), [(256, 256), (2560, 2560), (96, 1664)])
def test_linear_add(dtype, O, I):
    torch.manual_seed(0)
    x, residual = torch.randn(1, I, device="cuda").to(dtype), torch.randn(1, O, device="cuda").to(dtype)
    weight = (torch.randn(O, I, device="cuda") * I**-0.5).to(dtype)
    poison()
    got = gemv.linear_add_matvec(x, weight, residual)
    assert relative_error(got, reference.linear_add(x.double(), weight.double(), residual.double())) < TOLERANCE[dtype]
    assert (
        relative_error(gemv.linear_matvec(x, weight), reference.linear(x.double(), weight.double())) < TOLERANCE[dtype]
    )


@pytest.mark.parametrize("T", [1, 24])
def test_graph_of_layers_repeats_itself(T):
    """Consecutive layers in a graph, where launches overlap, equal each layer alone, every time."""
    torch.manual_seed(T)
    D, layers = 512, [layer(512, 64, 208, 2, torch.bfloat16) for _ in range(6)]
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    mix = [(torch.randn(D, D, device="cuda") * D**-0.5).to(torch.bfloat16) for _ in layers]

    def step(pause) -> torch.Tensor:
        y = x
        for weights, o in zip(layers, mix, strict=True):
            if T == 1:
                h = gemv.norm_linear_matvec(y, weights["norm"], 1e-6, o)
                pause()
                y = gemv.linear_add_matvec(h, o, y)
                pause()
            y = moe_decode.moe_layer_decode(y, MoEWeights(top_k=6, **weights))
            pause()
        return y

    expected = step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(lambda: None)
    for _ in range(20):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, expected)
