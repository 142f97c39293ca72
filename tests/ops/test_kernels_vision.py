"""Kernels of the vision encoder through the interpreter, and its inference path, against plain PyTorch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import subprocess
import sys

import pytest
import torch

from aria import ops
from aria.config import ProjectorConfig, VisionConfig
from aria.model import vision
from aria.model.patches import pack_patches
from aria.model.projector import Projector
from aria.model.vision import VisionTower
from aria.ops import reference

VISION = VisionConfig(
    hidden_size=144, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=98, patch_size=14
)
PROJECTOR = ProjectorConfig(patch_to_query={49: 4, 16: 2}, hidden_size=144, num_attention_heads=2, output_size=64)


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    from aria.ops.kernels import norm_vision

    return norm_vision


def random_module(module: torch.nn.Module, std: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, std, generator=generator)
    return module


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", [(5, 1152), (1, 64), (4, 72), (9, 144), (0, 72)])
@pytest.mark.parametrize("shifted", [False, True])
def test_layer_norm(kernels, shape, shifted):
    torch.manual_seed(0)
    wide = torch.randn(shape[0], shape[1] + 8) * 3 + 1
    x, (weight, bias) = wide[:, : shape[1]], torch.randn(2, shape[1])
    shift = torch.randn(shape[1]) * 5 if shifted else None
    got = kernels.layer_norm_triton(x, weight, bias, 1e-6, shift)
    moved = x.double() if shift is None else x.double() + shift
    expected = torch.nn.functional.layer_norm(moved, shape[1:], weight.double(), bias.double(), 1e-6)
    assert got.shape == x.shape and got.dtype == x.dtype
    if shape[0]:
        assert relative_error(got, expected) < 1e-6
        assert relative_error(reference.layer_norm(x, weight, bias, 1e-6, shift), expected) < 1e-6


@pytest.fixture
def inference(monkeypatch):
    """The inference path on the CPU in float32, with the reference of each fused operation."""
    monkeypatch.setattr(ops, "inference_kernels", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(ops, "layer_norm", reference.layer_norm)
    monkeypatch.setattr(ops, "linear_gelu", reference.linear_gelu)


@pytest.mark.parametrize("laid_out", [False, True])
def test_encoder_and_projector_in_inference(inference, monkeypatch, laid_out):
    monkeypatch.setattr(vision, "MLP_PATCHES", 60)  # of 77: two parts
    monkeypatch.setattr(vision, "_round_rows", lambda columns, device: 9)  # a part is 4 rounds and a rest
    tower, projector = random_module(VisionTower(VISION), 0.1), random_module(Projector(PROJECTOR), 0.1)
    torch.manual_seed(0)
    mask = torch.zeros(2, 98, 98, dtype=torch.bool)
    mask[0, :, :50], mask[1] = True, True
    patches = pack_patches(torch.randn(2, 3, 98, 98), mask, VISION)
    hidden = tower(patches)  # with gradients: the plain path
    tokens = projector(hidden, patches.segments, patches.grid_patches)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    if laid_out:
        for layer in tower.encoder.layers:
            layer.self_attn.lay_out()
        attention = tower.encoder.layers[0].self_attn
        assert ops.adjacent([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        assert ops.adjacent([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias])
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    with torch.no_grad():
        fast = tower(patches)
        assert relative_error(fast, hidden) < 1e-5
        assert relative_error(projector(fast, patches.segments, patches.grid_patches), tokens) < 1e-5


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from aria.ops.kernels import vision_attention
from aria.ops.segments import Segments

def type_of(x):
    if hasattr(x, "block_shape"):
        return f"tensordesc<bf16{list(x.block_shape)},{x.layout!r}>"
    if isinstance(x, torch.Tensor):
        return {torch.bfloat16: "*bf16", torch.int32: "*i32"}[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"

for patches in (PATCHES):
    q, k, v = torch.empty(patches, 3, 16, 72, dtype=torch.bfloat16).unbind(1)
    segments = Segments.of([patches])
    _, arguments, constants = vision_attention._plan(q, k, v, torch.empty_like(q), segments, segments, 132)
    kernel = vision_attention._attention_kernel
    signature = {name: type_of(x) for name, x in zip(kernel.arg_names, arguments)}
    values = {name: constants[name] for name in kernel.arg_names if name in constants}
    options = {name: value for name, value in constants.items() if name not in values}
    source = GluonASTSource(kernel, signature | dict.fromkeys(values, "constexpr"), values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 232_448, compiled.metadata.shared
    assert compiled.asm["ptx"].count("wgmma.mma_async") >= 84
    print("compiled", constants["GROUPS"])
"""


@pytest.mark.slow
def test_attention_compiles_for_hopper():
    """Check that this Triton compiles it, for both numbers of groups; tests on GPUs check its results."""
    pytest.importorskip("triton.experimental.gluon")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.replace("PATCHES", "1225, 4900")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["compiled 3", "compiled 2"]
