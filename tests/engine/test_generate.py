"""`generate`: tokens as transformers gives them, sampling, stop texts, batches."""

from __future__ import annotations

import pytest
import torch

from aria.pretrained import AriaForConditionalGeneration, read_generation_config
from tests.helpers.model_inputs import crops, ids, left_padded

BATCH = {
    "one text": lambda: left_padded([ids(9)]),
    "several lengths": lambda: left_padded([ids(5), ids(31, seed=1), ids(1, seed=2)]),
    "different numbers of images": lambda: (
        left_padded([ids(3, [128], 5, [128], 2), ids(7, seed=1), ids(1, [128], 11, seed=2)])
        | crops(490, [(490, 490), (336, 490), (490, 367)])
    ),
}


@pytest.mark.parametrize("name", BATCH)
def test_greedy_tokens_equal_transformers_over_64_steps(pair, name):
    ours, theirs = pair
    inputs = BATCH[name]()
    expected = theirs.generate(
        **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2,
        suppress_tokens=[9],
    )  # fmt: skip
    got = ours.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert got.shape == expected.shape == (len(inputs["input_ids"]), inputs["input_ids"].shape[1] + 64)
    assert torch.equal(got, expected)


def test_image_token_is_never_generated(pair):
    ours, _ = pair
    with torch.no_grad():
        head = ours.model.language_model.lm_head.weight
        before = head.clone()
        head[9] = head.mean(0) * 50
        tokens = ours.generate(
            **left_padded([ids(5), ids(8)]), max_new_tokens=20, do_sample=True, seed=1, eos_token_id=None
        )
        logits = ours(**left_padded([ids(5)])).logits
        head.copy_(before)
    assert (tokens != 9).all()
    assert logits.shape[-1] == 300


def test_ends_at_the_end_token_and_pads_the_rest(pair):
    ours, _ = pair
    inputs = left_padded([ids(5), ids(31, seed=1)])
    free = ours.generate(**inputs, max_new_tokens=30, eos_token_id=None)[:, 31:]
    end = int(free[0, 4])
    place = [row.tolist().index(end) if end in row else 29 for row in free]
    assert place[0] <= 4
    got = ours.generate(**inputs, max_new_tokens=30, eos_token_id=[end], pad_token_id=77)[:, 31:]
    for row, expected, last in zip(got, free, place, strict=True):
        assert row[: last + 1].tolist() == expected[: last + 1].tolist()
        assert (row[last + 1 :] == 77).all()


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(pair):
    ours, _ = pair
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.3, "seed": 11, "eos_token_id": None}
    alone = ours.generate(**left_padded([ids(5)]), **settings)[:, -20:]
    batch = ours.generate(**left_padded([ids(5), ids(31, seed=1)]), **settings)[:, -20:]
    assert torch.equal(alone[0], batch[0])
    other = ours.generate(**left_padded([ids(5)]), **(settings | {"seed": 12}))[:, -20:]
    assert not torch.equal(alone, other)


def test_torch_seed_makes_unseeded_sampling_repeatable(pair):
    ours, _ = pair
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(ours.generate(**left_padded([ids(5)]), max_new_tokens=20, do_sample=True, eos_token_id=None))
    assert torch.equal(*runs)


def test_several_answers_to_one_prompt_are_adjacent_and_differ(pair):
    ours, _ = pair
    inputs = left_padded([ids(5), ids(9, seed=1)])
    got = ours.generate(**inputs, max_new_tokens=12, do_sample=True, seed=3, num_return_sequences=3, eos_token_id=None)
    assert got.shape == (6, 9 + 12)
    assert torch.equal(got[:, :9], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in got[:, 9:].tolist()}) == 6
    first = ours.generate(**inputs, max_new_tokens=12, do_sample=True, seed=3, eos_token_id=None)
    assert torch.equal(first, got[[0, 3]])


