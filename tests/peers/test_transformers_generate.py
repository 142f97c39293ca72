"""`generate` with transformers' arguments, against transformers' own Aria on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TypicalLogitsWarper,
)

from aria import AriaForConditionalGeneration
from aria.engine.lockstep import Lockstep
from tests.helpers.model_inputs import crops, ids, left_padded

IMAGE = 9
ONE = left_padded([ids(9)])
EVEN = left_padded([ids(12), ids(12, seed=1), ids(12, seed=2)])
PADDED = left_padded([ids(5), ids(31, seed=1), ids(1, seed=2)])
IMAGES = left_padded([ids(3, [128], 5), ids(7, seed=1)]) | crops(490, [(490, 490)])


class Upwards(LogitsProcessor):
    """Needs the whole batch: no two sequences may choose the same next token, nor any last token."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, input_ids[:, -1]] = float("-inf")
            scores[row, scores[:row].argmax(-1)] = float("-inf")
        return scores


class AfterTwice(StoppingCriteria):
    """Ends a sequence once a new token repeats."""

    def __init__(self, prompt: int):
        self.prompt = prompt

    def __call__(self, input_ids, scores, **kwargs):
        new = input_ids[:, self.prompt :].tolist()
        return torch.tensor([len(set(row)) < len(row) for row in new])


def end_of(pair, inputs, at: int) -> int:
    """Return a token that the first sequence generates."""
    new = pair[0].generate(**inputs, max_new_tokens=at + 1, eos_token_id=None)
    return int(new[0, inputs["input_ids"].shape[1] + at])


