"""Held-out data in a training: what they cannot break, and what is logged about them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aria.train.data import DataStream
from aria.train.evaluate import held_out_stream
from aria.train.parallel import Parallel
from aria.train.recipe import Recipe
from aria.train.rng import random_states, restore_random_states
from aria.train.run import train
from tests.helpers import made_data
from tests.helpers.made_data import chat, jsonl, said

LONG = chat("3" * 900, "dog")
UNSEEN = {"messages": [said("user", [{"type": "image", "path": "none.png"}]), said("assistant", "dog")]}


@pytest.fixture
def run(tmp_path, model_folder):
    """Trains a tiny model for four steps and gives the lines of its log and of its samples."""
    data = jsonl(tmp_path / "train.jsonl", [chat(f"{i}?", "dog") for i in range(8)])

    def run(sampler=None, **settings):
        table = {
            "model": {"path": str(model_folder)},
            "data": {"paths": [str(data)], "workers": 0},
            "batch": {"tokens": 192},
            "budget": {"steps": 4},
            "log": {"every": 1},
            "checkpoint": {"keep": 9},
        }
        train(Recipe.from_table({**table, **settings}), tmp_path / "run", sampler=sampler)
        files = [tmp_path / "run" / name for name in ("log.jsonl", "samples.jsonl")]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files if file.is_file()]

    return run


def held(tmp_path: Path, rows, **settings):
    return {"data": [str(jsonl(tmp_path / "held.jsonl", rows))], "every": 2, **settings}


def repeat(model, processor, conversations, max_tokens):
    for messages in conversations:
        processor.prepare(messages)
    return ["yes"] * len(conversations)


def test_a_training_is_saved_before_an_evaluation_that_may_fail(run, tmp_path):
    def fails(*_):
        raise OSError("no room")

    evaluate = held(tmp_path, [chat("a", "b")], samples=1)
    with pytest.raises(OSError, match="no room"):
        run(fails, evaluate=evaluate)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    log, samples = run(repeat, evaluate=evaluate)
    # What failed is made up for.
    assert [line["step"] for line in log if "held-out loss" in line] == [2, 4]
    assert [line["step"] for line in samples] == [2, 4]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]


def test_training_data_that_are_rewritten_end_the_run_with_its_last_step_saved(run, tmp_path):
    file = tmp_path / "train.jsonl"
    before = file.read_bytes()

    def rewrites(*_):
        file.write_bytes(before[:30])
        return ["yes"]

    evaluate = held(tmp_path, [chat("a", "b")], samples=1)
    settings = {"budget": {"steps": 200}, "data": {"paths": [str(file)], "workers": 0, "lookahead": 1}}
    with pytest.raises(ValueError, match=r"train\.jsonl:\d: the file was changed .* 30, so this line is missing"):
        run(rewrites, evaluate=evaluate, **settings)
    last = max(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert last == f"step-{lines[-1]['step']:08d}"
    file.write_bytes(before)
    log, _ = run(repeat, evaluate=evaluate, **{**settings, "budget": {"steps": lines[-1]["step"] + 2}})
    assert [line["step"] for line in log if "loss" in line] == list(range(1, lines[-1]["step"] + 3))


def test_held_out_data_that_fail_at_the_end_leave_the_export(run, tmp_path):
    def fails(*_):
        raise OSError("no room")

    with pytest.raises(RuntimeError, match=r"no room\. The weights of step 4 are exported to"):
        run(fails, evaluate=held(tmp_path, [chat("a", "b")], samples=1) | {"every": None})
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["paths", "mixer"])
def test_a_run_resumes_where_its_data_were_moved(run, tmp_path, how):
    def data(file):
        return {"workers": 0, "paths": [str(file)]} if how == "paths" else {"workers": 0, "mixer": {str(file): 2.0}}

    old, new = tmp_path / "train.jsonl", tmp_path / "elsewhere" / "train.jsonl"
    run(data=data(old))
    new.parent.mkdir()
    old.rename(new)
    (log,) = run(data=data(new), budget={"steps": 5})
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert str(new) in (tmp_path / "run" / "recipe.toml").read_text()
    jsonl(new, [chat("another?", "dog")] * 8)
    with pytest.raises(ValueError, match="the data have changed since the state was saved"):
        run(data=data(new), budget={"steps": 6})
    if how == "mixer":
        with pytest.raises(ValueError, match="another recipe"):
            run(data={"workers": 0, "mixer": {str(new): 1.0}}, budget={"steps": 6})


def test_a_deleted_folder_does_not_end_a_training(run, tmp_path):
    def deletes(*_):
        if (tmp_path / "run" / "log.jsonl").is_file():
            shutil.rmtree(tmp_path / "run")
        return ["yes"]

    run(deletes, evaluate=held(tmp_path, [chat("a", "b")], samples=1))
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()


def test_evaluations_leave_every_random_state_and_checkpoint_as_they_were(run, tmp_path):
    def draws(model, processor, conversations, max_tokens):
        # As sampling does, and code of one's own may.
        for draw in (random.random, np.random.rand, torch.rand):
            draw(3) if draw is not random.random else draw()
        return ["yes"] * len(conversations)

    dropped = {"targets": {"dropout": 0.5}, "optimizer": {"learning_rate": 0.01}}
    ends = []
    for evaluate in ({}, {"evaluate": held(tmp_path, [chat("a", "b")], samples=1)}):
        random.seed(1), np.random.seed(1)
        run(draws, **dropped, **evaluate)
        ends.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
        assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
        ends[-1] += ((tmp_path / "run" / "export" / "adapter_model.safetensors").read_bytes(),)
        shutil.rmtree(tmp_path / "run")
    assert ends[0] == ends[1]


def test_a_checkpoint_of_an_earlier_version_resumes(run, tmp_path):
    run(budget={"steps": 2})
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-0.pt"
    own = torch.load(file, weights_only=False)
    torch.save(own | {"random": own["random"]["cpu"], "cuda": own["random"]["cuda"]}, file)
    log, *_ = run(budget={"steps": 3})
    assert [line["step"] for line in log] == [1, 2, 3]


def test_random_states_of_a_run_come_back():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    states = random_states()
    before = drawn()
    assert drawn() != before
    restore_random_states(states)
    assert drawn() == before


def test_rows_that_the_loss_skips_are_not_samples(run, tmp_path):
    made_data.picture(tmp_path, "a.png")
    shown = {"messages": [said("user", [{"type": "image", "path": "a.png"}]), said("assistant", "fox")]}
    log, samples = run(repeat, evaluate=held(tmp_path, [UNSEEN, LONG, "no row", shown, chat("a", "b")], samples=2))
    assert [(line["step"], line["truth"]) for line in samples] == [(2, "fox"), (2, "b"), (4, "fox"), (4, "b")]
    logged = next(line for line in log if "held-out loss" in line)
    assert logged["sample rows skipped"] == logged["held-out rows skipped"] == 3
    assert logged["sample problems"] == sorted(logged["held-out problems"])
    assert [problem.split("held.jsonl:")[1][0] for problem in logged["sample problems"]] == ["1", "2", "3"]


def many(tmp_path: Path) -> Path:
    """24 rows, of which no two fit into a batch of 192 tokens; the first 18 have other answers."""
    rows = [chat(f"#{i:02d} " + "3" * 90, "dog" if i < 18 else "fox") for i in range(24)]
    return jsonl(tmp_path / "held.jsonl", rows)


def test_all_rows_are_evaluated_or_the_given_number(run, tmp_path, capsys):
    evaluate = {"data": [str(many(tmp_path))]}
    log, *_ = run(evaluate=evaluate)
    assert [line["held-out rows"] for line in log if "held-out loss" in line] == ["24 of 24 rows"]
    log, *_ = run(evaluate={**evaluate, "batches": 5}, budget={"steps": 5})
    logged = log[-1]
    assert logged["held-out rows"] == "7 of 24 rows", "of some 130 tokens each"
    assert f"step 5: held-out {logged['held-out loss']:.4f} (7 of 24 rows)" in capsys.readouterr().err


def test_a_sample_of_rows_is_drawn_by_the_seed_and_the_same_on_any_number_of_ranks(tmp_path):
    def asked(seed: int, world: int) -> set[int]:
        evaluate = {"data": [str(many(tmp_path))], "batches": 6}
        recipe = Recipe.from_table({"data": {"paths": ["x"]}, "batch": {"tokens": 192}, "evaluate": evaluate,
                                    "seed": seed})  # fmt: skip
        found: list[int] = []
        for rank in range(world):
            ranks = SimpleNamespace(data_rank=rank, data_world=world)
            stream = held_out_stream(recipe, made_data.processor(), made_data.config(), ranks)
            rows = stream.rows_that_fill(recipe.evaluate.batches)
            for batch in [*stream.once(rows), *stream.once(rows)]:
                found += map(int, re.findall(r"#(\d\d)", made_data.processor().decode(batch.input_ids)))
            assert stream.report.rows == len(range(rank, rows, world)), "of the last pass"
        assert len(found) == 2 * len(set(found))
        return set(found)

    one = asked(1, 1)
    assert 6 <= len(one) < 12 and max(one) >= 18
    assert asked(1, 2) == asked(1, 3) == one != asked(2, 1)


def test_a_sample_that_another_rank_cannot_draw_is_an_error_here_too(run, tmp_path, monkeypatch):
    drawn, agreed = [], Parallel.max

    def draws(self, batches):
        drawn.append(batches)
        return 1

    # The ranks' next exchange says that one of them failed.
    monkeypatch.setattr(DataStream, "rows_that_fill", draws)
    monkeypatch.setattr(Parallel, "max", lambda self, value: 1 if drawn and drawn.pop() else agreed(self, value))
    with pytest.raises(RuntimeError, match="held-out data of another process failed"):
        run(evaluate=held(tmp_path, [chat("a", "b")] * 3, batches=1))


def test_held_out_data_that_are_rewritten_end_the_run(run, tmp_path):
    def cuts(*_):
        os.truncate(tmp_path / "held.jsonl", 30)
        return ["yes"]

    with pytest.raises(ValueError, match=r"held\.jsonl:\d: the file was changed .* and now has 30"):
        run(cuts, evaluate=held(tmp_path, [chat("a", "b")] * 3, samples=1))
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_a_row_trimmed_for_the_loss_is_not_a_sample(run, tmp_path, model_folder):
    cut = {"messages": [*LONG["messages"], *chat("a", "b")["messages"]]}
    data = {"paths": [str(tmp_path / "train.jsonl")], "workers": 0, "too_long": "drop_first"}
    _, samples = run(repeat, data=data, evaluate=held(tmp_path, [cut, chat("c", "d")], samples=1))
    assert {line["truth"] for line in samples} == {"d"}


def test_a_sample_that_cannot_be_answered_is_reported_and_training_continues(run, tmp_path):
    def picky(model, processor, conversations, max_tokens):
        [messages] = conversations
        if "hard" in str(messages):
            raise ValueError("pictures of several sizes")
        return ["yes"]

    log, samples = run(picky, evaluate=held(tmp_path, [chat("hard?", "dog"), chat("c?", "cat")], samples=2))
    assert [(line["step"], line["truth"]) for line in samples] == [(2, "cat"), (4, "cat")]
    logged = next(line for line in log if "held-out loss" in line)
    assert logged["sample rows skipped"] == 1
    assert logged["sample problems"] == ["sample 1, whose answer is 'dog': pictures of several sizes"]


def test_text_without_conversations_is_evaluated_and_gives_no_samples(run, tmp_path):
    log, samples = run(repeat, evaluate=held(tmp_path, [{"text": "all of it is trained on"}], samples=2))
    logged = next(line for line in log if "held-out loss" in line)
    assert not samples and "no conversation" in logged["sample problems"][0]


def test_held_out_data_that_cannot_be_used_are_refused_before_the_training(run, tmp_path):
    with pytest.raises(ValueError, match=r"no targets that fit into a batch \(.*held\.jsonl:1: "):
        run(evaluate=held(tmp_path, ["no row", LONG]))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_objective_without_a_loss_is_an_error_that_says_what_is_missing(run, tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text(
        "from aria.train.objective import Losses, Objective\n"
        "def make(module, recipe, ranks):\n"
        "    inner = Objective(module, ranks=ranks)\n"
        "    def losses(batch, step):\n"
        "        found = inner(batch, step)\n"
        "        return Losses(found.total, {'mine': found.metrics['loss']})\n"
        "    return losses\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs loss and accuracy .* no loss and no accuracy, only mine"):
        run(objective={"factory": "own_objective:make"}, evaluate=held(tmp_path, [chat("a", "b")]))
