"""The training benchmark: its batch, and runs on a small model end to end."""

from __future__ import annotations

import json

import pytest
import torch

from aria.train.loss import IGNORE_INDEX
from bench.shapes import small_config
from bench.training import train

SMALL = ("--model", "small", "--device", "cpu", "--tokens", "48", "--length", "24", "--repeats", "2")


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_text_token_is_a_target_once_and_targets_stay_in_their_sequence():
    config = small_config()
    side = max(config.image_sizes())
    queries = config.image_sizes()[side]
    batch = train.make_batch(config, 3, 20, side, torch.device("cpu"))
    assert batch.lengths == (20, 20, 20)
    assert int((batch.targets != IGNORE_INDEX).sum()) == batch.labels == 3 * (20 - queries)
    for ids, targets in zip(batch.input_ids.view(3, 20), batch.targets.view(3, 20), strict=True):
        assert (ids[:queries] == config.image_token_index).all()
        assert torch.equal(targets[queries - 1 : -1], ids[queries:])
        assert targets[-1] == IGNORE_INDEX
    # transformers shifts labels itself; the targets are the same.
    labels = train.peer_inputs(config, batch, torch.float32)["labels"]
    shifted = torch.cat((labels[:, 1:], torch.full((3, 1), IGNORE_INDEX)), dim=1)
    assert torch.equal(shifted.flatten(), batch.targets)


@pytest.mark.slow
def test_adapters(capsys):
    pytest.importorskip("peft")
    train.main([*SMALL, "--peer", "transformers"])
    found = last_line(capsys)
    ours, peer = found["runs"]["aria, dropout 0"], found["peer"]
    assert ours["parameters"] == peer["parameters"], "both should train the same parameters"
    assert peer["how"] == str(train.WAYS[0])
    assert found["ratio"] == pytest.approx(ours["tokens_per_s"] / peer["tokens_per_s"], rel=1e-4)
    for run in (*found["runs"].values(), peer):
        # With the same work and ceiling, MFU is proportional to throughput.
        assert run["mfu"] / run["tokens_per_s"] == pytest.approx(ours["mfu"] / ours["tokens_per_s"], rel=1e-4)
        assert run["mfu_with_images"] > run["mfu"]
        assert set(run["ms"]) == {"images", "forward", "backward", "optimizer"}


def test_peer_gradients_agree_in_all_ways(monkeypatch):
    """All sequences at once, one at a time, and with checkpointing: the measured work is the same."""
    pytest.importorskip("peft")
    config = small_config()
    batch = train.make_batch(config, 2, 24, max(config.image_sizes()), torch.device("cpu"))
    norms = []

    class Noted(torch.optim.AdamW):
        def step(self, *_, **__):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(sum(float(g.square().sum()) for g in gradients))

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    for way in train.WAYS[:3]:
        train._train_peer(config, batch, False, torch.device("cpu"), 1, way)
    assert len(norms) == 9
    assert norms == pytest.approx([norms[0]] * 9, rel=1e-3)


def test_full_weights_overfit_the_batch(capsys):
    train.main([*SMALL, "--method", "full"])
    (run,) = last_line(capsys)["runs"].values()
    assert run["parameters"] > 100_000
    assert run["loss"][-1] < run["loss"][0]
