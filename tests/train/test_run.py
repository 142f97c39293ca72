"""``aria train`` from a recipe to an export: runs that end, are killed, stopped, refused and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file, save_file

from aria import AriaConfig, AriaForConditionalGeneration, AriaProcessor
from aria.checkpoint.adapter import read_adapter
from aria.cli.train import answer
from aria.train import Recipe, train
from aria.train.assemble import make_objective
from aria.train.export import export_checkpoint
from tests.helpers.signals import start, start_interrupted

ROOT = Path(__file__).parents[2]
ANIMALS = ("a cat", "a dog", "a cow", "an owl", "a hen", "a fox")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the authors' format: questions about pictures of one colour, and one without a picture."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i, animal in enumerate(ANIMALS):
        Image.new("RGB", (60 + i, 40), (40 * i, 200 - 30 * i, 90)).save(folder / f"{i}.png")
        asked = [{"type": "image", "text": None}, {"type": "text", "text": "what is this?"}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": animal}]},
        ]
        rows.append({"messages": messages, "images": [f"{i}.png"]})
    plain = [{"role": "user", "content": "say hello"}, {"role": "assistant", "content": "hello"}]
    rows.append({"messages": plain})
    for name, part in (("train", rows), ("test", rows[-3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(tmp_path, data, model_folder):
    """A recipe of a tiny model; sections are given as text."""

    def write(text: str = "", name: str = "tiny", **top) -> Path:
        file = tmp_path / f"{name}.toml"
        settings = {"log.every": 1, "batch.tokens": 192, "data.workers": 0} | top
        head = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        file.write_text(
            f'model.path = "{model_folder.as_posix()}"\ndata.paths = ["{data.as_posix()}"]\n{head}{text}',
            encoding="utf-8",
        )
        return file

    return write


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_adapter_is_trained_logged_and_exported(command, recipe, tmp_path, model_folder, data, capsys):
    out = tmp_path / "run"
    file = recipe(**{"budget.steps": 8, "optimizer.learning_rate": 0.01, "schedule.kind": "constant"})
    evaluate = [
        f'evaluate.data=["{data.as_posix()}"]',
        "evaluate.every=4",
        "evaluate.samples=2",
        "evaluate.max_tokens=4",
    ]
    sets = [part for setting in evaluate for part in ("--set", setting)]
    assert command("train", file, "--out", out, *sets) == 0
    output = capsys.readouterr().err
    assert "What trains" in output and "done: 8 steps" in output
    table = [row.split("\t") for row in (out / "loss.tsv").read_text(encoding="utf-8").splitlines()]
    assert table[0][:3] == ["step", "loss", "held-out loss"] and [row[0] for row in table[1:]] == [*"12345678"]
    assert [bool(row[2]) for row in table[1:]] == [False, False, False, True] * 2 and (out / "loss.png").is_file()
    found = lines(out)
    steps = [line for line in found if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert {"router z 0", "router balance 2", "load entropy 1", "dead experts", "gradient norm"} <= steps[0].keys()
    held_out = [line for line in found if "held-out loss" in line]
    assert [line["step"] for line in held_out] == [4, 8] and held_out[0]["held-out targets"] > 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["truth"]) for line in samples] == [
        (4, ANIMALS[-2]), (4, ANIMALS[-1]), (8, ANIMALS[-2]), (8, ANIMALS[-1])
    ]  # fmt: skip
    stored = read_adapter(out / "export", AriaConfig.from_pretrained(model_folder))
    assert any(adapter.b.any() for adapter in stored.weights.values())
    assert Recipe.read(out / "recipe.toml").evaluate.samples == 2


@pytest.mark.parametrize("folder", ["run", "lr=1e-4"])
def test_the_command_printed_at_the_end_works(command, recipe, tmp_path, model_folder, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    assert command("train", recipe(**{"budget.steps": 1}), "--out", folder) == 0
    output = " ".join(capsys.readouterr().err.split()).split("to talk to it: aria ")[1].split()
    assert output == ["chat", "-m", model_folder.as_posix(), "--adapter", str(Path(folder, "export"))]
    assert command(*output, "--max-tokens", 2, "hello") == 0


@pytest.mark.slow
def test_held_out_rows_are_each_evaluated_once_and_bad_ones_reported(command, recipe, tmp_path, data, capsys):
    good = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    counts, held = [], tmp_path / "held"
    shutil.copytree(data, held)
    for name, rows in (("three", good[:3]), ("one", good[:1]), ("two and a bad one", [*good[1:3], "no row\n"])):
        (held / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        evaluated = {"evaluate.data": [(held / f"{name}.jsonl").as_posix()], "budget.steps": 1}
        assert command("train", recipe(**evaluated), "--out", tmp_path / f"run {name}") == 0
        counts.append(next(line for line in lines(tmp_path / f"run {name}") if "held-out loss" in line))
    three, one, two = counts
    assert three["held-out targets"] == one["held-out targets"] + two["held-out targets"]
    assert "held-out rows skipped" not in three and two["held-out rows skipped"] == 1
    assert two["held-out problems"][0].startswith((held / "two and a bad one.jsonl:3").as_posix())


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_again(command, recipe, tmp_path, data, capsys):
    out = tmp_path / "run"
    file = recipe(**{"budget.steps": 2, "evaluate.data": [data.as_posix()], "evaluate.samples": 1})
    assert command("train", file, "--out", out) == 0
    before = [(out / name).read_text(encoding="utf-8") for name in ("log.jsonl", "samples.jsonl")]
    capsys.readouterr()
    assert command("train", file, "--out", out) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "this training is finished, at step 2; raise [budget]" in output and "resuming" not in output
    assert " of training" not in output.split("done:")[1], "no step was made"
    assert before == [(out / name).read_text(encoding="utf-8") for name in ("log.jsonl", "samples.jsonl")]


def test_a_folder_where_something_is_training_is_left_alone(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    file = recipe(**{"budget.steps": 2})
    assert command("train", file, "--out", out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with FileLock(out / ".lock"):
        assert command("train", file, "--out", out, "--set", "budget.steps=4") == 2
    assert "is being trained in by another process" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")} | {out / ".lock": before[out / ".lock"]}


@pytest.mark.slow
def test_a_stored_adapter_is_trained_on(command, recipe, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    file = recipe(**{"budget.steps": 6, "optimizer.learning_rate": 0.01, "schedule.kind": "constant"})
    assert command("train", file, "--out", first) == 0
    more = ["--set", f"model.adapter={first.as_posix()}/export"]
    # Another alpha is another scaling: what is stored is what the adapter does, not its numbers.
    assert (
        command("train", file, "--out", second, *more, "--set", "targets.alpha=16", "--set", "data.shuffle=false") == 0
    )
    assert lines(second)[0]["loss"] < lines(first)[0]["loss"] - 0.1
    assert command("train", file, "--out", tmp_path / "third", *more, "--set", "targets.rank=4") == 2
    assert "[targets] rank makes it" in " ".join(capsys.readouterr().err.split())
    assert command("train", file, "--out", tmp_path / "third", *more, "--set", 'targets.modules=["q_proj"]') == 2
    assert "adapts other modules" in " ".join(capsys.readouterr().err.split())


def test_weights_are_trained_and_exported_with_their_processor(command, recipe, tmp_path, model_folder, capsys):
    out = tmp_path / "run"
    text = "[targets]\nmethod = 'full'\nfreeze_projector = false\n"
    top = {"budget.steps": 3, "model.rope_theta": 9e6, "batch.accumulate": 2, "schedule.average": 0.5}
    assert command("train", recipe(text, **top), "--out", out) == 0
    assert AriaConfig.from_pretrained(out / "export").text.rope_theta == 9e6
    trained = AriaForConditionalGeneration.from_pretrained(out / "export").state_dict()
    before = AriaForConditionalGeneration.from_pretrained(model_folder).state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) and any("experts.fc1" in name for name in changed)
    (out / "export" / "model.safetensors").unlink()
    capsys.readouterr()
    assert command("train", out / "recipe.toml", "--out", out, "--export") == 0
    again = AriaForConditionalGeneration.from_pretrained(out / "export").state_dict()
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert command("chat", "-m", out / "export", "--max-tokens", 2, "hello") == 0


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_revision_that_it_was_trained_beside(
    command, recipe, tmp_path, model_folder, monkeypatch
):
    newer = tmp_path / "newer"
    shutil.copytree(model_folder, newer)
    weights = load_file(newer / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, newer / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(
        "aria.hub.snapshot_download", lambda name, *, revision, **_: {"v1": model_folder, None: newer}[revision]
    )
    file, out = recipe(**{"budget.steps": 1}), tmp_path / "run"
    file.write_text(file.read_text(encoding="utf-8").replace(model_folder.as_posix(), "org/base"), encoding="utf-8")
    assert command("train", file, "--out", out, "--set", "model.revision=v1") == 0
    norm = next(name for name in weights if name.endswith("model.norm.weight"))
    for options, scale in (((), 1), (("--model", "org/base"), 2), (("--model", newer), 2), (("--revision", "v1"), 1)):
        assert command("merge", out / "export", tmp_path / "merged", *options) == 0
        assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[norm], scale * weights[norm])


@pytest.mark.slow
def test_weights_take_the_place_of_an_adapter_trained_there_before(command, recipe, tmp_path):
    """transformers would add it to them."""
    out = tmp_path / "run"
    assert command("train", recipe(**{"budget.steps": 1}), "--out", out) == 0
    shutil.rmtree(out / "checkpoints")
    assert command("train", recipe("[targets]\nmethod = 'full'\n", **{"budget.steps": 1}), "--out", out) == 0
    assert (out / "export" / "model.safetensors").is_file() and not list((out / "export").glob("adapter_*"))


@pytest.mark.slow
def test_adapters_are_not_exported_beside_weights_trained_there_before(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert command("train", recipe("[targets]\nmethod = 'full'\n", **{"budget.steps": 1}), "--out", out) == 0
    shutil.rmtree(out / "checkpoints")
    before = (out / "recipe.toml").read_text(encoding="utf-8")
    assert command("train", recipe(**{"budget.steps": 1}), "--out", out) == 2
    assert "holds the weights of an earlier training" in " ".join(capsys.readouterr().err.split())
    assert (out / "export" / "model.safetensors").is_file() and not list((out / "export").glob("adapter_*"))
    assert (out / "recipe.toml").read_text(encoding="utf-8") == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_a_run_that_is_killed_and_stopped_ends_with_the_weights_of_one_that_was_not(recipe, tmp_path):
    top = {
        "budget.steps": 50,
        "checkpoint.every_steps": 6,
        "optimizer.learning_rate": 1e-3,
        "schedule.average": 0.9,
        "targets.dropout": 0.2,
        "objective.picture_bytes": 1 << 20,
    }
    file, whole, broken = recipe(**top), tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start("train", file, "--out", whole)
    # Step 12's checkpoint is begun only when step 6's is complete.
    logged = "aria.train.progress:JsonLines.write"
    process = start_interrupted(logged, 13, signal.SIGKILL, "train", file, "--out", broken)
    _, output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    process = start_interrupted(logged, 3, signal.SIGTERM, "train", file, "--out", broken)
    _, output = process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"resuming from step" in output and b"terminated" in output
    saved = max(int(folder.name[5:]) for folder in (broken / "checkpoints").iterdir())
    assert f"saved at step {saved} in {broken}; rerun to resume".encode() in output
    assert export_checkpoint(broken) == broken / "export"
    half = load_file(broken / "export" / "adapter_model.safetensors")
    process = start("train", file, "--out", broken)
    _, output = process.communicate()
    assert process.returncode == 0, output.decode()
    assert uninterrupted.wait() == 0
    one, other = (load_file(out / "export" / "adapter_model.safetensors") for out in (whole, broken))
    assert one.keys() == other.keys() and any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert half.keys() == one.keys() and not all(torch.equal(half[name], one[name]) for name in one)
    timeless = [
        [(line["step"], line["loss"], line["gradient norm"], line["learning rate"]) for line in lines(out)]
        for out in (whole, broken)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 50


@pytest.mark.slow
def test_a_folder_of_another_recipe_is_refused(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    file = recipe(**{"budget.steps": 2})
    assert command("train", file, "--out", out, "--resume") == 2
    assert "holds no checkpoint to resume from" in capsys.readouterr().err
    assert command("train", file, "--out", out) == 0
    assert command("train", file, "--out", out, "--set", "optimizer.weight_decay=0.5") == 2
    assert "holds checkpoints of another recipe (optimizer.weight_decay" in " ".join(capsys.readouterr().err.split())
    # More of the same is not another recipe, nor is what a gradient that is not finite asks for, nor memory.
    sets = ("budget.steps=4", "optimizer.learning_rate=1e-6", "schedule.max_skipped=1", "objective.picture_bytes=9999")
    assert command("train", file, "--out", out, "--resume", *(x for one in sets for x in ("--set", one))) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "warning: the learning rate continues at 5e-07, where the run before would have had 0 (" in output
    assert "budget.steps: 2 -> 4" in output and "optimizer.learning_rate: 5e-05 -> 1e-06" in output
    assert "warning: a step" not in output
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert lines(out)[-1]["learning rate"] <= 1e-6 < lines(out)[0]["learning rate"]


@pytest.mark.filterwarnings("ignore:data.labels:DeprecationWarning")
def test_a_run_of_an_earlier_version_is_resumed(command, recipe, tmp_path, capsys):
    """Its recipe, in its folder and in its checkpoints, has former names."""
    out, file = tmp_path / "run", recipe(**{"budget.steps": 2})
    assert command("train", file, "--out", out) == 0
    saved = next((out / "checkpoints").glob("*/run.json"))
    for written in (out / "recipe.toml", saved):
        text = written.read_text(encoding="utf-8")
        assert "per_turn" in text
        written.write_text(text.replace("per_turn", "apart"), encoding="utf-8")
    capsys.readouterr()
    assert command("train", file, "--out", out, "--resume", "--set", "budget.steps=4") == 0
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_epochs_end_when_the_data_were_seen_so_often(command, recipe, tmp_path):
    out = tmp_path / "run"
    assert command("train", recipe(**{"budget.epochs": 2.0}), "--out", out) == 0
    last = lines(out)[-1]
    assert last["progress"] <= 1.0 and 4 <= last["step"] <= 14


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "rows"), [(3, 21), (0.5, 4)])
def test_epochs_over_few_rows_are_so_many_passes(command, recipe, tmp_path, capsys, epochs, rows):
    """A batch holds all of them many times over."""
    file = recipe(**{"budget.epochs": float(epochs), "batch.tokens": 4096})
    assert command("train", file, "--out", tmp_path / "run") == 0
    output = " ".join(capsys.readouterr().err.split())
    assert f"done: 1 step, 4,096 tokens, {epochs} epochs of 7 rows" in output
    assert f"1 batches of {rows} sequences" in output
    assert ("budget.epochs = 0.5 of 7 rows is rounded to 4 rows" in output) == (epochs == 0.5)


def fails(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.slow
def test_what_was_trained_is_exported_whatever_happens_to_its_checkpoint(
    command, recipe, tmp_path, model_folder, monkeypatch, capsys
):
    out, file = tmp_path / "run", recipe(**{"budget.steps": 3, "optimizer.learning_rate": 0.01})
    monkeypatch.setattr("aria.train.state.dcp.async_save", fails)
    assert command("train", file, "--out", out) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert output.count("error:") == 1 and "could not be written: no space left on device" in output
    assert f"The weights of step 3 are exported to {out / 'export'}" in output
    stored = read_adapter(out / "export", AriaConfig.from_pretrained(model_folder))
    assert any(adapter.b.any() for adapter in stored.weights.values()) and not list((out / "checkpoints").iterdir())
    monkeypatch.setattr("aria.train.run.export", fails)
    assert command("train", file, "--out", out) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "Nor could the weights be exported" in output and output.count("no space left on device") == 2
    monkeypatch.undo()
    monkeypatch.setattr("aria.train.run.export", fails)
    assert command("train", file, "--out", out) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "the export could not be written" in output and "Step 3 is in a checkpoint" in output
    assert command("train", file, "--out", out, "--export") == 0


@pytest.mark.parametrize(
    ("during", "output"),
    [
        ("run.export", "interrupted; step 1 is saved in {out}; rerun to resume"),
        ("assemble.load", "before the first checkpoint"),
    ],
)
def test_an_interrupted_command_says_what_is_saved(command, recipe, tmp_path, monkeypatch, capsys, during, output):
    def interrupted(*_):
        raise KeyboardInterrupt

    out, file = tmp_path / "run", recipe(**{"budget.steps": 1})
    monkeypatch.setattr(f"aria.train.{during}", interrupted)
    assert command("train", file, "--out", out) == 130
    assert output.format(out=out) in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_dry_run_trains_nothing_and_says_what_fits(command, recipe, tmp_path, capsys):
    out, file = tmp_path / "run", recipe(**{"budget.epochs": 6.0})
    assert command("train", file, "--out", out, "--dry-run") == 0
    output = capsys.readouterr().out
    assert not out.exists()
    words = ("weights", "adapters", "gradients", "optimizer", "activations", "tokens a step", "time, roughly")
    for word in (*words, "host, a save's copy", "disk, 3 checkpoints and export", "disk, free"):
        assert word in output
    [steps] = [int(line.split("│")[2]) for line in output.splitlines() if line.startswith("│ steps")]
    assert command("train", file, "--out", out) == 0
    assert lines(out)[-1]["step"] == pytest.approx(steps, rel=0.25)
    for missing in ("data.paths", "evaluate.data"):
        capsys.readouterr()
        assert command("train", file, "--dry-run", "--set", f'{missing}=["not/yet"]') == 0
        assert "what does not exist yet: no data set at 'not/yet'" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_one_line(command, recipe, tmp_path, capsys):
    for sets, said in (
        ("optimizer.learning_rte=1", "did you mean 'learning_rate'?"),
        ('data.paths=["nowhere"]', "nowhere"),
        ('targets.modules=["q_prj"]', "q_prj"),
        ("objective.balance_group=3", "balance_group is 3, which does not divide"),
        ('optimizer.rates={"nothing*"=0.5}', "nothing that trains is called 'nothing*'"),
        ('evaluate.data=["elsewhere"]', "elsewhere"),
        ("model.adapter=nowhere", "nowhere"),
        ("objective.factory=os:nope", "os has nothing of that name"),
        ("seed=-1", "seed should be from 0"),
    ):
        assert command("train", recipe(**{"budget.steps": 2}), "--out", tmp_path / "run", "--set", sets) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    (tmp_path / "file").touch()
    assert command("train", recipe(**{"budget.steps": 2}), "--out", tmp_path / "file") == 2
    assert "is a file" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_errors_before_weights_are_read(command, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aria.train.assemble.load_model", lambda *_, **__: pytest.fail("the weights were read"))
    for sets in (
        'data.paths=["nowhere"]', 'evaluate.data=["nowhere"]', "objective.balance_group=3", "model.adapter=nowhere",
        'optimizer.rates={"nothing*"=0.5}', 'targets.modules=["q_prj"]',
    ):  # fmt: skip
        assert command("train", recipe(**{"budget.steps": 2}), "--out", tmp_path / "run", "--set", sets) == 2
    capsys.readouterr()


def test_a_persons_own_recipe_in_the_runs_folder_stays_as_it_is(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    mine = "# for the cat\n" + recipe(**{"budget.steps": 2}).read_text(encoding="utf-8")
    (out / "recipe.toml").write_text(mine, encoding="utf-8")
    assert command("train", out / "recipe.toml", "--out", out) == 0
    assert (out / "recipe.toml").read_text(encoding="utf-8") == mine


def test_only_a_run_of_the_recipe_is_exported(command, recipe, tmp_path, capsys):
    out, file = tmp_path / "run", recipe(**{"budget.steps": 2})
    assert command("train", file, "--out", out, "--export") == 2
    assert "holds no run" in " ".join(capsys.readouterr().err.split())
    assert command("train", file, "--out", out) == 0
    assert command("train", file, "--out", out, "--export", "--set", "targets.rank=2") == 2
    assert "targets.rank" in " ".join(capsys.readouterr().err.split())
    assert command("train", file, "--out", out, "--export", "--set", "budget.steps=9") == 0


@pytest.mark.slow
def test_the_recipe_for_adapters_trains_nano(command, tmp_path, data, capsys):
    out = tmp_path / "run"
    settings = [
        "model.path=", f'data.paths=["{data.as_posix()}"]', "data.max_image_size=224", "batch.tokens=256",
        "batch.accumulate=1", "budget.steps=2", "log.every=1",
    ]  # fmt: skip
    text = (ROOT / "recipes" / "lora.toml").read_text(encoding="utf-8").replace('path = "rhymes-ai/Aria"', "")
    file = tmp_path / "lora.toml"
    file.write_text(text, encoding="utf-8")
    assert command("train", file, "--out", out, *(x for s in settings[1:] for x in ("--set", s))) == 0
    assert len(lines(out)) == 2 and (out / "export" / "adapter_config.json").is_file()


def test_custom_code_makes_model_data_and_objective(command, recipe, tmp_path):
    out = tmp_path / "run"
    kinds = {f"{kind}.factory": f"tests.helpers.toy_training:{kind}" for kind in ("model", "data", "objective")}
    kinds["data.factory"] = "tests.helpers.toy_training:stream"
    text = "[targets]\nmethod = 'full'\nfreeze_vit = false\n"
    top = {"budget.steps": 4, "optimizer.learning_rate": 0.01, "batch.tokens": 64}
    file = recipe(text, **kinds, **top)
    assert command("train", file, "--out", out, "--stop-after", 0) == 0
    assert not (out / "export").exists()
    assert command("train", file, "--out", out) == 0
    found = lines(out)
    assert [line["progress seen"] for line in found] == [0.0, 0.25, 0.5, 0.75]
    trained = load_file(out / "export" / "model.safetensors")
    assert "language_model.model.embed_tokens.weight" in trained and not any("aid" in name for name in trained)
    assert command("train", file, "--out", out, "--dry-run") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over the loopback of Windows is not what is tested here")
def test_two_processes_train_one_model_and_one_resumes(command, recipe, tmp_path, data, model_folder, capsys):
    out = tmp_path / "run"
    good = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1] + "\n"
    # The second row is the second rank's.
    (tmp_path / "rows.jsonl").write_text(good + "no row\n" + good * 40, encoding="utf-8")
    top = {"budget.steps": 2, "targets.dropout": 0.0, "evaluate.data": [data.as_posix()], "data.shuffle": False}
    file = recipe(**top)
    file.write_text(
        file.read_text(encoding="utf-8").replace(f'"{data.as_posix()}"]', f'"{tmp_path.as_posix()}/rows.jsonl"]', 1)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "aria.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [*launcher, "train", str(file), "--out", str(out)]
    output = subprocess.run(run, check=True, cwd=ROOT, env=environment, stderr=subprocess.PIPE).stderr.decode()
    assert "rows.jsonl:2: " in output and output.count("not JSON") == 2, "before and after"
    config = AriaConfig.from_pretrained(model_folder)
    first = read_adapter(out / "export", config).weights
    # A line for each step, of both ranks together.
    assert [line["tokens"] for line in lines(out) if "loss" in line] == [2 * 192, 4 * 192]
    assert lines(out)[-1]["held-out targets"] > 0
    capsys.readouterr()
    assert command("train", file, "--out", out, "--set", "budget.steps=3") == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "warning: a step now has 192 tokens, and had 384 before (data-parallel ranks: 2 -> 1;" in output
    assert "batch.accumulate=2 keeps them" in output
    assert [line["tokens"] for line in lines(out) if "loss" in line][-1] == 5 * 192
    second = read_adapter(out / "export", config).weights
    assert first.keys() == second.keys() and any(not torch.equal(first[n].b, second[n].b) for n in first)


def test_data_of_less_than_a_step_are_trained_on(command, recipe, tmp_path, model_folder):
    out = tmp_path / "run"
    file = recipe(**{"budget.epochs": 1.0, "batch.accumulate": 8, "optimizer.learning_rate": 1e-3})
    assert command("train", file, "--out", out) == 0
    assert [line["step"] for line in lines(out)] == [1] and lines(out)[0]["learning rate"] > 0
    stored = read_adapter(out / "export", AriaConfig.from_pretrained(model_folder))
    assert any(adapter.b.any() for adapter in stored.weights.values())


def test_missing_held_out_data_are_an_error_before_training(command, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    assert command("train", recipe(**{"budget.steps": 2, "evaluate.data": ["nowhere"]}), "--out", out) == 2
    assert "nowhere" in capsys.readouterr().err and not (out / "log.jsonl").exists()


def test_unusable_rows_are_reported_before_the_weights_are_read(command, recipe, tmp_path, data, capsys, monkeypatch):
    def unread(*_, **__):
        raise AssertionError("weights are read")

    good = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1] + "\n"
    (tmp_path / "rows.jsonl").write_text(good * 20 + "no row\n" + good + "{}\n", encoding="utf-8")
    rows = ["--set", f'data.paths=["{tmp_path.as_posix()}/rows.jsonl"]']
    held = ["--set", f'evaluate.data=["{tmp_path.as_posix()}/rows.jsonl"]']
    file = recipe(**{"budget.steps": 1})
    assert command("train", file, "--out", tmp_path / "skips", *rows) == 0
    before = capsys.readouterr().err.partition("What trains")[0]
    for place in ("rows.jsonl:21: not JSON", "rows.jsonl:23: no messages"):
        assert place in before
    monkeypatch.setattr("aria.train.assemble.load_model", unread)
    stop = ["--set", "data.on_error=stop"]
    for more in ([*rows, *stop], [*held, *stop]):
        assert command("train", file, "--out", tmp_path / "run", *more) == 2
        said = capsys.readouterr().err
        assert "2 of 23" in said and "rows.jsonl:21: " in said and "rows.jsonl:23: " in said
    assert command("train", file, "--out", tmp_path / "run", *rows, "--dry-run") == 0
    assert "rows.jsonl:21: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_row_may_resume_past_it(command, recipe, tmp_path, data, capsys, monkeypatch):
    # A row that the look before the training passes over.
    monkeypatch.setattr("aria.train.data.look.MOST_ROWS", 20)
    out, folder = tmp_path / "run", tmp_path / "rows"
    folder.mkdir()
    good = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[-1] + "\n"
    (folder / "train.jsonl").write_text(good * 60 + "no row\n" + good * 10, encoding="utf-8")
    top = {"data.shuffle": False, "data.lookahead": 1, "data.on_error": "stop"}
    rows = ["--set", f'data.paths=["{folder.as_posix()}"]']
    file = recipe(**top, **{"budget.steps": 12})
    assert command("train", file, "--out", out, *rows) == 2
    assert "train.jsonl:61" in capsys.readouterr().err.replace("\n", "")
    stopped = lines(out)[-1]["step"]
    assert stopped > 1 and [folder.name for folder in (out / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    assert command("train", file, "--out", out, *rows, "--resume") == 2, "the row is not passed over"
    assert "train.jsonl:61" in capsys.readouterr().err.replace("\n", "")
    assert command("train", file, "--out", out, *rows, "--resume", "--set", "data.on_error=skip") == 0
    assert lines(out)[-1]["step"] == 12


def test_ranks_that_share_sequences_share_their_flops(model_folder):
    aria = AriaForConditionalGeneration.from_pretrained(model_folder).model
    processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    batch = SimpleNamespace(lengths=(8, 8), labels=5, crops=())
    counted = []
    for ranks in (1, 2):
        parts = SimpleNamespace(
            recipe=Recipe(), aria=aria, processor=processor, parallel=SimpleNamespace(sequence=ranks)
        )
        counted.append(make_objective(parts)[1](batch))
    assert counted[0] == 2 * counted[1] > 0


def test_an_error_that_is_kept_keeps_no_folder_locked(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    wrong, right = (Recipe.read(recipe(), [f"objective.balance_group={n}", "budget.steps=1"]) for n in (3, 1))
    with pytest.raises(ValueError, match="balance_group is 3") as kept:
        train(wrong, tmp_path / "run")
    assert train(right, tmp_path / "run") == "done"
    assert kept.tb is not None


def test_samples_leave_weights_as_optimizers_know_them(model_folder, monkeypatch):
    generating = AriaForConditionalGeneration.from_pretrained(model_folder)
    strides = [parameter.stride() for parameter in generating.model.parameters()]

    def generate(self, input_ids, **others):
        # As the engine does on a GPU.
        self.model.lay_out()
        assert [parameter.stride() for parameter in self.model.parameters()] != strides
        return input_ids

    monkeypatch.setattr(AriaForConditionalGeneration, "generate", generate)
    processor = AriaProcessor.from_pretrained(model_folder)
    assert answer(generating.model, processor, [[{"role": "user", "content": "hello"}]], 4) == [""]
    assert [parameter.stride() for parameter in generating.model.parameters()] == strides
