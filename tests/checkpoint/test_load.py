"""Loading: dtypes, chunks, memory, and every way in which files can be wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aria.checkpoint import Checkpoint, load, load_into, load_model, parameter_shapes
from aria.model import Aria
from tests.helpers.published import LAYOUTS, write_layout
from tests.helpers.tiny import tiny_config, tiny_model

CONFIG = tiny_config()
SHAPES = parameter_shapes(CONFIG)


@pytest.fixture(scope="module")
def state():
    return tiny_model(CONFIG).bfloat16().state_dict()


@pytest.fixture
def folder(state, tmp_path):
    return write_layout("hub", state, CONFIG, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_arrive_in_the_dtype_asked_for(dtype, state, folder):
    loaded = load_model(folder, dtype=dtype, device="cpu").state_dict()
    assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)


def test_on_the_cpu_the_default_is_float32(folder):
    assert {tensor.dtype for tensor in load_model(folder, device="cpu").parameters()} == {torch.float32}


def test_a_mapping_of_dtypes_is_kept_when_none_is_asked_for(state, folder):
    mixed = {name: value.float() if "layernorm" in name else value for name, value in state.items()}
    save_file(mixed, folder / "model.safetensors")
    loaded = Checkpoint(folder, SHAPES).load()
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {name: t.dtype for name, t in mixed.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_any_size_add_up(layout, state, tmp_path, monkeypatch):
    """Chunks of 300 bytes cut every tensor somewhere in the middle."""
    monkeypatch.setattr(load, "_CHUNK", 300)
    write_layout(layout, state, CONFIG, tmp_path, shards=2)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_model(tmp_path, dtype=dtype, device="cpu").state_dict()
        assert all(torch.equal(loaded[name], state[name].to(dtype)) for name in state)


def test_read_fills_tensors_where_they_lie(state, folder):
    checkpoint = Checkpoint(folder, SHAPES)
    name = "language_model.model.layers.1.mlp.experts.fc1.weight"
    target = torch.nn.Parameter(torch.zeros(SHAPES[name], dtype=torch.float64))
    place = target.data_ptr()
    checkpoint.read({name: target})
    assert target.data_ptr() == place and torch.equal(target.detach(), state[name].double())


def test_progress_counts_every_byte(folder):
    seen = []
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == Checkpoint(folder, SHAPES).nbytes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_file_of_weights_and_an_index_work_as_paths(state, tmp_path):
    single = write_layout("hub", state, CONFIG, tmp_path / "single")
    sharded = write_layout("hub", state, CONFIG, tmp_path / "sharded", shards=4)
    for path in (single / "model.safetensors", sharded / "model.safetensors.index.json"):
        assert load_model(path).state_dict().keys() == state.keys()


def test_a_config_gives_random_weights():
    assert {p.dtype for p in load_model(CONFIG, dtype="bfloat16", device="cpu").parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="revision='main' is for Hub repositories"):
        load_model(CONFIG, revision="main")


def test_a_failed_load_leaves_the_model_untouched(state, folder):
    save_file({k: v for k, v in state.items() if "lm_head" not in k}, folder / "model.safetensors")
    with torch.device("meta"):
        model = Aria(CONFIG)
    with pytest.raises(ValueError, match=r"1 missing: language_model\.lm_head\.weight"):
        load_into(model, folder)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_file_that_shrinks_after_the_check_is_an_error(folder):
    checkpoint = Checkpoint(folder, SHAPES)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors ended while its weights were being read"):
        checkpoint.load()


def header_of(file):
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(file, header, rest):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def shift_first(header):
    header["language_model.lm_head.weight"]["data_offsets"][0] += 2


def wrong_size(header):
    header["language_model.lm_head.weight"]["shape"][0] += 1


def negative(header):
    header["language_model.lm_head.weight"]["shape"][0] = -1


def beyond(header):
    header["language_model.lm_head.weight"]["data_offsets"] = [0, 2**62]


@pytest.mark.parametrize("damage", [shift_first, wrong_size, negative, beyond])
def test_damaged_headers_name_the_file(damage, folder):
    file = folder / "model.safetensors"
    header, rest = header_of(file)
    damage(header)
    write_header(file, header, rest)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"{]}x", b"<!DOCTYPE html>"],
)
def test_garbage_in_place_of_safetensors_names_the_file(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_name_the_file(keep, folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        load_model(folder)


def test_integer_weights_are_reported_as_quantized(state, folder):
    save_file(
        {**state, "language_model.lm_head.weight": torch.zeros(300, 64).to(torch.int8)}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight in .* is stored as I8.*quantized"):
        load_model(folder)


def test_shards_that_are_missing_are_named(state, tmp_path):
    write_layout("hub", state, CONFIG, tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 3 shards .*model-00002-of-00003\.safetensors"):
        load_model(tmp_path)


def test_shards_without_an_index_are_found(state, tmp_path):
    write_layout("hub", state, CONFIG, tmp_path, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert load_model(tmp_path).state_dict().keys() == state.keys()


def test_a_tensor_in_two_shards_is_an_error(state, tmp_path):
    write_layout("hub", state, CONFIG, tmp_path, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(second), "language_model.lm_head.weight": state["language_model.lm_head.weight"]}, second)
    save_file({**load_file(first), "language_model.lm_head.weight": state["language_model.lm_head.weight"]}, first)
    with pytest.raises(ValueError, match=r"model-00002.* repeats tensors of another shard: language_model\.lm_head"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", "a\\b.safetensors", "..", "."])
def test_an_index_may_not_point_outside_its_folder(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 7}}', "{"])
def test_a_broken_index_is_one_clear_error(text, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is not an index of shards"):
        load_model(folder)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((1 << 62).to_bytes(8, "little") + b"{}", "its header would have 4,611,686,018,427,387,904 bytes"),
        ((50 << 20).to_bytes(8, "little") + b" " * (50 << 20), "its header would have 52,428,800 bytes; at most"),
        (header(a=entry([2], 0, 4), b=entry([2], 2, 6)) + bytes(6), "is not a valid safetensors file"),
        (header(a=entry([2], -4, 0)) + bytes(4), "is not a valid safetensors file"),
        (header(a=entry([2], 4, 0)) + bytes(4), "is not a valid safetensors file"),
        (header(a=entry([2], 0, 1 << 62)) + bytes(4), "is not a valid safetensors file"),
        (header(a=entry([1 << 32, 1 << 32], 0, 0)), "is not a valid safetensors file"),
        (header(a=entry([-1, -2], 0, 4)) + bytes(4), "is not a valid safetensors file"),
        (header(a=entry([1] * 1000 + [2], 0, 4)) + bytes(4), "a has 1,001 axes; at most 8 are read"),
        (header(a=entry([], 0, 2)) + bytes(2), "not Aria's in any layout"),
        (b"\x20" + bytes(7) + b'{"a": 1, "a": 2}' + b" " * 16, "has the key 'a' twice"),
        (b"\x10\x27" + bytes(6) + b"[" * 10_000, "deeper than 100 levels"),
        (b"", "is not a valid safetensors file"),
    ],
    ids=[
        "length", "large", "overlap", "negative", "backwards", "end", "overflow", "sizes", "axes", "scalar", "twice",
        "deep", "empty",
    ],
)  # fmt: skip
def test_hostile_headers_are_one_clear_error(content, message, folder):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_model(folder)
    assert "model.safetensors" in str(refused.value) or str(folder) in str(refused.value)
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth"])
def test_pickles_of_torch_are_refused_with_what_to_use_instead(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text('{"weight_map": {"x": "pytorch_model-00001-of-00006.bin"}}')
    for path in (folder, folder / name):
        with pytest.raises(
            ValueError, match=r"pickles of torch.*torchao-int8wo.*gpt-fast.*safetensors of rhymes-ai/Aria"
        ):
            Checkpoint(path, SHAPES)


def test_a_folder_without_weights_says_what_was_expected(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors.*has config\.json"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Checkpoint(folder / "nowhere", SHAPES)
    (folder / "weights.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"weights\.npz is of a kind that is not read"):
        Checkpoint(folder / "weights.npz", SHAPES)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from Linux")
@pytest.mark.parametrize("layout", ["hub", "paddle"])
def test_loading_holds_no_second_copy(layout, tmp_path):
    """128 MB of weights take no more memory beside themselves than the buffers."""
    config = tiny_config(vocab_size=500_000)
    write_layout(layout, Aria.random(config, dtype=torch.bfloat16, device="cpu").state_dict(), config, tmp_path)
    code = (
        "import resource, sys, torch; from aria.checkpoint import load_model\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model = load_model(sys.argv[1], dtype=torch.bfloat16, device='cpu')\n"
        "print(peak() - before - sum(p.nbytes for p in model.parameters()))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    # Two buffers of 32 MiB for the head, where its orientation differs.
    assert int(ran.stdout) < (100 << 20 if layout == "paddle" else 40 << 20)
