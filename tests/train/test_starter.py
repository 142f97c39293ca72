"""``aria train --init``: written recipes train as they are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from aria.train.recipe import Recipe
from aria.train.starter import starter_recipe
from tests.helpers import made_data
from tests.helpers.made_data import chat, jsonl

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """A folder of seven rows, one with a picture, and two that are held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    made_data.picture(folder, "a.png")
    shown = {
        "messages": [made_data.said("user", [{"type": "image", "path": "a.png"}]), made_data.said("assistant", "fox")]
    }
    rows = [shown, *(chat(f"{i}?", "dog") for i in range(6))]
    for name, part in (("train", rows), ("test", rows[-2:])):
        jsonl(folder / f"{name}.jsonl", part)
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_recipe_that_was_written_trains_as_it_stands(
    command, tmp_path, data, model_folder, monkeypatch, capsys, method
):
    monkeypatch.chdir(tmp_path)
    assert command("train", "--init", method, "--data", data, "-m", model_folder) == 0
    file = tmp_path / f"{method}.toml"
    assert f"aria train {method}.toml" in " ".join(capsys.readouterr().out.split())
    written = Recipe.read(file)
    assert (written.targets.method, written.data.paths) == (method, (str(data),))
    assert written.evaluate.data == (str(data),) and written.evaluate.split == "test"
    text = file.read_text(encoding="utf-8")
    assert all(f"[{section}]" in text for section in ("model", "data", "batch", "optimizer", "budget", "evaluate"))
    assert text.count("\n#") > 10, "it says what can be changed"
    assert command("train", file.name) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert (
        "3 epochs of 7 rows" in output and "skipped" not in output and (tmp_path / "runs" / method / "export").is_dir()
    )
    before = file.read_bytes()
    assert command("train", "--init", method, "--data", data) == 2
    assert "exists already; name another file" in " ".join(capsys.readouterr().err.split())
    assert file.read_bytes() == before


def test_a_recipe_is_written_for_nano_or_a_named_base(command, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = data / "train.jsonl"
    assert command("train", "sub/nano.toml", "--init", "lora", "--data", rows) == 0
    nano = Recipe.read(tmp_path / "sub" / "nano.toml")
    assert nano.model.path is None and nano.batch.tokens == 256 and not nano.evaluate.data
    # What is on the Hub is not asked; the authors' own numbers stand there.
    assert command("train", "big.toml", "--init", "full", "--data", data, "--data", rows, "-m", "org/base") == 0
    big, authors = Recipe.read(tmp_path / "big.toml"), Recipe.read(ROOT / "recipes" / "full.toml")
    assert big.model.path == "org/base" and big.data.paths == (str(data), str(rows))
    assert (big.batch, big.optimizer, big.parallel) == (authors.batch, authors.optimizer, authors.parallel)
    capsys.readouterr()
    for arguments, said in (
        (("--init", "lora"), "--init needs data"),
        (("--init", "lora", "--data", "nowhere"), "nowhere"),
        (("--init", "lora", "--data", data, "--dry-run"), "--init only writes a recipe"),
        (("big.toml", "--data", data), "--data and --model need --init"),
        ((), "which RECIPE?"),
    ):
        assert command("train", *arguments) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.toml", "data", "sub"]


def test_a_held_out_split_that_datasets_saved_is_evaluated_on(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_list([chat("a?", "dog")] * 3)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
    written = Recipe.from_table(tomllib.loads(starter_recipe("lora", [str(tmp_path / "saved")], "org/base")))
    assert written.evaluate.data == (str(tmp_path / "saved"),) and written.evaluate.split == "validation"
