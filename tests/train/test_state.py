"""Checkpoints of runs: complete or absent, exactly what was saved, on other numbers of ranks, after kill -9."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aria.train.parallel import Parallel
from aria.train.state import CheckpointError, CheckpointSettings, RunState, trained_weights
from tests.helpers import elastic
from tests.helpers.saved_run import Run, state_of
from tests.helpers.torchrun import torchrun


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_resumes_bit_for_bit(tmp_path, kind):
    whole = Run(kind)
    state = state_of(tmp_path)
    for number in range(6):
        whole.step()
        if number == 2:
            # Saved in the background, while the run changes what is saved.
            state.save(whole)
    state.close()
    # What is frozen is not in a checkpoint: the base model has it.
    resumed = Run(kind)
    with torch.no_grad():
        for parameter in resumed.trained.values():
            parameter.zero_()
    state_of(tmp_path).load(resumed)
    assert resumed.position.step == resumed.stream.asked == 3
    for _ in range(3):
        resumed.step()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_only_whole_checkpoints_count_and_the_newest_stay(tmp_path):
    run, state = Run(), state_of(tmp_path, keep=2)
    assert state.latest() is None and RunState.latest_in(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        state.load(run)
    for _ in range(4):
        run.step()
        state.save(run, wait=True)
        state.save(run, wait=True)
    assert sorted(p.name for p in state.folder.iterdir()) == ["step-00000003", "step-00000004"]
    # What a crash left behind does not count, and goes away.
    (state.folder / "step-00000009.partial").mkdir()
    assert state.latest().name == "step-00000004"
    state_of(tmp_path)
    assert sorted(p.name for p in state.folder.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_failing_write_is_reported_and_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    run, state = Run(), state_of(tmp_path)
    run.step()
    state.save(run, wait=True)
    run.step()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    def cut_short(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframes")

    for fails, why in ((cut_short, r"a file was cut short; is the disk full\?$"), (full, "no space left")):
        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match=rf"could not be written: rank 0: {why}"):
            state.save(run, wait=True)
    assert state.failed and [path.name for path in state.folder.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert state.latest().name == "step-00000001"
    found = Run(seed=5)
    state_of(tmp_path).load(found)
    assert found.position.step == 1
    shutil.rmtree(tmp_path)
    state.save(run, wait=True)
    assert state.latest().name == "step-00000002"


@pytest.mark.parametrize("again", [True, False])
def test_a_failed_background_write_is_reported_and_repeated_after_the_next_step(tmp_path, monkeypatch, again):
    lines: list[str] = []
    run = Run()
    state = RunState(tmp_path, CheckpointSettings(every_minutes=None), Parallel.start(), report=lines.append)
    full = patch.object(Path, "rename", side_effect=OSError("no space left on device"))
    run.step()
    assert not state.due(1)
    with full:
        state.save(run)
        assert state._writing.exception() is not None
        run.step()
        assert state.due(2) and not lines and not state.failed
        if not again:
            with pytest.raises(CheckpointError, match="no space left"):
                state.save(run)
    if again:
        # What was the disk's passing trouble costs nothing.
        state.save(run)
        assert state.latest().name == "step-00000002" and not state.due(3)
    assert state.failed == (not again) and len(lines) == 1 and "no space left" in lines[0]
    state.close()


def test_a_write_that_fails_in_the_background_does_not_count_as_made(tmp_path):
    run, state = Run(), state_of(tmp_path)
    run.step()
    with patch.object(Path, "rename", side_effect=OSError("no space left on device")):
        state.save(run)
        state._writing.exception()
    # The same step once more, as at the end of a run.
    state.save(run, wait=True)
    assert state.latest().name == "step-00000001"
    run.step()
    with patch.object(Path, "rename", side_effect=OSError("no space left on device")):
        state.save(run)
        with pytest.raises(CheckpointError, match="no space left"):
            state.close()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    run, state = Run(), state_of(tmp_path)
    run.step()
    state.save(run, wait=True)
    with pytest.raises(ValueError, match="it is another training's"):
        state.load(Run("muon"))
    other = Run()
    with torch.no_grad():
        other.model[1].weight.data = torch.zeros(4, 18).bfloat16()
    with pytest.raises(ValueError, match=r"has weights.1.weight of \(4, 16\), not .*another training's"):
        state.load(other)


@pytest.mark.parametrize("name", ["__0_0.distcp", "run.json", "rank-0.pt", ".metadata"])
@pytest.mark.parametrize("how", ["half", "gone"])
def test_a_damaged_checkpoint_is_named_with_what_helps(tmp_path, name, how):
    run, state = Run(), state_of(tmp_path)
    for _ in range(2):
        run.step()
        state.save(run, wait=True)
    file = state.latest() / name
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    if how == "half":
        file.write_bytes(half)
    with pytest.raises(ValueError, match=r"step-00000002 cannot be read: .+\. If it is damaged, delete that folder"):
        state_of(tmp_path).load(Run(seed=5))
    shutil.rmtree(state.latest())
    found = Run(seed=5)
    state_of(tmp_path).load(found)
    assert found.position.step == 1


def test_what_may_be_wanted_is_not_pruned(tmp_path):
    run, state = Run(), state_of(tmp_path, keep=1)
    for prune in (True, False, False, True):
        run.step()
        state.save(run, wait=True, prune=prune)
        there = sorted(int(folder.name[5:]) for folder in state.folder.iterdir())
        assert there == ([run.position.step] if prune else list(range(1, run.position.step + 1)))


def test_due_by_steps_and_by_the_clock(tmp_path, monkeypatch):
    state = state_of(tmp_path, every_steps=3, every_minutes=5.0)
    assert [state.due(step) for step in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    state._saved_at -= 301
    assert state.due(4)
    assert not state_of(tmp_path, every_minutes=None).due(7)


def test_weights_of_a_checkpoint_are_read_without_the_run(tmp_path):
    run, state = Run(), state_of(tmp_path)
    run.step()
    state.save(run, wait=True)
    for folder in (tmp_path, state.latest()):
        found = trained_weights(folder)
        assert found.keys() == run.trained.keys()
        assert all(torch.equal(found[name], p) for name, p in run.trained.items())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs of two ranks in folders: one undisturbed, one whose second rank is killed, one resumed with one rank."""
    folder = tmp_path_factory.mktemp("elastic")
    script = "-m", "tests.helpers.elastic"
    undisturbed = torchrun(*script, folder / "whole", 8)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    disturbed = torchrun(*script, folder / "killed", 8, restarts=1, ARIA_TEST_KILL_AT="5")
    assert disturbed.returncode == 0, disturbed.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_nothing_is_lost(killed):
    whole, again = (torch.load(killed / name / "end.pt") for name in ("whole", "killed"))
    assert again["began"] == 4 and whole["began"] == 0
    assert whole["weights"].keys() == again["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, again["weights"][name]), name
    assert (killed / "killed" / "died").is_file()


def test_another_number_of_ranks_resumes(killed):
    # One process, from the checkpoint of two at step 6, to where two came.
    step = Path("checkpoints", "step-00000006")
    shutil.copytree(killed / "whole" / step, killed / "alone" / step)
    elastic.main(str(killed / "alone"), "8")
    whole, alone = (torch.load(killed / name / "end.pt") for name in ("whole", "alone"))
    assert alone["began"] == 6
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(alone["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_8_bit_moments_resume_on_another_number_of_ranks(tmp_path):
    script, kind = ("-m", "tests.helpers.elastic"), "adamw8bit"
    two = torchrun(*script, tmp_path / "two", 8, kind)
    assert two.returncode == 0, two.stderr[-3000:]
    step = Path("checkpoints", "step-00000006")
    shutil.copytree(tmp_path / "two" / step, tmp_path / "one" / step)
    elastic.main(str(tmp_path / "one"), "8", kind)
    shutil.copytree(
        tmp_path / "one" / "checkpoints" / "step-00000008", tmp_path / "again" / "checkpoints" / "step-00000008"
    )
    again = torchrun(*script, tmp_path / "again", 10, kind)
    assert again.returncode == 0, again.stderr[-3000:]
    ended, alone = (torch.load(tmp_path / name / "end.pt") for name in ("two", "one"))
    assert alone["began"] == 6
    saved = dcp.FileSystemReader(tmp_path / "two" / step).read_metadata().state_dict_metadata
    assert any(name.endswith("exp_avg.codes") for name in saved)
    for name, weight in ended["weights"].items():
        # Gradients of two ranks add up in another order. Where that rounds a moment to the next of its codes, one
        # element in ten thousand differs by more than the sum's rounding; moments in wrong places differ everywhere.
        different = (alone["weights"][name] - weight).abs()
        assert (different > 1e-5).sum() <= weight.numel() // 10_000, name
        assert different.max() < 1e-4, name
    assert torch.load(tmp_path / "again" / "end.pt")["began"] == 8


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(tmp_path):
    ended = torchrun("-m", "tests.helpers.elastic", tmp_path / "run", 8, ARIA_TEST_RAISE_AT="3")
    assert ended.returncode != 0
    assert "the second rank has had enough" in ended.stderr