def test_truncations_keep_only_likely_tokens(pair):
    ours, _ = pair
    inputs = left_padded([ids(5)])
    greedy = ours.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    for setting in ({"top_k": 1}, {"top_p": 1e-9}):
        got = ours.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0, eos_token_id=None, **setting)
        assert torch.equal(got, greedy), setting


def test_a_streamer_receives_the_prompt_then_each_token(pair):
    class Record:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    ours, _ = pair
    record = Record()
    got = ours.generate(**left_padded([ids(5)]), max_new_tokens=6, eos_token_id=None, streamer=record)
    assert record.ended
    assert record.values[0].tolist() == got[:, :5].tolist()
    assert [int(value) for value in record.values[1:]] == got[0, 5:].tolist()


@pytest.mark.slow
def test_never_past_the_context_length(pair):
    ours, _ = pair
    got = ours.generate(**left_padded([ids(4090)]), max_new_tokens=50, eos_token_id=None)
    assert got.shape[1] == 4096
    with pytest.raises(ValueError, match="no room"):
        ours.generate(**left_padded([ids(4096)]), max_new_tokens=1)


def test_generation_config_is_followed_and_arguments_win(pair):
    ours, _ = pair
    inputs = left_padded([ids(5)])
    model = AriaForConditionalGeneration(
        ours.model, {"max_new_tokens": 3, "do_sample": True, "top_k": 1, "eos_token_id": None}
    )
    assert model.generate(**inputs, eos_token_id=None).shape[1] == 8
    assert model.generate(**inputs, max_new_tokens=4, eos_token_id=None).shape[1] == 9
    first = int(ours.generate(**inputs, max_new_tokens=1, eos_token_id=None)[0, -1])
    model = AriaForConditionalGeneration(ours.model, {"eos_token_id": first})
    assert model.generate(**inputs, max_new_tokens=9).shape[1] == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"do_sample": True, "temperature": 2.5}, "temperature is 2.5; expected a number from 0 to 2"),
        ({"do_sample": True, "top_p": -0.1}, "top_p is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number, at least 1"),
        ({"num_return_sequences": 0}, "n is 0"),
        ({"stop_strings": ["x"]}, "tokenizer=processor.tokenizer"),
        ({"num_beams": 4}, "num_beams=4 is not supported: there is no beam search"),
        ({"temperature": 5.0}, "temperature is 5.0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"streamer": object(), "num_return_sequences": 2}, "one sequence"),
    ],
)
def test_settings_out_of_range_are_rejected(pair, setting, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(**left_padded([ids(5)]), **setting)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[5, 300]]), "range from 5 to 300, but the vocabulary from 0 to 299"),
        (torch.tensor([[-1, 5]]), "range from -1 to 5"),
        (torch.tensor([5, 6]), r"should be \(batch, tokens\)"),
        ([[5, 6]], "should be a tensor, but is list"),
    ],
)
def test_ids_outside_the_vocabulary_are_rejected(pair, given, message):
    with pytest.raises(ValueError, match=message):
        pair[0].generate(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "object"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'; expected a token id or a list of them"),
        ('{"eos_token_id": [2, true]}', "eos_token_id"),
        ('{"do_sample": 1}', "do_sample is 1; expected true or false"),
    ],
)
def test_an_invalid_generation_config_is_named(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_generation_config(tmp_path)
    assert "generation_config.json" in str(error.value)


def test_settings_without_effect_are_named_in_a_warning(tmp_path):
    content = '{"bos_token_id": 1, "eos_token_id": [2, 7], "typical_p": 0.5, "num_beams": 1, "top_k": null}'
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.warns(UserWarning, match="settings without effect: typical_p$"):
        settings = read_generation_config(tmp_path)
    assert settings["eos_token_id"] == [2, 7]
    assert "top_k" not in settings
    (tmp_path / "nothing").mkdir()
    assert read_generation_config(tmp_path / "nothing") == {}


def test_unknown_settings_are_rejected_by_name(pair):
    with pytest.raises(TypeError, match="max_new_token"):
        pair[0].generate(**left_padded([ids(5)]), max_new_token=4)
