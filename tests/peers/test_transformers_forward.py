"""`forward`, its output and the configuration, against transformers' own Aria on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import convert_to_fp32

from tests.helpers.model_inputs import CASES, TOLERANCE

PADDED = "text, left-padded batch"


def same_where_real(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> None:
    """Check equality on tokens; on padding ours are zeros, and transformers' are arbitrary."""
    assert got.shape == expected.shape
    assert torch.allclose(got[mask], expected[mask], atol=TOLERANCE, rtol=TOLERANCE)
    assert not got[~mask].any()


@pytest.mark.parametrize("name", [PADDED, "pictures in several prompts"])
def test_hidden_states(pair, name) -> None:
    ours, theirs = pair
    inputs = CASES[name]()
    with torch.no_grad():
        got = ours(**inputs, output_hidden_states=True)
        expected = theirs(**inputs, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states) == ours.config.text_config.num_hidden_layers + 1
    for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        same_where_real(one, other, inputs["attention_mask"].bool())
    assert ours(**inputs).hidden_states is None


KEEP = {"all": 0, "the last": 1, "five": 5, "more than there are": 99, "chosen": torch.tensor([30, 3, 30])}


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("with_labels", [False, True])
def test_logits_to_keep(pair, name, with_labels) -> None:
    ours, theirs = pair
    inputs, keep = CASES[PADDED](), KEEP[name]
    labels = inputs["input_ids"] if with_labels else None
    with torch.no_grad():
        got = ours(**inputs, logits_to_keep=keep, labels=labels)
        expected = theirs(**inputs, logits_to_keep=keep).logits
        whole = ours(**inputs, labels=labels)
    mask = inputs["attention_mask"].bool()
    kept = mask[:, keep] if isinstance(keep, torch.Tensor) else mask[:, -keep:]
    same_where_real(got.logits, expected, kept)
    assert (got.loss is None) == (labels is None)
    assert labels is None or torch.equal(got.loss, whole.loss)


@pytest.mark.parametrize("keep", [-1, True, 1.0, torch.tensor(3), torch.tensor([1.0])])
def test_invalid_logits_to_keep_is_refused(pair, keep) -> None:
    with pytest.raises(ValueError, match="logits_to_keep should be"):
        pair[0](**CASES[PADDED](), logits_to_keep=keep)


def test_embeddings_equal_transformers(pair) -> None:
    ours, theirs = pair
    ids = CASES[PADDED]()["input_ids"]
    assert torch.equal(ours.get_input_embeddings()(ids), theirs.get_input_embeddings()(ids))
    assert torch.equal(ours.get_output_embeddings().weight, theirs.get_output_embeddings().weight)


def test_configuration_has_transformers_names(pair) -> None:
    ours, theirs = pair[0].config, pair[1].config
    for name in ("model_type", "image_token_id", "image_token_index", "pad_token_id", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for ours_part, theirs_part, names in (
        (ours.text_config, theirs.text_config, ("vocab_size", "hidden_size", "intermediate_size", "moe_topk")),
        (ours.text_config, theirs.text_config, ("moe_num_experts", "moe_num_shared_experts", "head_dim", "model_type")),
        (ours.text_config, theirs.text_config, ("num_hidden_layers", "num_attention_heads", "rms_norm_eps")),
        (ours.text_config, theirs.text_config, ("num_key_value_heads", "max_position_embeddings")),
        (ours.vision_config, theirs.vision_config, ("hidden_size", "image_size", "patch_size", "num_hidden_layers")),
        (ours.vision_config, theirs.vision_config, ("num_attention_heads", "model_type")),
    ):
        for name in names:
            assert getattr(ours_part, name) == getattr(theirs_part, name), name
    assert ours.get_text_config() is ours.text_config and ours.text_config.num_experts_per_tok == 3
    table = {int(patches): queries for patches, queries in theirs.projector_patch_to_query_dict.items()}
    assert ours.projector_patch_to_query_dict == table


@pytest.mark.parametrize("more", [{}, {"labels": True}, {"labels": True, "output_hidden_states": True}])
def test_outputs_are_accessed_as_in_transformers(pair, more) -> None:
    inputs = CASES["text only"]()
    if "labels" in more:
        more = {**more, "labels": inputs["input_ids"]}
    with torch.no_grad():
        got, expected = (model(**inputs, **more, use_cache=False) for model in pair)
        as_tuple = pair[0](**inputs, **more, return_dict=False)
    assert list(got) == list(got.keys()) == list(expected.keys())
    assert len(got) == len(expected) == len(as_tuple) and isinstance(got, dict)
    for place, name in enumerate(expected.keys()):
        assert name in got and got[place] is got[name] is getattr(got, name) is got.to_tuple()[place]
        assert got[-1] is got.to_tuple()[-1] and len(got[:2]) == len(expected[:2]) and len(got[1:]) == len(expected[1:])
    assert "loss" in got if "labels" in more else got.loss is expected.loss is None
    assert torch.allclose(got[0], expected[0], atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(KeyError):
        got["router_logits"]


def test_accelerate_rebuilds_outputs_from_mappings(pair) -> None:
    ours, _ = pair
    inputs = CASES["text only"]()
    labels = inputs["input_ids"]
    low = ours(**inputs, labels=labels, output_hidden_states=True)
    low.logits = low.logits.to(torch.bfloat16)
    again = convert_to_fp32(low)
    assert type(again) is type(low) and again.logits.dtype == torch.float32 and torch.equal(again.loss, low.loss)
    assert isinstance(again.hidden_states, tuple) and len(again.hidden_states) == 4
    try:
        wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(ours))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    output = wrapped(**inputs, labels=labels)
    assert output.logits.dtype == torch.float32 and output[0] is output.loss and output.loss.requires_grad
