"""The report of `aria inspect`: local weights are checked as when loading, those on the Hub by their headers."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError, OfflineModeIsEnabled, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aria import AriaConfig, hub
from aria.checkpoint import load_model, parameter_shapes, remote
from aria.cli import main
from aria.inspection import inspect_model, report
from tests.helpers.published import LAYOUTS, write_layout
from tests.helpers.tiny import tiny_config, tiny_model

CONFIG = tiny_config()
REPO = "someone/small-aria"
MAIN, PINNED = "main", "v1"


@pytest.fixture(scope="module")
def state():
    return tiny_model(CONFIG).bfloat16().state_dict()


def inspect(path, revision: str | None = None) -> str:
    out = io.StringIO()
    report(inspect_model(path, revision=revision), Console(file=out, width=200))
    return out.getvalue()


def found(layout: str, dtype: str, text: str) -> bool:
    return f"layout        {layout} (" in text and f"stored as     {dtype}\n" in text


def headers(folder: Path) -> SafetensorsRepoMetadata:
    """The safetensors metadata of a repository, as huggingface_hub returns it."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
            tensors = {key: TensorInfo(one.get_dtype(), one.get_shape(), (0, 0)) for key, one in slices.items()}
        files[file.name] = SafetensorsFileMetadata({"format": "pt"}, tensors)
    if not files:
        raise NotASafetensorsRepoError(f"{REPO!r} is not a safetensors repo")
    weight_map = {key: name for name, file in files.items() for key in file.tensors}
    return SafetensorsRepoMetadata(None, len(files) > 1, weight_map, files)


class Hub:
    """A repository with two revisions, which records what is fetched."""

    def __init__(self, root: Path):
        self.root = root
        self.asked: list[str] = []

    def folder(self, revision: str | None = None) -> Path:
        return self.root / "repository" / (revision or MAIN)

    def snapshot(self, revision: str | None = None) -> Path:
        return self.root / "cache" / (revision or MAIN)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        assert repo_id == REPO
        ignore = shutil.ignore_patterns("*")
        shutil.copytree(self.folder(revision), self.snapshot(revision), ignore=ignore, dirs_exist_ok=True)
        for pattern in allow_patterns:
            for file in self.folder(revision).glob(pattern):
                shutil.copy(file, self.snapshot(revision))
        return str(self.snapshot(revision))

    def get_safetensors_metadata(self, repo_id, *, revision=None):
        assert repo_id == REPO
        self.asked.append(revision or MAIN)
        return headers(self.folder(revision))


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(remote, "get_safetensors_metadata", fake.get_safetensors_metadata)
    return fake


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_local_checkpoint_of_any_layout(layout, state, tmp_path):
    assert found(LAYOUTS[layout][0], "bfloat16", inspect(write_layout(layout, state, CONFIG, tmp_path, shards=2)))


def test_the_packaged_model():
    assert found("hub", "bfloat16", inspect(None))


