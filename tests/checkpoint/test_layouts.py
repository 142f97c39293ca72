"""Every published layout: detected, loaded to the same parameters, and refused by name if it does not fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from aria.checkpoint import LAYOUTS as TABLES
from aria.checkpoint import Checkpoint, load_model, parameter_shapes
from aria.checkpoint.layouts import is_dead
from aria.config import AriaConfig
from tests.helpers.published import LAYOUTS, original, write_layout
from tests.helpers.tiny import tiny_config, tiny_model

CONFIG = tiny_config()
SHAPES = parameter_shapes(CONFIG)


@pytest.fixture(scope="module")
def state():
    return tiny_model(CONFIG).bfloat16().state_dict()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(layout, shards, state, tmp_path):
    write_layout(layout, state, CONFIG, tmp_path, shards=shards)
    assert Checkpoint(tmp_path, SHAPES).layout.name == LAYOUTS[layout][0]
    loaded = load_model(tmp_path, dtype=torch.bfloat16, device="cpu").state_dict()
    assert loaded.keys() == state.keys()
    for name, expected in state.items():
        assert torch.equal(loaded[name], expected), name


def test_tables_of_the_published_model_have_the_published_size():
    """Counts and bytes of the Hub's indexes (792 tensors and 50,614,617,824 bytes without the two of the dead norm)."""
    shapes = parameter_shapes(AriaConfig.aria())
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == 50_614_617_824
    keys = {}
    for layout in TABLES:
        pieces = [piece for name, shape in shapes.items() for piece in layout.pieces(name, shape)]
        assert len({piece.key for piece in pieces}) == len(pieces)
        assert sum(torch.Size(piece.shape).numel() for piece in pieces) == 50_614_617_824 // 2
        keys.setdefault(layout.name, len(pieces))
    assert keys["hub"] == keys["original"] == keys["transformers"] == keys["paddle"] == 792
    assert keys["sequential-mlp"] == 6112


def write(state, folder):
    CONFIG.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


def test_all_faults_are_named_at_once(state, tmp_path):
    broken = original(state)
    missing = "multi_modal_projector.cross_attn.ln_kv.weight"
    wrong = "language_model.model.layers.1.mlp.router.weight"
    del broken[missing]
    broken[wrong] = torch.zeros(9, 64, dtype=torch.bfloat16)
    broken["language_model.model.extra.weight"] = torch.zeros(1, dtype=torch.bfloat16)
    write(broken, tmp_path)
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "layout original" in message
    assert f"1 missing: {missing}" in message
    assert "1 unexpected: language_model.model.extra.weight" in message
    assert f"1 wrongly shaped: {wrong} is [9, 64] and should be [8, 64]" in message


def test_a_long_list_of_faults_is_cut_short(state, tmp_path):
    write({key: value for key, value in state.items() if not key.startswith("vision_tower")}, tmp_path)
    count = sum(key.startswith("vision_tower") for key in state)
    with pytest.raises(ValueError, match=rf"{count} missing: vision_tower.*and {count - 6} more$"):
        load_model(tmp_path)


def test_mixed_dtypes_within_one_parameter_are_refused(state, tmp_path):
    published = LAYOUTS["sequential"][1](state)
    key = "language_model.model.layers.0.mlp.experts.experts.3.up_proj.weight"
    published[key] = published[key].float()
    write(published, tmp_path)
    with pytest.raises(ValueError, match=r"1 of mixed dtypes: language_model\.model\.layers\.0\.mlp\.experts\.fc1"):
        load_model(tmp_path)


def test_unknown_layout_names_what_came_and_what_is_known(tmp_path):
    write({f"transformer.h.{i}.attn.weight": torch.zeros(2, 2) for i in range(7)}, tmp_path)
    with pytest.raises(ValueError, match=r"unknown layout.*transformer\.h\.0\.attn\.weight.*hub \(.*paddle \("):
        load_model(tmp_path)


def test_gpt_fast_is_refused_by_name(state, tmp_path):
    write({"llm.layers.0.attention.wqkv.weight": torch.zeros(2, 2), **state}, tmp_path)
    with pytest.raises(ValueError, match=r"gpt-fast.*rhymes-ai/Aria"):
        load_model(tmp_path)


def test_a_config_of_another_size_is_reported_by_shapes(state, tmp_path):
    write(state, tmp_path)
    tiny_config(vocab_size=310).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"2 wrongly shaped: .*embed_tokens\.weight is \[300, 64\] and should be \[310"
    ):
        load_model(tmp_path)


def test_rotary_tables_and_the_dead_norm_are_left_out_and_nothing_else():
    dead = (
        "vision_tower.post_layernorm.weight",
        "model.vision_tower.post_layernorm.bias",
        "vision_tower.vision_model.post_layernorm.bias",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    assert all(is_dead(key) for key in dead)
    assert not any(is_dead(key) for key in SHAPES)
    assert not is_dead("multi_modal_projector.post_layernorm.weight")
