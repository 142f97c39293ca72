"""Nano's training on a GPU: steps replayed as CUDA graphs equal plain steps."""

import copy
from dataclasses import replace
from random import Random

import pytest
import torch

from aria.model import Aria
from recipes.nano.train.cuda_graphs import Replayed
from recipes.nano.train.learner import Learner, Stages
from recipes.nano.train.model import tiny_config

pytestmark = pytest.mark.gpu

CLASSES = 21


def batch_of(seed: int, pictures: int = 6, words: int = 96) -> dict:
    """Make a batch of 224 px images in one conversation each, with random labels."""
    torch.manual_seed(seed)
    rng = Random(seed)
    length, queries = 64 + words, 64
    ids = torch.randint(20, 90, (pictures, length))
    ids[:, 8 : 8 + queries] = 9
    labels = torch.where(torch.arange(length) >= length - 30, ids, -100).flatten()
    sides = torch.tensor([[rng.randrange(60, 225), 224] for _ in range(pictures)])
    pixel = torch.arange(224)
    mask = (pixel[:, None] < sides[:, 0, None, None]) & (pixel < sides[:, 1, None, None])
    patches = torch.randint(0, CLASSES, (pictures, 256))
    batch = {
        "input_ids": ids.flatten(),
        "labels": labels,
        "weights": torch.rand(labels.shape) + 0.1,
        "positions": torch.arange(length).repeat(pictures),
        "cu_seqlens": torch.arange(pictures + 1, dtype=torch.int32) * length,
        "pixel_values": torch.rand(pictures, 3, 224, 224) * 2 - 1,
        "pixel_mask": mask,
        "patch_labels": patches,
        "query_labels": torch.randint(0, CLASSES, (pictures, queries, 4)),
    }
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    return batch | {"kind": "small", "size": 224, "max_seqlen": length, "num_tokens": length * pictures - seed}


def text_of(batch: dict) -> dict:
    ids = torch.where(batch["input_ids"] == 9, 30, batch["input_ids"])
    return batch | {"kind": "text", "size": 0, "input_ids": ids}


def on_cpu(batch: dict) -> dict:
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float().cpu() - exact).norm() / exact.norm().clamp(min=1e-9)).item()


def test_replayed_steps_have_the_losses_and_gradients_of_plain_steps():
    # All patches are used, so nothing is drawn at random.
    stages = Stages(queries=0.2, answers=0.5, settled=0.9, kept=1.0)
    learner = Learner(Aria(tiny_config(96)), CLASSES, stages, seed=3).cuda().bfloat16()
    wide = copy.deepcopy(learner).cpu().float()  # no CUDA kernel supports float32 with lengths known only on the device
    replayed = Replayed(learner)
    replayed(batch_of(0), 1.0)
    for progress in (0.1, 0.3, 0.6, 0.95):
        for seed in (1, 2):
            for batch in (batch_of(seed), text_of(batch_of(seed))):
                total, metrics = replayed(batch, progress)
                total, found = total.item(), {name: value.item() for name, value in metrics.items()}
                ours = gradients(learner)
                plain_results = {}
                for model, given in ((learner, batch), (wide, on_cpu(batch))):
                    model.zero_grad()
                    wanted, wanted_metrics = model.loss(given, progress)
                    wanted.backward()
                    plain_results[model] = wanted.item(), {name: value.item() for name, value in wanted_metrics.items()}
                    del wanted, wanted_metrics
                theirs, exact = gradients(learner), gradients(wide)
                learner.zero_grad()
                assert total == pytest.approx(plain_results[learner][0], rel=1e-3)
                for name, value in plain_results[learner][1].items():
                    # One letter of 180 may differ.
                    assert found[name] == pytest.approx(value, rel=5e-3, abs=1e-2 if "accuracy" in name else 1e-4)
                assert ours.keys() == theirs.keys()
                for name, gradient in exact.items():
                    if name.endswith("k_proj.bias"):
                        continue  # softmax is invariant to it: its gradient is rounding error
                    # Sums over queries and experts have no fixed order, and some nearly cancel.
                    error, plain = relative_error(ours[name], gradient), relative_error(theirs[name], gradient)
                    assert error < 1.5 * plain + 1e-2, f"{name} at {progress}: error {error:.1e}, plain {plain:.1e}"


def test_graphs_are_released_with_their_phase():
    learner = Learner(Aria(tiny_config(96)), CLASSES, replace(Stages(), kept=0.5), seed=3).cuda().bfloat16()
    replayed = Replayed(learner)
    for progress in (0.0, 0.05, 0.2, 0.9):
        replayed(batch_of(1), progress)
        assert list(replayed._graphs) == ["small"]
    replayed(text_of(batch_of(1)), 0.9)
    assert list(replayed._graphs) == ["small", "text"]