def test_a_local_folder_that_lacks_shards_is_described_by_its_config_and_index(state, tmp_path):
    folder = write_layout("hub", state, CONFIG, tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for path in (folder, index):
        text = inspect(path)
        assert re.search(r"weights .*lacks 1 of the 3 shards .*model-00002-of-00003\.safetensors", text)
        assert "layout        hub (" in text and "stored as     float32 (by its config)" in text
        assert f"{CONFIG.num_parameters():,}" in text and "Fits here" in text
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    for path in (folder, index):
        assert "lacks 3 of the 3 shards" in inspect(path)
    index.unlink()
    text = inspect(folder)
    assert "unknown until weights are there" in text and "has no weights" in text
    assert f"context       {CONFIG.text.max_position_embeddings:,} tokens" in text
    assert inspect(folder / "config.json") == text


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_published_configs_and_indices_alone(name, tmp_path):
    config = AriaConfig.aria()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    names = dict.fromkeys(parameter_shapes(config), "part-1.bin")
    (tmp_path / name).write_text(json.dumps({"weight_map": names}))
    found = inspect_model(tmp_path)
    assert found["layout"]["name"] == "hub" and not found["weights"]["complete"]
    assert found["parameters"]["total"] == config.num_parameters() and found["context"] == 65536
    assert json.loads(json.dumps(found)) == found


def test_git_lfs_pointers_are_not_weights_and_names_are_escaped(state, tmp_path):
    folder = write_layout("hub", state, CONFIG, tmp_path / "a [red]model", shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    text = inspect(folder)
    assert f"unavailable: {shard} is a pointer of Git LFS, not the weights; run git lfs pull there" in text
    assert "layout        hub (" in text and f"{CONFIG.num_parameters():,}" in text
    with pytest.raises(FileNotFoundError, match="git lfs pull"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "lists no weights" in inspect(folder)


@pytest.mark.parametrize("name", ["picture.png", "notes.txt", "README.md"])
def test_a_file_that_is_not_a_model_is_a_clear_error(name, tmp_path):
    write_config = tmp_path / "config.json"
    write_config.write_text(json.dumps(CONFIG.to_dict()))
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=rf"{name} is not a model; expected a folder with config.json"):
        inspect(tmp_path / name)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_number_is_cut_on_a_narrow_terminal(width):
    out = io.StringIO()
    found = inspect_model(None)
    found["parameters"] = {name: value * 1_003 for name, value in found["parameters"].items()}
    report(found, Console(file=out, width=width))
    for count in found["parameters"].values():
        assert f"{count:,}" in out.getvalue() or count == found["parameters"]["active"]
    assert "\u2026" not in out.getvalue()


def test_inspect_as_json(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["aria", "inspect", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["layout"]["name"] == "hub"


def test_a_file_of_weights_and_an_index_work_as_paths(state, tmp_path):
    single = write_layout("hub", state, CONFIG, tmp_path / "single") / "model.safetensors"
    index = write_layout("original", state, CONFIG, tmp_path / "sharded", shards=3) / "model.safetensors.index.json"
    assert found("hub", "bfloat16", inspect(single))
    assert found("original", "bfloat16", inspect(index))


def test_an_index_away_from_its_config_is_a_clear_error(state, tmp_path):
    folder = write_layout("hub", state, CONFIG, tmp_path, shards=2)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        inspect(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["hub", "original", "sequential"])
def test_a_hub_repository_is_known_without_its_weights(layout, shards, state, fake_hub):
    write_layout(layout, state, CONFIG, fake_hub.folder(), shards=shards)
    assert found(LAYOUTS[layout][0], "bfloat16", inspect(REPO))
    assert fake_hub.asked == [MAIN]
    assert not list(fake_hub.snapshot().glob("*.safetensors"))


def test_the_dtype_is_that_of_the_weights_not_of_the_config(state, fake_hub):
    write_layout("hub", {name: value.half() for name, value in state.items()}, CONFIG, fake_hub.folder())
    assert CONFIG.dtype == torch.float32
    assert found("hub", "float16", inspect(REPO))


def test_the_requested_revision_is_inspected(state, fake_hub):
    write_layout("hub", state, CONFIG, fake_hub.folder())
    write_layout("original", state, CONFIG, fake_hub.folder(PINNED))
    assert found("original", "bfloat16", inspect(REPO, PINNED))
    assert fake_hub.asked == [PINNED]


@pytest.mark.parametrize("layout", ["hub", "paddle"])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_hub_repository_that_was_fetched_is_read_here(layout, shards, state, fake_hub):
    write_layout(layout, state, CONFIG, fake_hub.folder(), shards=shards)
    shutil.copytree(fake_hub.folder(), fake_hub.snapshot())
    assert found(layout, "bfloat16", inspect(REPO))
    assert fake_hub.asked == []


def test_a_partly_fetched_hub_repository_is_inspected_on_the_hub(state, fake_hub):
    write_layout("hub", state, CONFIG, fake_hub.folder(), shards=3)
    fake_hub.snapshot().mkdir(parents=True)
    shutil.copy(fake_hub.folder() / "model-00001-of-00003.safetensors", fake_hub.snapshot())
    assert found("hub", "bfloat16", inspect(REPO))
    assert fake_hub.asked == [MAIN]


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_on_the_hub_cannot_be_inspected_remotely(shards, state, fake_hub):
    write_layout("paddle", state, CONFIG, fake_hub.folder(), shards=shards)
    with pytest.raises(
        ValueError, match=rf"{REPO} has no safetensors.*model_state\.pdparams whole and give its folder"
    ):
        inspect(REPO)


def test_an_old_index_of_pickles_does_not_hide_the_safetensors(state, fake_hub):
    write_layout("hub", state, CONFIG, fake_hub.folder())
    fake_hub.snapshot().mkdir(parents=True)
    (fake_hub.snapshot() / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    assert found("hub", "bfloat16", inspect(REPO))


def damaged_shape(weights):
    weights["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"][:-1].clone()


def damaged_keys(weights):
    del weights["language_model.lm_head.weight"]


def quantized(weights):
    weights["language_model.lm_head.weight"] = weights["language_model.lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_shape, r"1 wrongly shaped: language_model\.lm_head\.weight is \[299, 64\]"),
        (damaged_keys, r"1 missing: language_model\.lm_head\.weight"),
        (quantized, r"lm_head\.weight in someone/small-aria/model\.safetensors is stored as I8.*quantized"),
    ],
)
def test_weights_on_the_hub_that_do_not_fit_are_named(damage, message, state, fake_hub):
    file = write_layout("hub", state, CONFIG, fake_hub.folder()) / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=message) as caught:
        inspect(REPO)
    assert REPO in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            SafetensorsParsingError("bad header"),
            ValueError,
            "damaged safetensors file: bad header",
        ),
        (OfflineModeIsEnabled("offline mode"), FileNotFoundError, "on the Hub: offline mode"),
        (TimeoutError(), FileNotFoundError, "on the Hub: TimeoutError"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_clear_error(error, kind, message, state, fake_hub, monkeypatch):
    write_layout("hub", state, CONFIG, fake_hub.folder())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(remote, "get_safetensors_metadata", fail)
    with pytest.raises(kind, match=message) as caught:
        inspect(REPO)
    assert REPO in str(caught.value) and "\n" not in str(caught.value)
