"""The configuration: every published variant, round trips, transformers' reading, and what is rejected."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers

from aria.config import AriaConfig, ProjectorConfig, TextConfig, VisionConfig, parse_dtype
from tests.helpers.tiny import tiny_config

Json = dict[str, Any]


def today() -> Json:
    """The fields of rhymes-ai/Aria's own config.json, including its odd spelling of the vision heads."""
    return {
        "_name_or_path": "rhymes-ai/Aria",
        "architectures": ["AriaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 9,
        "initializer_range": 0.02,
        "model_type": "aria",
        "pad_token_id": 2,
        "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 1664,
            "max_position_embeddings": 65536,
            "model_type": "aria_text",
            "moe_num_experts": 64,
            "moe_topk": 6,
            "num_attention_heads": 20,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 28,
            "num_key_value_heads": 20,
            "rope_theta": 5000000,
            "vocab_size": 100352,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0.dev0",
        "vision_config": {
            "_flash_attn_2_enabled": True,
            "architectures": ["AriaVisionModel"],
            "attention_heads": 16,
            "image_size": 980,
            "intermediate_size": 4304,
            "model_type": "idefics3_vision",
            "num_hidden_layers": 27,
            "patch_size": 14,
            "torch_dtype": "bfloat16",
        },
        "vision_feature_layer": -1,
    }


def original(**text: Any) -> Json:
    """The fields that the original revision, the base models, Chat and sequential_mlp share."""
    data = today()
    for key in ("_name_or_path", "initializer_range", "pad_token_id", "vision_feature_layer"):
        del data[key]
    data["auto_map"] = {"AutoConfig": "modeling_aria.AriaConfig"}
    data["text_config"] |= {
        "model_type": "aria_moe_lm",
        "intermediate_size": 13568,
        "moe_intermediate_size": 1664,
        **text,
    }
    del data["vision_config"]["attention_heads"]
    data["vision_config"] |= {"hidden_size": 1152, "num_attention_heads": 16, "model_type": "aria_vision_model"}
    return data


def longer_context(theta: float = 5_000_000.0, positions: int = 65536) -> AriaConfig:
    text = dataclasses.replace(TextConfig(), rope_theta=theta, max_position_embeddings=positions)
    return dataclasses.replace(AriaConfig.aria(), text=text)


PUBLISHED: dict[str, tuple[Json, AriaConfig]] = {
    "Aria": (today(), AriaConfig.aria()),
    "Aria-Chat": (original(moe_grouped_gemm=True, max_position_embeddings=8192), longer_context(positions=8192)),
    "Aria-Base-8K": (
        original(rope_theta=100000) | {"_attn_implementation": "flash_attention_2"},
        longer_context(theta=100_000.0),
    ),
    "Aria-Base-64K": (original(moe_grouped_gemm=True), AriaConfig.aria()),
    "Aria-sequential_mlp": (original() | {"_attn_implementation": "flash_attention_2"}, AriaConfig.aria()),
    "Aria-torchao-int8wo": (
        original() | {"_name_or_path": "./", "do_sample": None, "temperature": None},
        AriaConfig.aria(),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants(name):
    data, expected = PUBLISHED[name]
    before = copy.deepcopy(data)
    assert AriaConfig.from_dict(data) == expected
    assert data == before, "reading changed its input"


def test_published_values():
    config = AriaConfig.from_dict(today())
    vision, projector, text = config.vision, config.projector, config.text
    assert (vision.hidden_size, vision.num_attention_heads, vision.head_dim) == (1152, 16, 72)
    assert (vision.num_hidden_layers, vision.intermediate_size, vision.layer_norm_eps) == (27, 4304, 1e-6)
    assert (vision.image_size, vision.patch_size, vision.patches_per_side) == (980, 14, 70)
    assert (projector.hidden_size, projector.output_size, projector.num_queries) == (1152, 2560, 256)
    assert (projector.num_attention_heads, projector.layer_norm_eps) == (16, 1e-5)
    assert (text.intermediate_size, text.shared_size, text.moe_num_shared_experts) == (1664, 3328, 2)
    assert (text.head_dim, text.num_key_value_heads, text.rms_norm_eps) == (128, 20, 1e-6)
    assert (config.image_token_index, config.pad_token_id, config.dtype) == (9, 2, torch.bfloat16)
    assert config.image_sizes() == {490: 128, 980: 256}


def test_the_unused_width_is_never_the_expert_width():
    assert AriaConfig.from_dict(original()).text.intermediate_size == 1664
    assert AriaConfig.from_dict(original(intermediate_size=1)).text.intermediate_size == 1664
    without = original()
    del without["text_config"]["moe_intermediate_size"]
    assert AriaConfig.from_dict(without).text.intermediate_size == 13568


def test_attention_heads_of_vision_is_ignored():
    data = today()
    data["vision_config"]["attention_heads"] = 8
    assert AriaConfig.from_dict(data).vision.num_attention_heads == 16
    data["vision_config"]["num_attention_heads"] = 8
    assert AriaConfig.from_dict(data).vision.num_attention_heads == 8


def test_missing_and_null_values_are_the_published_ones():
    bare = {"model_type": "aria", "text_config": {}, "vision_config": {}}
    assert AriaConfig.from_dict(bare) == AriaConfig.aria()
    nulls = {
        **dict.fromkeys(("projector_patch_to_query_dict", "image_token_index", "torch_dtype", "vision_feature_layer")),
        **bare,
        "text_config": dict.fromkeys(("num_key_value_heads", "head_dim", "moe_num_shared_experts", "rope_scaling")),
        "vision_config": dict.fromkeys(("hidden_size", "layer_norm_eps", "hidden_act")),
    }
    assert AriaConfig.from_dict(nulls) == AriaConfig.aria()
    assert AriaConfig.from_dict({**bare, "pad_token_id": None}).pad_token_id is None
    assert AriaConfig.from_dict({**bare, "text_config": {"pad_token_id": 0}}).pad_token_id == 0


def test_derived_text_values():
    data = today()
    data["text_config"] |= {"hidden_size": 640, "num_attention_heads": 10}
    del data["text_config"]["num_key_value_heads"], data["text_config"]["moe_topk"]
    text = AriaConfig.from_dict(data).text
    assert (text.head_dim, text.num_key_value_heads, text.moe_topk) == (64, 10, 6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 250000},
        {"rope_theta": 250000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 250000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 250000.0}, "rope_theta": 250000.0},
        {"rope_theta": 250000, "rope_scaling": {"type": "default"}},
    ],
)
def test_spellings_of_rope(rope):
    data = today()
    del data["text_config"]["rope_theta"]
    data["text_config"] |= rope
    assert AriaConfig.from_dict(data).text.rope_theta == 250_000.0


