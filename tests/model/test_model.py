"""Our Aria against transformers' Aria, on the same random weights in float32."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from aria import ops
from aria.config import AriaConfig
from aria.model import Aria, Packed, pack_patches
from aria.model.patches import position_buckets
from aria.ops import Segments
from aria.pretrained import AriaForConditionalGeneration
from tests.helpers.model_inputs import CASES, TOLERANCE, crops, ids, left_padded
from tests.helpers.tiny import tiny_config, tiny_model, transformers_twin


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_logits_equal_transformers(pair, name, implementation):
    ours, theirs = pair
    inputs = CASES[name]()
    with torch.no_grad(), ops.use(implementation):
        got = ours(**inputs).logits
        expected = theirs(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert expected[real].std() > 0.1, "the weights are too small for a meaningful comparison"
    assert (got - expected)[real].abs().max() < TOLERANCE


def test_grouped_query_heads_equal_transformers(tmp_path):
    ours = AriaForConditionalGeneration(tiny_model(tiny_config(key_value_heads=2))).eval()
    ours.save_pretrained(tmp_path)
    inputs = left_padded([ids(5), ids(31, seed=1)])
    with torch.no_grad():
        difference = ours(**inputs).logits - transformers_twin(tmp_path)(**inputs).logits
    assert difference[inputs["attention_mask"].bool()].abs().max() < TOLERANCE


def test_no_pixel_mask_means_all_pixels(pair):
    ours, theirs = pair
    inputs = left_padded([ids(4, [128], 9)]) | {"pixel_values": crops(490, [(490, 490)])["pixel_values"]}
    with torch.no_grad():
        assert (ours(**inputs).logits - theirs(**inputs).logits).abs().max() < TOLERANCE


def test_padding_is_never_computed_and_has_no_effect():
    config = tiny_config()
    model = tiny_model(config)
    inputs = crops(490, [(336, 490), (490, 367)])
    packed = pack_patches(inputs["pixel_values"], inputs["pixel_mask"], config.vision)
    assert packed.segments.lengths == (24 * 35, 35 * 27)
    noise = inputs["pixel_values"].where(inputs["pixel_mask"][:, None], 7.0)
    # A patch with any real pixel is read as a whole, so noise starts after the last such patch.
    noise[0, :, 336:], noise[1, :, :, :378] = 7.0, inputs["pixel_values"][1, :, :, :378]
    with torch.no_grad():
        clean = model.encode_images(packed)
        dirty = model.encode_images(pack_patches(noise, inputs["pixel_mask"], config.vision))
    assert torch.equal(clean, dirty)


def test_vision_output_has_no_final_norm(pair):
    """A random post-LayerNorm in transformers' model does not change its features; ours has none."""
    ours, theirs = pair
    assert not any("post_layernorm" in name for name in ours.model.state_dict())
    inputs = crops(490, [(336, 490)])
    with torch.no_grad():
        theirs.model.vision_tower.post_layernorm.weight.normal_()
        expected = theirs.model.get_image_features(**inputs).pooler_output[0]
        theirs.model.vision_tower.post_layernorm.weight.zero_()
        got = ours.model.encode_images(pack_patches(**inputs, config=ours.config.vision))
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("per_side", [70, 32])
def test_position_buckets_equal_transformers_for_every_count(per_side):
    patch = 2
    config = transformers.Idefics3VisionConfig(
        hidden_size=1, num_attention_heads=1, image_size=per_side * patch, patch_size=patch
    )
    embeddings = Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(per_side**2, dtype=torch.float32)[:, None])
        for count in range(1, per_side + 1):
            mask = torch.zeros(1, per_side, per_side, dtype=torch.bool)
            mask[0, :count, :1] = True
            rows = embeddings(torch.zeros(1, 3, per_side * patch, per_side * patch), mask)[0, :, 0].view(per_side, -1)
            expected = (rows[:count, 0] / per_side).long().tolist()
            assert list(position_buckets(count, per_side)) == expected, f"{count} patches"


