"""The training loop on CUDA: the objective against the CPU's, a resumed run in bf16, estimated memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from aria.checkpoint import load_model
from aria.config import AriaConfig
from aria.processor.image_inputs import Crops
from aria.train import targets
from aria.train.batch import Batch, Sample
from aria.train.loss import IGNORE_INDEX
from aria.train.objective import Objective, ObjectiveSettings, Step
from aria.train.preflight import Estimator
from aria.train.recipe import Recipe
from aria.train.run import train

pytestmark = pytest.mark.gpu

NAMES = ("red", "green", "blue", "black", "white", "yellow")


def batch(config: AriaConfig, tokens: int) -> Batch:
    """Two sequences, one with a picture, and filler."""
    generator = torch.Generator().manual_seed(0)
    size, queries = next(iter(config.image_sizes().items()))
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=generator)
    words = torch.randint(10, config.text.vocab_size, (90,), generator=generator)
    seen = torch.cat([words[:5], torch.full((queries,), config.image_token_index), words[5:40]])
    samples = []
    for ids, crops in ((seen, (Crops(pixels, ((size, size // 2),)),)), (words[40:], ())):
        targets_T = torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])
        targets_T = targets_T.masked_fill(targets_T == config.image_token_index, IGNORE_INDEX)
        samples.append(Sample(ids, targets_T, crops))
    return Batch.pack(samples, tokens, 2)


def losses(device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_model(None, dtype=dtype, device=device)
    torch.manual_seed(0)
    chosen = targets.Targets(dropout=0.0, freeze_projector=False, modules=("fc1", "fc2", "q_proj", "lm_head"))
    targets.apply(model, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
            elif name.endswith("adapter.a"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
    model.train()
    made = batch(model.config, 512)
    found = Objective(model)(made.to(device), Step(made.labels, 1, 0.0))
    found.total.backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return found.total.item(), gradients


def test_the_objective_is_the_cpus():
    loss, gradients = losses("cuda", torch.float32)
    expected, reference = losses("cpu", torch.float32)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert gradients.keys() == reference.keys()
    for name in reference:
        distance = (gradients[name] - reference[name]).norm() / reference[name].norm().clamp(min=1e-6)
        assert distance < 0.01, f"{name}: {distance:.2e}"
    # In bf16 some tokens go to other experts, so that single gradients may differ.
    assert losses("cuda", torch.bfloat16)[0] == pytest.approx(expected, rel=0.03)


def test_cached_images_come_back_unchanged():
    model = load_model(None, dtype=torch.bfloat16, device="cuda")
    for part in (model.vision_tower, model.multi_modal_projector):
        part.requires_grad_(False)
    size = min(model.config.image_sizes())
    pixels = torch.randint(0, 256, (40, 1, 3, size, size), dtype=torch.uint8, device="cuda")
    pictures = [Crops(one, ((size, size),), bytes([number])) for number, one in enumerate(pixels)]
    objective = Objective(model, ObjectiveSettings(picture_bytes=1 << 30))
    first, _ = objective._see(pictures)
    assert len(objective.encoded) == 40
    # Asked for again before the device has done any of it.
    for order in (list(range(40)), [7, 3, 39, 3, 0]):
        again, _ = objective._see([pictures[i] for i in order])
        assert not objective.encoded
        assert torch.equal(again, torch.cat([first.chunk(40)[i] for i in order]))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    rows = []
    for i, name in enumerate(NAMES * 4):
        Image.new("RGB", (100, 80), name).save(tmp_path / f"{i}.png")
        asked = [{"type": "image", "text": None}, {"type": "text", "text": "which colour?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"the colour {name}"}]
        rows.append(json.dumps({"messages": messages, "images": [f"{i}.png"]}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return Recipe.from_table(
        {
            "model": {"dtype": "bfloat16"},
            "data": {"paths": [str(tmp_path)], "workers": 2},
            "batch": {"tokens": 2048},
            "targets": {"freeze_vit": False, "freeze_projector": False},
            "optimizer": {"learning_rate": 2e-3},
            "budget": {"steps": 12},
            "log": {"every": 1},
            "checkpoint": {"every_steps": 5},
        }
    )


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_learns_stops_and_resumes(recipe, tmp_path):
    out = tmp_path / "run"
    assert train(recipe, out, stop_after=0.0) == "time is up"
    assert train(recipe, out) == "done"
    found = lines(out)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert found[-1]["MFU"] > 0 and found[-1]["memory"] > 0
    assert (out / "export" / "adapter_model.safetensors").is_file()


def test_a_run_takes_no_more_memory_than_estimated(recipe, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(recipe, tmp_path / "run")
    foretold = Estimator(AriaConfig.from_pretrained(), torch.device("cuda")).memory(recipe)
    assert torch.cuda.max_memory_allocated() < foretold.total