@pytest.mark.parametrize("dtype", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_spellings_of_dtype(dtype):
    data = today()
    del data["torch_dtype"]
    assert AriaConfig.from_dict(data | dtype).dtype is torch.float16


def test_image_token_of_transformers_5():
    data = today()
    del data["image_token_index"]
    assert AriaConfig.from_dict(data | {"image_token_id": 11}).image_token_index == 11


def test_parse_dtype():
    assert parse_dtype(torch.float64) is torch.float64
    assert parse_dtype("torch.bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int3'; expected one of bfloat16"):
        parse_dtype("int3")


def test_counts():
    config = AriaConfig.aria()
    assert config.num_parameters() == 25_307_308_912
    assert config.active_parameters() == 3_858_250_240
    assert config.cache_bytes_per_token() == config.cache_bytes_per_token("bfloat16") == 286_720
    assert config.cache_bytes_per_token(torch.float32) == 2 * 286_720
    parts = config.parameters_by_part()
    assert parts["vision encoder"] + parts["projector"] == 438_217_072
    assert parts["token embedding"] == parts["language head"] == 256_901_120
    assert parts["decoder, routed experts"] == 28 * 817_889_280
    assert sum(parts.values()) == config.num_parameters()


def test_to_dict_round_trip(tmp_path):
    for name, config in {"aria": AriaConfig.aria(), "tiny": tiny_config(key_value_heads=2)}.items():
        assert AriaConfig.from_dict(config.to_dict()) == config
        config.save_pretrained(tmp_path / "made" / name)
        assert AriaConfig.from_pretrained(tmp_path / "made" / name) == config
        assert AriaConfig.from_pretrained(str(tmp_path / "made" / name / "config.json")) == config
    written = json.loads((tmp_path / "made" / "aria" / "config.json").read_text(encoding="utf-8"))
    assert written["projector_patch_to_query_dict"] == {"1225": 128, "4900": 256}


def assert_same_as_transformers(ours: AriaConfig, theirs: Any) -> None:
    for f in dataclasses.fields(ours.vision):
        assert getattr(theirs.vision_config, f.name) == getattr(ours.vision, f.name), f.name
    for f in dataclasses.fields(ours.text):
        if f.name != "rope_theta":
            assert getattr(theirs.text_config, f.name) == getattr(ours.text, f.name), f.name
    rope = theirs.text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"]) == (ours.text.rope_theta, "default")
    assert theirs.projector_patch_to_query_dict == ours.projector.patch_to_query
    assert theirs.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert theirs.vision_feature_layer == -1
    assert theirs.image_token_index == ours.image_token_index
    assert theirs.pad_token_id == ours.pad_token_id
    assert theirs.dtype == ours.dtype
    assert not theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "config",
    [longer_context(theta=100_000.0), dataclasses.replace(tiny_config(key_value_heads=2), image_token_index=13)],
    ids=["published", "tiny"],
)
def test_transformers_reads_our_files_and_we_read_its_files(tmp_path, config):
    config.save_pretrained(tmp_path / "ours")
    theirs = transformers.AriaConfig.from_pretrained(tmp_path / "ours")
    assert_same_as_transformers(config, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert AriaConfig.from_pretrained(tmp_path / "theirs") == config


def changed(data: Json, part: str | None, **fields: Any) -> Json:
    (data if part is None else data[part]).update(fields)
    return data


REFUSED: dict[str, tuple[str | None, Json, str]] = {
    "another model": (None, {"model_type": "llava"}, "not a configuration of Aria: model_type is 'llava'"),
    "no model type": (None, {"model_type": None}, "model_type is None, expected 'aria'"),
    "no text": (None, {"text_config": None}, "text_config should be an object, but is None"),
    "no vision": (None, {"vision_config": "siglip"}, "vision_config should be an object, but is 'siglip'"),
    "tied embeddings": (None, {"tie_word_embeddings": True}, "tie_word_embeddings of the model is True, but Aria"),
    "another vision layer": (None, {"vision_feature_layer": -2}, "vision_feature_layer of the model is -2"),
    "another encoder": ("vision_config", {"model_type": "clip_vision_model"}, "'clip_vision_model', expected one of"),
    "another encoder's act": ("vision_config", {"hidden_act": "gelu"}, "hidden_act of the vision encoder is 'gelu'"),
    "another decoder": ("text_config", {"model_type": "llama"}, "text_config.model_type is 'llama', expected one of"),
    "another decoder's act": ("text_config", {"hidden_act": "relu"}, "hidden_act of the decoder is 'relu'"),
    "attention bias": ("text_config", {"attention_bias": True}, "attention_bias of the decoder is True"),
    "mlp bias": ("text_config", {"mlp_bias": True}, "mlp_bias of the decoder is True"),
    "rope scaling": ("text_config", {"rope_scaling": {"type": "linear", "factor": 2}}, "rotary scaling .*'linear'"),
    "rope parameters": ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling .*'yarn'"),
    "rope of no kind": ("text_config", {"rope_parameters": [5e6]}, "rope_parameters should be an object"),
    "table of pairs": (None, {"projector_patch_to_query_dict": [[1225, 128]]}, "should map patches to queries"),
    "table of words": (None, {"projector_patch_to_query_dict": {"all": 128}}, "should map patches to queries"),
    "table not square": (None, {"projector_patch_to_query_dict": {"1000": 128}}, "square numbers of patches"),
    "table of nothing": (None, {"projector_patch_to_query_dict": {"1225": 0}}, "square numbers of patches"),
    "crops over the grid": (
        None,
        {"projector_patch_to_query_dict": {"5041": 128}},
        r"crops of 5041 patches are larger than the grid of 70\^2",
    ),
    "dtype": (None, {"torch_dtype": "fp9"}, "unknown dtype 'fp9'"),
    "text for a number": (
        "text_config",
        {"hidden_size": "2560"},
        "hidden_size should be a whole number, but is '2560'",
    ),
    "yes for a number": ("text_config", {"moe_topk": True}, "moe_topk should be a whole number, but is True"),
    "below nothing": ("vision_config", {"num_hidden_layers": -1}, "num_hidden_layers should be a whole number"),
    "a fraction": ("vision_config", {"patch_size": 14.5}, "patch_size should be a whole number, but is 14.5"),
    "eps of 0": ("text_config", {"rms_norm_eps": 0}, "rms_norm_eps should be a number above 0, but is 0"),
    "theta in words": ("text_config", {"rope_theta": "5M"}, "rope_theta should be a number above 0, but is '5M'"),
    "no layers": ("text_config", {"num_hidden_layers": 0}, "text.num_hidden_layers should be above 0, but is 0"),
    "no heads": ("text_config", {"num_attention_heads": 0}, "num_attention_heads should be above 0"),
    "vision heads": ("vision_config", {"num_attention_heads": 7}, "vision.hidden_size 1152 does not divide over 7"),
    "grouped heads": ("text_config", {"num_key_value_heads": 3}, "20 attention heads do not divide over 3"),
    "more than all experts": (
        "text_config",
        {"moe_topk": 65, "num_experts_per_tok": 65},
        "moe_topk 65 is more than the number of experts, 64",
    ),
    "two answers": ("text_config", {"num_experts_per_tok": 2}, "moe_topk is 6, but num_experts_per_tok is 2"),
    "no number": ("text_config", {"rope_theta": float("nan")}, r"rope_theta (should be a number above 0, but )?is nan"),
    "sliding window": ("text_config", {"sliding_window": 4096}, "sliding_window of the decoder is 4096"),
    "picture token far off": (None, {"image_token_index": 10**9}, "is not in the vocabulary of 100352"),
    "odd heads": ("text_config", {"head_dim": 127}, "head_dim 127 is odd"),
    "layers too large": ("text_config", {"num_hidden_layers": 10**9}, r"text\.num_hidden_layers .*at most 512, but"),
    "vision layers too large": ("vision_config", {"num_hidden_layers": 10**9}, r"vision\.num_hidden_layers"),
    "experts too large": ("text_config", {"moe_num_experts": 10**9}, r"text\.moe_num_experts .* but is 1000000000"),
    "many experts in many layers": (
        "text_config",
        {"moe_num_experts": 4096, "num_hidden_layers": 512},
        "moe_num_experts 4096 make 2,097,152 experts",
    ),
    "width too large": ("text_config", {"hidden_size": 10**9}, r"text\.hidden_size should be at most"),
    "experts' width too large": ("text_config", {"intermediate_size": 10**30}, r"text\.intermediate_size"),
    "pictures too large": ("vision_config", {"image_size": 10**9}, r"vision\.image_size should be at most 4,096"),
    "context too large": ("text_config", {"max_position_embeddings": 10**18}, r"text\.max_position_embeddings"),
    "vocabulary too large": ("text_config", {"vocab_size": 10**12}, r"text\.vocab_size should be at most"),
    "parameters too large": (
        "text_config",
        {"hidden_size": 1 << 17, "intermediate_size": 1 << 20, "moe_intermediate_size": None, "head_dim": 128},
        r"parameters is too large; at most 1e\+13 .*hidden_size 131,072",
    ),
    "theta beyond floats": ("text_config", {"rope_theta": 10**400}, "rope_theta .*1000000"),
    "eps of one million": ("text_config", {"rms_norm_eps": 1e6}, r"text\.rms_norm_eps should be at most 1\.0"),
    "queries too large": (None, {"projector_patch_to_query_dict": {"1225": 10**9}}, "to 1 to 65,536 queries"),
    "fractions of queries": (None, {"projector_patch_to_query_dict": {"1225": 1.5}}, "should map patches to queries"),
    "yes for queries": (None, {"projector_patch_to_query_dict": {"1225": True}}, "should map patches to queries"),
    "pad token far off": (None, {"pad_token_id": 10**9}, "pad_token_id 1000000000 is not in the vocabulary"),
    "pad token": (None, {"pad_token_id": "<pad>"}, "pad_token_id should be a whole number, but is '<pad>'"),
    "image token": (None, {"image_token_index": "<|img|>"}, "image_token_index should be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rejected(tmp_path, name):
    part, fields, message = REFUSED[name]
    data = changed(today(), part, **fields)
    with pytest.raises(ValueError, match=message):
        AriaConfig.from_dict(data)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refusal:
        AriaConfig.from_pretrained(tmp_path)
    assert str(file) in str(refusal.value), "the message should name the file"


def test_rejected_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        AriaConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; a model folder needs one"):
        AriaConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision='main' is for Hub repositories"):
        AriaConfig.from_pretrained(tmp_path, revision="main")
    for content, message in ((b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "holds a list")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            AriaConfig.from_pretrained(tmp_path)


def test_constructed_configurations_are_checked_too():
    with pytest.raises(ValueError, match="square numbers of patches"):
        AriaConfig(projector=ProjectorConfig(patch_to_query={}))
    with pytest.raises(ValueError, match=r"vision\.patch_size should be above 0"):
        AriaConfig(vision=VisionConfig(patch_size=0))
    with pytest.raises(ValueError, match=r"a crop of 100 patches has no entry .* \{1225: 128, 4900: 256\}"):
        ProjectorConfig().queries_for(100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AriaConfig.aria().text.hidden_size = 1  # type: ignore[misc]