def test_position_buckets_differ_from_the_ideal_only_where_float32_does():
    differing = {
        count: [i for i in range(count) if position_buckets(count, 70)[i] != 70 * i // count] for count in range(1, 71)
    }
    assert {count: rows for count, rows in differing.items() if rows} == {
        25: [5, 10, 15, 20],
        49: [7, 14, 28, 35],
        50: [5, 10, 15, 20, 30, 40],
        55: [11, 22, 33, 44],
    }


def test_packed_sequences_equal_single_ones():
    config = tiny_config()
    model = tiny_model(config)
    prompts = [torch.tensor(ids(n, seed=n)) for n in (7, 1, 30)]
    with torch.no_grad():
        together = model(torch.cat(prompts), Packed(config.text, Segments.of([7, 1, 30]))).hidden
        alone = [model(prompt, Packed(config.text, Segments.of([len(prompt)]))).hidden for prompt in prompts]
    assert (together - torch.cat(alone)).abs().max() < TOLERANCE


def test_loss_excludes_padding_and_images(pair):
    ours, theirs = pair
    inputs = left_padded([ids(4, [128], 9), ids(20, seed=1)]) | crops(490, [(336, 490)])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected_labels = labels.masked_fill(labels == 9, -100)
    first = inputs["attention_mask"].argmax(1)
    expected_labels[torch.arange(2), first] = -100
    with torch.no_grad():
        got = ours(**inputs, labels=labels).loss
        expected = theirs(**inputs, labels=expected_labels).loss
    assert abs(got - expected) < TOLERANCE


def test_router_logits_on_request(pair):
    ours, theirs = pair
    inputs = left_padded([ids(11)])
    with torch.no_grad():
        assert ours(**inputs).router_logits is None
        got = ours(**inputs, output_router_logits=True).router_logits
        expected = theirs(**inputs, output_router_logits=True).router_logits
    assert len(got) == len(expected) == 3
    for mine, other in zip(got, expected, strict=True):
        assert (mine - other).abs().max() < TOLERANCE


def test_random_weights_are_seeded_for_every_parameter():
    config = tiny_config()
    first, again, other = (Aria.random(config, dtype=torch.float32, seed=seed) for seed in (3, 3, 4))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name
            assert abs(a.std() - 0.02) < 0.004, name
    assert sum(p.numel() for p in first.parameters()) == config.num_parameters()


def test_the_published_configuration_has_the_published_size():
    with torch.device("meta"):
        model = Aria(AriaConfig.aria())
    assert sum(p.numel() for p in model.parameters()) == 25_307_308_912 == AriaConfig.aria().num_parameters()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "128 image tokens, but there are no pixel_values"),
        ({"input_ids": torch.full((1, 141), 30)}, "0 image tokens, but 1 crops make 128 features"),
        ({"pixel_values": torch.zeros(1, 3, 491, 490)}, "multiples of 14"),
        ({"pixel_values": torch.zeros(1, 3, 476, 476), "pixel_mask": None}, "1156 patches has no entry"),
        ({"pixel_values": torch.zeros(1, 4, 490, 490)}, "pixel_values should be"),
        ({"pixel_mask": torch.zeros(1, 490, 490, dtype=torch.bool)}, "no real pixel"),
        ({"pixel_mask": torch.ones(1, 980, 980, dtype=torch.bool)}, "pixel_mask should be"),
        ({"attention_mask": torch.zeros(1, 141, dtype=torch.long)}, "only padding"),
        ({"attention_mask": torch.ones(1, 140, dtype=torch.long)}, "attention_mask should be"),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, "labels should be"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected(pair, change, message):
    inputs = left_padded([ids(4, [128], 9)]) | crops(490, [(336, 490)]) | change
    with pytest.raises(ValueError, match=message):
        pair[0](**inputs)
