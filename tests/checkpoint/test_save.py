"""Saving and converting: what transformers expects, all or nothing, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from aria import AriaForConditionalGeneration, AriaProcessor, cli
from aria.checkpoint import convert, load_model, save_checkpoint
from aria.checkpoint import save as save_module
from aria.config import AriaConfig
from aria.model import Aria
from aria.processor import AriaTokenizer
from tests.helpers import small_tokenizer
from tests.helpers.published import LAYOUTS, to_paddle_array, write_layout
from tests.helpers.tiny import tiny_config, tiny_model, transformers_twin

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def state():
    return tiny_model(CONFIG).bfloat16().state_dict()


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def same(state, folder):
    loaded = load_model(folder, dtype=torch.bfloat16, device="cpu").state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("max_shard_size", ["5GB", "200KB"])
def test_transformers_finds_every_key_and_no_other(max_shard_size, state, tmp_path):
    save_checkpoint(state, CONFIG, tmp_path, max_shard_size=max_shard_size)
    twin = transformers_twin(tmp_path)
    saved = {key: value for key, value in twin.state_dict().items() if "post_layernorm" not in key}
    assert len(saved) == len(state)
    assert torch.equal(saved["lm_head.weight"], state["language_model.lm_head.weight"].float())
    experts = "model.language_model.layers.2.mlp.experts.down_proj"
    assert torch.equal(saved[experts], state["language_model.model.layers.2.mlp.experts.fc2.weight"].float())
    assert twin.generation_config.eos_token_id == 2


def test_files_are_those_of_the_hub_layout(state, tmp_path):
    save_checkpoint(state, CONFIG, tmp_path, generation_config={"eos_token_id": 7})
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert AriaConfig.from_pretrained(tmp_path) == replace(CONFIG, dtype=torch.bfloat16)
    written = load_file(tmp_path / "model.safetensors")
    filler = {key for key in written if key not in state}
    assert filler == {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"}
    assert all(not written[key].any() for key in filler)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_config_states_the_dtype_of_the_weights(state, tmp_path):
    """A bfloat16 checkpoint is float32 on the CPU; saved from there, transformers must not take it for bfloat16."""
    save_checkpoint(state, CONFIG, tmp_path / "stored")
    model = AriaForConditionalGeneration.from_pretrained(tmp_path / "stored", device="cpu")
    assert model.config.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(20, CONFIG.text.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    twin = transformers.AriaForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    with torch.inference_mode():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_of_mixed_dtypes_the_config_states_the_one_with_most_bytes(state, tmp_path):
    mixed = {name: value.float() if "norm" in name else value for name, value in state.items()}
    save_checkpoint(mixed, CONFIG, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_every_dtype_is_kept_and_aligned(state, tmp_path):
    mixed = {name: value.float() if "norm" in name else value for name, value in state.items()}
    mixed["language_model.lm_head.weight"] = mixed["language_model.lm_head.weight"].half()
    save_checkpoint(mixed, CONFIG, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], mixed[name]) and written[name].dtype == mixed[name].dtype for name in mixed)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert all(
        (8 + size + entry["data_offsets"][0]) % (4 if entry["dtype"] == "F32" else 2) == 0
        for key, entry in header.items()
        if key != "__metadata__"
    )


def test_shards_keep_to_their_size_and_the_index_counts_them(state, tmp_path):
    save_checkpoint(state, CONFIG, tmp_path, max_shard_size=300_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {name for name, shard in index["weight_map"].items() if shard == shards[1].name} == set(load_file(shards[1]))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    largest = max(tensor.nbytes for tensor in state.values())
    assert max(sizes) <= max(300_000, largest)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same(state, tmp_path)


def test_saving_again_replaces_the_weights_and_keeps_other_files(state, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_checkpoint(state, CONFIG, tmp_path, max_shard_size=300_000)
    other = {name: value + 1 for name, value in state.items()}
    save_checkpoint(other, CONFIG, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    }  # fmt: skip
    assert same(other, tmp_path)
    save_checkpoint(state, CONFIG, tmp_path, max_shard_size=300_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(state, tmp_path)


def test_a_model_can_be_saved_where_it_was_loaded_from(state, tmp_path):
    save_checkpoint(state, CONFIG, tmp_path)
    save_checkpoint(load_model(tmp_path, dtype=torch.bfloat16, device="cpu").state_dict(), CONFIG, tmp_path)
    assert same(state, tmp_path)


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_the_folder_as_it_was(existing, state, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if existing:
        save_checkpoint(state, CONFIG, folder)
    before = contents(tmp_path)
    real, calls = save_module.write_safetensors, []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(save_module, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(state, CONFIG, folder, max_shard_size=300_000)
    assert contents(tmp_path) == before
    assert folder.exists() == existing


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_a_failure_while_moving_files_in_place_is_undone(at, state, tmp_path, monkeypatch):
    save_checkpoint(state, CONFIG, tmp_path, max_shard_size=300_000)
    before = contents(tmp_path)
    path_type = type(tmp_path)
    real, calls = path_type.rename, []

    def locked(source, target):
        calls.append(source)
        if len(calls) == at:
            raise PermissionError(13, "file in use")
        return real(source, target)

    monkeypatch.setattr(path_type, "rename", locked)
    with pytest.raises(PermissionError):
        save_checkpoint({name: value + 1 for name, value in state.items()}, CONFIG, tmp_path)
    assert contents(tmp_path) == before


def test_parameters_that_do_not_fit_the_config_are_named(state, tmp_path):
    broken = dict(state)
    del broken["language_model.lm_head.weight"]
    broken["extra"] = torch.zeros(1)
    broken["multi_modal_projector.query"] = torch.zeros(2, 2)
    with pytest.raises(ValueError) as caught:
        save_checkpoint(broken, CONFIG, tmp_path / "out")
    assert "1 missing: language_model.lm_head.weight" in str(caught.value)
    assert "1 unexpected: extra" in str(caught.value)
    assert "query is [2, 2] and should be [256, 48]" in str(caught.value)
    with pytest.raises(ValueError, match=r"lm_head\.weight is torch\.int8"):
        save_checkpoint(
            {**state, "language_model.lm_head.weight": torch.zeros(300, 64).to(torch.int8)}, CONFIG, tmp_path
        )
    assert not (tmp_path / "out").exists() and not contents(tmp_path)


@pytest.mark.parametrize("size", ["five", "5", "-1GB", 0, -3, "5TB"])
def test_strange_shard_sizes_are_refused(size, state, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        save_checkpoint(state, CONFIG, tmp_path, max_shard_size=size)


def test_a_file_in_place_of_the_folder_is_an_error(state, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        save_checkpoint(state, CONFIG, tmp_path / "file")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_converts_to_todays(layout, state, tmp_path):
    source = write_layout(layout, state, CONFIG, tmp_path / "in", shards=2)
    seen = []
    done = convert(source, tmp_path / "out", max_shard_size="400KB", progress=lambda *step: seen.append(step))
    assert (done.layout, done.tensors) == (LAYOUTS[layout][0], len(state))
    assert seen[-1][0] == seen[-1][1] == done.nbytes
    assert same(state, tmp_path / "out")
    written = {
        key: value for file in (tmp_path / "out").glob("*.safetensors") for key, value in load_file(file).items()
    }
    assert all(torch.equal(written[name], state[name]) for name in state) and len(written) == len(state) + 2


def test_converting_brings_the_companions_and_todays_config(state, tmp_path):
    source = write_layout("original", state, CONFIG, tmp_path / "in")
    config = CONFIG.to_dict()
    config["text_config"]["model_type"], config["vision_config"]["model_type"] = "aria_moe_lm", "aria_vision_model"
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["intermediate_size"]
    config["text_config"]["intermediate_size"] = 13568
    config["auto_map"] = {"AutoConfig": "configuration_aria.AriaConfig"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").write_bytes(b"\x00pieces")
    pictures = {"auto_map": {"x": "y"}, "image_processor_type": "AriaVisionProcessor", "max_image_size": 980}
    (source / "preprocessor_config.json").write_text(json.dumps(pictures))
    (source / "modeling_aria.py").write_text("raise SystemExit")
    (source / "optimizer.pt").write_bytes(b"x")
    done = convert(source / "model.safetensors", tmp_path / "out")
    assert done.companions == ("tokenizer.model", "preprocessor_config.json")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model",
    }  # fmt: skip
    new = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert new == {"image_processor_type": "AriaImageProcessor", "max_image_size": 980}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\x00pieces"
    written = AriaConfig.from_pretrained(tmp_path / "out")
    assert written.text == CONFIG.text and written.dtype == torch.bfloat16
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    transformers_twin(tmp_path / "out")


def test_a_converted_original_repository_loads_in_transformers(tmp_path):
    """The originals' processor files lack image token, table of sizes and, for transformers 5, the chat template."""
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models with protobuf")
    config = tiny_config(vocab_size=AriaTokenizer(small_tokenizer.model()).vocab_size)
    source = write_layout("original", tiny_model(config).state_dict(), config, tmp_path / "in")
    (source / "tokenizer.model").write_bytes(small_tokenizer.model())
    (source / "tokenizer_config.json").write_text(json.dumps(small_tokenizer.ONLY_UNK))
    pictures = {
        "auto_map": {"AutoProcessor": "processing_aria.AriaProcessor"}, "image_processor_type": "AriaVisionProcessor",
        "max_image_size": 490, "min_image_size": 336, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (source / "preprocessor_config.json").write_text(json.dumps(pictures))

    out = tmp_path / "out"
    ran = CliRunner().invoke(cli.app, ["convert", str(source), str(out)], catch_exceptions=False)
    assert ran.exit_code == 0

    messages: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown?"}]}]
    picture = Image.radial_gradient("L").convert("RGB").resize((300, 200))
    theirs = transformers.AriaProcessor.from_pretrained(out)
    inputs = theirs(
        text=theirs.apply_chat_template(messages, add_generation_prompt=True),
        images=picture,
        max_image_size=490,
        return_tensors="pt",
    )
    ours = AriaProcessor.from_pretrained(out)
    expected = ours(
        ours.apply_chat_template(messages, add_generation_prompt=True), picture, max_image_size=490, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.inference_mode():
        logits = AriaForConditionalGeneration.from_pretrained(source, device="cpu")(**expected).logits
        torch.testing.assert_close(transformers_twin(out)(**expected).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tokenizer.model", "preprocessor_config.json"])
def test_converting_says_what_the_processor_still_needs(name, model_folder, tmp_path):
    source = Path(shutil.copytree(model_folder, tmp_path / "in"))
    (source / name).unlink()
    ran = CliRunner().invoke(cli.app, ["convert", str(source), str(tmp_path / "out")], catch_exceptions=False)
    assert ran.exit_code == 0
    assert f"the processor needs {name}" in ran.output


def test_converting_onto_itself_is_refused(state, tmp_path):
    source = write_layout("original", state, CONFIG, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is the source itself"):
        convert(source, source / ".." / source.name)
    assert contents(tmp_path) == before


def test_converting_onto_an_adapter_is_refused(state, tmp_path):
    """transformers would add it to the weights."""
    source = write_layout("original", state, CONFIG, tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="out holds an adapter, which would be added on loading; give another folder"):
        convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_broken_source_leaves_nothing_behind(state, tmp_path):
    source = write_layout("hub", state, CONFIG, tmp_path / "in")
    (source / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"in.tokenizer_config\.json is not valid JSON"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_companion_that_leads_elsewhere_is_not_copied(state, tmp_path):
    """A private file would be published together with the weights."""
    source = write_layout("hub", state, CONFIG, tmp_path / "in")
    (tmp_path / "secret").write_text("mine")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"in.LICENSE is a link to .*secret, outside of its folder; put a copy"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "LICENSE").unlink()
    (source / "TERMS").write_text("free")
    (source / "LICENSE").symlink_to("TERMS")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free" and not (tmp_path / "out" / "LICENSE").is_symlink()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from Linux")
def test_converting_holds_one_tensor_at_a_time(tmp_path):
    """Of 128 MB of weights in one pickle, the largest tensor has 64 MB; the buffers come on top."""
    config = tiny_config(vocab_size=500_000)
    weights = Aria.random(config, dtype=torch.bfloat16, device="cpu").state_dict()
    write_layout("paddle", weights, config, tmp_path / "in")
    code = (
        "import resource, sys; from aria.checkpoint import convert\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); convert(sys.argv[1], sys.argv[2]); print(peak() - before)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < (64 + 2 * 32 + 20) << 20
    head = load_file(tmp_path / "out" / "model.safetensors")["language_model.lm_head.weight"]
    assert to_paddle_array(head).tobytes() == to_paddle_array(weights["language_model.lm_head.weight"]).tobytes()