S = EVEN["input_ids"].shape[1]
MATRIX = {
    "max_length": (EVEN, {"max_length": S + 5}),
    "max_length, padded": (PADDED, {"max_length": 36}),
    "max_new_tokens over max_length": (EVEN, {"max_length": 3 * S, "max_new_tokens": 4}),
    "repetition_penalty": (EVEN, {"repetition_penalty": 1.7}),
    "repetition_penalty, pictures": (IMAGES, {"repetition_penalty": 0.8}),
    "no_repeat_ngram_size": (EVEN, {"no_repeat_ngram_size": 2}),
    "no_repeat_ngram_size of 1": (PADDED, {"no_repeat_ngram_size": 1}),
    "bad_words_ids": (EVEN, {"bad_words_ids": [[46], [20, 21], [200]]}),
    "suppress_tokens": (PADDED, {"suppress_tokens": [IMAGE, 20, 46, 200]}),
    "begin_suppress_tokens": (EVEN, {"begin_suppress_tokens": list(range(100, 250))}),
    "prefix_allowed_tokens_fn": (EVEN, {"prefix_allowed_tokens_fn": lambda row, ids: [30 + row, 40 + len(ids), 50]}),
    "logits_processor": (EVEN, {"logits_processor": LogitsProcessorList([Upwards()])}),
    "logits_processor, padded": (PADDED, {"logits_processor": [Upwards(), RepetitionPenaltyLogitsProcessor(1.4)]}),
    "no logits_processor": (EVEN, {"logits_processor": LogitsProcessorList([])}),
    "stopping_criteria": (EVEN, {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(S + 3)])}),
    "stopping_criteria of each": (EVEN, {"stopping_criteria": [AfterTwice(S)], "pad_token_id": 77}),
    "max_time": (EVEN, {"max_time": 0.0}),
    "use_cache": (PADDED, {"use_cache": False}),
    "without effect": (
        EVEN, {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "cache_implementation": "dynamic"},
    ),
    "several answers": (EVEN, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}),
    "generation_config": (PADDED, {"generation_config": {"max_new_tokens": 7, "repetition_penalty": 1.2}}),
    "arguments before generation_config": (
        EVEN, {"generation_config": {"max_new_tokens": 7, "do_sample": True}, "max_new_tokens": 4, "do_sample": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRIX)
def test_tokens_equal_transformers(pair, name) -> None:
    ours, theirs = pair
    inputs, settings = MATRIX[name]
    common = {"eos_token_id": None, "pad_token_id": 2} if "generation_config" not in settings else {}
    if not {"max_length", "generation_config"} & settings.keys():
        common["max_new_tokens"] = 12
    expected_settings = {"suppress_tokens": [IMAGE], "do_sample": False, **common, **settings}
    if config := settings.get("generation_config"):
        config = GenerationConfig(**config, eos_token_id=None, pad_token_id=2)
        expected_settings["generation_config"] = settings["generation_config"] = config
        theirs.generation_config.eos_token_id = None
        common["eos_token_id"] = None
    got, expected = ours.generate(**inputs, **{**common, **settings}), theirs.generate(**inputs, **expected_settings)
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:at least", "ignore:Unfeasible length")
@pytest.mark.parametrize("inputs", [EVEN, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("least", [{}, {"min_new_tokens": 8}, {"min_length": 38}], ids=str)
def test_end_tokens_equal_transformers(pair, inputs, least) -> None:
    ours, theirs = pair
    end = end_of(pair, inputs, 3)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 77, **least}
    expected = theirs.generate(**inputs, **settings, eos_token_id=[end, 2], suppress_tokens=[IMAGE])
    for forms in ([end, 2], (2, end), torch.tensor([end, 2]), [torch.tensor(end), torch.tensor([2])],
                  np.array([end, 2]), [np.int64(end), 2]):  # fmt: skip
        assert torch.equal(ours.generate(**inputs, **settings, eos_token_id=forms), expected)
    together = ours.generate(**inputs, **settings, eos_token_id=[end, 2], stopping_criteria=[lambda ids, scores: False])
    assert torch.equal(together, expected)
    alone = theirs.generate(**ONE, **settings, eos_token_id=end_of(pair, ONE, 2), suppress_tokens=[IMAGE])
    for form in (torch.tensor(end_of(pair, ONE, 2)), np.int64(end_of(pair, ONE, 2)), end_of(pair, ONE, 2)):
        assert torch.equal(ours.generate(**ONE, **settings, eos_token_id=form), alone)


@pytest.mark.parametrize(
    "value", ["<|im_end|>", True, [2, False], 2.0, [2.5], torch.tensor([1.0]), torch.tensor([True])]
)
def test_end_tokens_that_are_not_ids_are_refused(pair, value) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id is .*; expected a token id or a list of them"):
        pair[0].generate(**ONE, max_new_tokens=2, eos_token_id=value)
    with pytest.raises(ValueError, match="pad_token_id is "):
        pair[0].generate(**ONE, max_new_tokens=2, pad_token_id=value)


@pytest.mark.parametrize("value", [10**6, -1, [2, 300]])
def test_end_tokens_outside_the_vocabulary_are_refused(pair, value) -> None:
    with pytest.raises(ValueError, match=r"eos_token_id holds .*expected ids from 0 to 299, or None to continue"):
        pair[0].generate(**ONE, max_new_tokens=2, eos_token_id=value)


SCORED = {
    "greedy": (PADDED, {}),
    "pictures": (IMAGES, {}),
    "penalty": (EVEN, {"repetition_penalty": 1.7}),
    "least": (EVEN, {"min_new_tokens": 4}),
    "renormalized": (EVEN, {"renormalize_logits": True}),
    "processor": (EVEN, {"logits_processor": LogitsProcessorList([Upwards()])}),
}


@pytest.mark.parametrize("name", SCORED)
def test_scores_and_logits_equal_transformers(pair, name) -> None:
    ours, theirs = pair
    inputs, settings = SCORED[name]
    settings = {**settings, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "suppress_tokens": [IMAGE]}
    settings |= {"eos_token_id": end_of(pair, inputs, 2), "return_dict_in_generate": True}
    settings |= {"output_scores": True, "output_logits": True}
    got, expected = ours.generate(**inputs, **settings), theirs.generate(**inputs, **settings)
    assert torch.equal(got.sequences, expected.sequences) and torch.equal(got[0], got["sequences"])
    assert (
        len(got.scores)
        == len(got.logits)
        == len(expected.scores)
        == got.sequences.shape[1] - inputs["input_ids"].shape[1]
    )
    for one, other in zip((*got.scores, *got.logits), (*expected.scores, *expected.logits), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    one = torch.zeros(1, requires_grad=True) * got.scores[0].exp().sum()
    one.backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
    ],
    ids=str,
)
def test_sampling_distribution_equals_transformers(pair, settings) -> None:
    settings = {"top_k": 0, **settings, "max_new_tokens": 1, "do_sample": True, "suppress_tokens": [IMAGE]}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    got, expected = (model.generate(**PADDED, **settings).scores[0] for model in pair)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    drawn = pair[0].generate(**PADDED, **settings, num_return_sequences=40).sequences[:, -1].view(3, 40)
    assert (expected.gather(1, drawn) > float("-inf")).all()


def test_dict_output_without_scores(pair) -> None:
    got = pair[0].generate(**EVEN, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(got.sequences, pair[0].generate(**EVEN, max_new_tokens=4))
    assert got.scores is None and got.logits is None and list(got) == ["sequences"]
    plain = pair[0].generate(**EVEN, max_new_tokens=4, output_scores=True)
    assert torch.equal(plain, got.sequences), (
        "without return_dict_in_generate only tokens are returned, as in transformers"
    )


def test_callbacks_see_the_same_if_prefills_end_at_different_steps(pair, monkeypatch) -> None:
    ours, _ = pair
    settings = {
        "max_new_tokens": 8,
        "repetition_penalty": 1.2,
        "pad_token_id": 77,
        "eos_token_id": end_of(pair, PADDED, 4),
    }
    settings |= {"logits_processor": [TypicalLogitsWarper(0.9)], "return_dict_in_generate": True, "output_scores": True}
    together = ours.generate(**PADDED, **settings)
    engine, ahead = AriaForConditionalGeneration._engine, []

    def slow(self, lengths, generation):
        core = engine(self, lengths, generation)
        core.scheduler.step_tokens = core.scheduler.mixed_step_tokens = 16
        return core

    ids_at = Lockstep._ids_at
    monkeypatch.setattr(AriaForConditionalGeneration, "_engine", slow)
    monkeypatch.setattr(Lockstep, "_ids_at", lambda self, step: ahead.append(step > self.new) or ids_at(self, step))
    apart = ours.generate(**PADDED, **settings)
    assert any(ahead), "some sequences should be ahead of others"
    assert torch.equal(apart.sequences, together.sequences)
    for one, other in zip(apart.scores, together.scores, strict=True):
        torch.testing.assert_close(one[0], other[0])


def test_callback_errors_are_raised_to_the_caller(pair) -> None:
    def fails(input_ids, scores):
        raise KeyError("mine")

    for settings in ({"logits_processor": [fails]}, {"stopping_criteria": [fails]}):
        with pytest.raises(KeyError, match="mine"):
            pair[0].generate(**ONE, max_new_tokens=4, **settings)


def test_streamer_with_callbacks(pair) -> None:
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    got = pair[0].generate(**ONE, max_new_tokens=9, streamer=streamer, stopping_criteria=[MaxLengthCriteria(9 + 4)])
    assert got.shape[1] == 13 and streamer.tokens == got[0].tolist() and streamer.ended


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 is not supported: there is no beam search.*num_return_sequences"),
        (
            {"typical_p": 0.9},
            "typical_p=0.9 is not supported: pass transformers' TypicalLogitsWarper in logits_processor",
        ),
        ({"output_attentions": True}, "output_attentions"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3 is not supported"),
        ({"generation_config": "greedy"}, "generation_config is str; expected a GenerationConfig or a mapping"),
        ({"max_length": 9}, "max_length is 9, but the prompt alone has 9 tokens"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"return_dict_in_generate": 1}, "return_dict_in_generate is 1; expected true or false"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"suppress_tokens": [300]}, "suppress_tokens holds 300"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, "allows no token for sequence 0"),
    ],
)
def test_unsupported_settings_are_refused_by_name(pair, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        pair[0].generate(**ONE, **settings)
