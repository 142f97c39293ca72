"""On a GPU: the vision encoder's kernels against float64, and its inference path against float32."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from aria import ops
from aria.config import ProjectorConfig, VisionConfig
from aria.model import vision
from aria.model.patches import pack_patches
from aria.model.projector import Projector
from aria.model.vision import VisionTower
from aria.ops import Segments

pytestmark = pytest.mark.gpu

VISION = VisionConfig(hidden_size=576, intermediate_size=1104, num_hidden_layers=4, num_attention_heads=8)
PROJECTOR = ProjectorConfig(hidden_size=576, num_attention_heads=8, output_size=512)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next tensor of this shape will probably get."""
    torch.full(shape, float("nan"), dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((1,), (1,)),
        ((128,), (128,)),
        ((193,), (129,)),
        ((1225, 300, 1, 129, 700, 64), (1225, 300, 1, 129, 700, 64)),
        ((128, 256, 128), (1225, 4900, 77)),
        ((40,) * 30, (40,) * 30),
        ((2500, 2500), (2500, 2500)),
    ],
)
@pytest.mark.parametrize(("heads", "width"), [(5, 72), (5, 80), (16, 72)])  # with 16, programs take several tiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention(queries, keys, heads, width, dtype):
    torch.manual_seed(0)
    segments = [Segments.of(n, "cuda") for n in (queries, keys)]
    q = torch.randn(sum(queries), heads, width, device="cuda", dtype=dtype)
    # Keys and values are parts of a wider tensor, as from a fused product, between NaN.
    wide = torch.full((sum(keys), 2 * heads + 2, width), float("nan"), device="cuda", dtype=dtype)
    wide[:, 1:-1] = torch.randn(sum(keys), 2 * heads, width, device="cuda", dtype=dtype)
    k, v = wide[:, 1 : heads + 1] * 2, wide[:, heads + 1 : -1]
    expected = ops.reference.attention(q.double(), k.double(), v.double(), *segments, causal=False)
    poison(q.shape, dtype)
    with torch.no_grad():
        got = ops.attention(q, k, v, *segments, causal=False)
    assert got.shape == q.shape and got.dtype == dtype
    assert relative_error(got, expected) < (6e-3 if dtype == torch.bfloat16 else 1e-3)


def test_attention_of_large_scores_and_far_values():
    torch.manual_seed(0)
    segments = Segments.of([500, 700], "cuda")
    q, k, v = (torch.randn(1200, 2, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q, k = q * 6, k * 6
    k[:200] *= 8
    expected = ops.reference.attention(q.double(), k.double(), v.double(), segments, segments, causal=False)
    with torch.no_grad():
        assert relative_error(ops.attention(q, k, v, segments, segments, causal=False), expected) < 1e-2


def test_attention_runs_in_a_graph():
    if find_spec("triton.experimental.gluon") is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    segments = Segments.of([300, 300, 300], "cuda")
    q, k, v = (torch.randn(900, 4, 72, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        ops.attention(q, k, v, segments, segments, causal=False)
        with torch.cuda.graph(graph):
            out = ops.attention(q, k, v, segments, segments, causal=False)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    expected = ops.reference.attention(q.double(), k.double(), v.double(), segments, segments, causal=False)
    assert relative_error(out, expected) < 6e-3


@pytest.mark.parametrize("shape", [(1, 1152), (1225, 1152), (7, 576), (33, 72)])
@pytest.mark.parametrize("shifted", [False, True])
def test_layer_norm(shape, shifted):
    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * 3 + 1).bfloat16()
    weight, bias = torch.randn(2, shape[1], device="cuda").bfloat16()
    shift = torch.randn(shape[1], device="cuda") if shifted else None
    moved = x.double() if shift is None else x.double() + shift
    expected = F.layer_norm(moved, shape[1:], weight.double(), bias.double(), 1e-6)
    poison(shape, x.dtype)
    with torch.no_grad():
        assert relative_error(ops.layer_norm(x, weight, bias, 1e-6, shift), expected) < 4e-3


def test_linear_gelu():
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 576, device="cuda").bfloat16() for n in (300, 1104))
    bias = torch.randn(1104, device="cuda").bfloat16()
    expected = ops.reference.linear_gelu(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        assert relative_error(ops.linear_gelu(x, weight, bias), expected) < 4e-3


@pytest.mark.parametrize("rounds", [4.0, 4.5, 4.9])
def test_product_of_a_few_rounds(rounds):
    torch.manual_seed(0)
    P = int(rounds * (vision._round_rows(1152, torch.device("cuda", 0)) or 1000))
    x, y, weight = (torch.randn(shape, device="cuda").bfloat16() for shape in ((P, 1152), (P, 96), (1152, 96)))
    expected = x.double() + y.double() @ weight.double().T
    with torch.no_grad():
        vision._add_product(x, y, weight)
    assert relative_error(x, expected) < 4e-3


def encoder(dtype: torch.dtype) -> tuple[VisionTower, Projector]:
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.device("cuda"):
        modules = VisionTower(VISION), Projector(PROJECTOR)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                drawn = torch.randn(parameter.shape, device="cuda", generator=generator) * 0.05
                parameter.copy_(drawn.bfloat16())
            module.to(dtype).eval()
    return modules


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("size", [490, 980])
def test_encoder_and_projector(laid_out, size):
    torch.manual_seed(0)
    mask = torch.ones(3, size, size, dtype=torch.bool)
    mask[1, :, size // 2 :] = False
    mask[2, size // 3 :] = False
    pixels = torch.randn(3, 3, size, size, device="cuda", dtype=torch.bfloat16)

    def run(tower: VisionTower, projector: Projector) -> torch.Tensor:
        patches = pack_patches(pixels, mask, VISION)
        return projector(tower(patches), patches.segments, patches.grid_patches)

    with torch.no_grad():
        expected = run(*encoder(torch.float32))
        modules = encoder(torch.bfloat16)
        with ops.use("reference"):
            plain = relative_error(run(*modules), expected)
        if laid_out:
            for module in modules[0].modules():
                if hasattr(module, "lay_out"):
                    module.lay_out()
        assert relative_error(run(*modules), expected) < 1.1 * plain


@pytest.mark.parametrize("size", [490])
def test_encoder_in_a_graph(size):
    tower, projector = encoder(torch.bfloat16)
    patches = pack_patches(torch.randn(2, 3, size, size, device="cuda", dtype=torch.bfloat16), None, VISION)
    graph = torch.cuda.CUDAGraph()

    def run() -> torch.Tensor:
        return projector(tower(patches), patches.segments, patches.grid_patches)

    with torch.no_grad():
        run()
        with torch.cuda.graph(graph):
            out = run()
        patches.pixels.normal_()
        graph.replay()
        assert relative_error(out, run()) < 5e-3
