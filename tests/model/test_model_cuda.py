"""On a GPU: the fast operations against their references, and the whole model against itself in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from aria import AriaForConditionalGeneration, ops
from aria.model import Aria, Packed, pack_patches
from aria.ops import Segments
from tests.helpers.gpu_models import CONFIG, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 3, 64, 513])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expert_mlp(tokens, dtype):
    torch.manual_seed(tokens)
    E, D, F, A = 16, 128, 48, 3
    x, fc1, fc2 = (torch.randn(shape) * 0.2 for shape in ((tokens, D), (E, D, 2 * F), (E, F, D)))
    logits = torch.randn(tokens, E)
    logits[:, 5:9] = -20.0  # experts that no token chooses
    weights, index = ops.route(logits, A)
    expected = ops.reference.expert_mlp(
        x.double(), ops.ExpertWeights(fc1.double(), fc2.double()), weights.double(), index
    )
    x, fc1, fc2, weights = (t.cuda().to(dtype) for t in (x, fc1, fc2, weights))
    got = ops.expert_mlp(x, ops.ExpertWeights(fc1, fc2), weights, index.cuda())
    assert relative_error(got, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("lengths", [((5, 5), (5, 5)), ((1, 30, 7), (1, 30, 7)), ((3, 1, 9), (8, 40, 9))])
def test_attention(causal, width, lengths):
    torch.manual_seed(0)
    queries, keys = (Segments.of(n) for n in lengths)
    q = torch.randn(queries.total, 4, width)
    k, v = (torch.randn(keys.total, 2, width) for _ in range(2))
    expected = ops.reference.attention(q.double(), k.double(), v.double(), queries, keys, causal=causal)
    on_gpu = [Segments.of(n, "cuda") for n in lengths]
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-3)):
        got = ops.attention(*(t.cuda().to(dtype) for t in (q, k, v)), *on_gpu, causal=causal)
        assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_model(dtype, tolerance):
    model = Aria.random(CONFIG, dtype=torch.float32, device="cpu", std=0.08)
    pixels = torch.rand(2, 3, 490, 490) * 2 - 1
    mask = torch.zeros(2, 490, 490, dtype=torch.bool)
    mask[0, :336], mask[1, :, :367] = True, True
    ids = torch.randint(20, 320, (300,))
    ids[5:133] = ids[140:268] = 9

    def run(model: Aria, device: str) -> torch.Tensor:
        features = model.encode_images(pack_patches(pixels.to(device), mask.to(device), CONFIG.vision))
        context = Packed(CONFIG.text, Segments.of([135, 165], device))
        return model.logits(model(ids.to(device), context, features).hidden)

    with torch.no_grad():
        expected = run(model, "cpu")
        got = run(model.to("cuda", dtype), "cuda")
    assert relative_error(got, expected) < tolerance


def test_generation_on_the_gpu_equals_the_cpu_in_float32():
    model = AriaForConditionalGeneration(Aria.random(CONFIG, dtype=torch.float32, device="cpu", std=0.1))
    ids = torch.randint(20, 320, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = model.generate(ids, mask, max_new_tokens=16, eos_token_id=None)
    got = model.to("cuda").generate(ids.cuda(), mask.cuda(), max_new_tokens=16, eos_token_id=None)
    assert torch.equal(got.cpu(), expected)


def test_loading_directly_to_the_gpu(tmp_path):
    model = AriaForConditionalGeneration(Aria.random(CONFIG, dtype=torch.bfloat16, device="cpu"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    loaded = AriaForConditionalGeneration.from_pretrained(tmp_path, device="cuda")
    assert loaded.dtype == torch.bfloat16
    for (name, got), expected in zip(loaded.model.state_dict().items(), model.model.state_dict().values(), strict=True):
        assert got.is_cuda and torch.equal(got.cpu(), expected), name
