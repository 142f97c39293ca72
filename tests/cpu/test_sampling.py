"""Drawing tokens, matching stop texts, and parameters out of their limits."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from aria.engine import SamplingParams
from aria.engine.outputs import StopMatcher
from aria.engine.sampler import Draw, noise_stream, sample

CPU = torch.device("cpu")


def drawn(logits: list[float], count: int = 4000, **settings) -> torch.Tensor:
    """How often each token is drawn, as a fraction."""
    noise = noise_stream(0, 0, CPU)
    scores = torch.tensor([logits])
    tokens = [int(sample(scores, [Draw(noise=noise, **settings)])) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def test_frequencies_are_those_of_the_softmax_at_the_temperature():
    logits = [1.0, 0.0, -1.0, 0.5]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        assert (drawn(logits, temperature=temperature) - expected).abs().max() < 0.03


def test_top_k_and_top_p_cut_the_tail_and_renormalise():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert (drawn(logits, temperature=1.0, top_k=2) - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03
    assert (drawn(logits, temperature=1.0, top_p=0.6) - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03
    assert (drawn(logits, temperature=1.0, top_p=0.4) - torch.tensor([0, 1.0, 0, 0])).abs().max() == 0
    # Of the three likeliest, renormalised, two hold more than 0.8.
    cut = drawn(logits, temperature=1.0, top_k=3, top_p=0.8)
    assert (cut - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03


def test_any_temperature_that_is_allowed_gives_the_likeliest_at_its_lower_end():
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 10
    for temperature in (1e-38, 1e-3):
        assert sample(scores, [Draw(temperature, noise=noise_stream(0, 0, CPU))]) == scores.argmax()


def test_top_p_of_one_keeps_every_token():
    # A thousand tokens after one that holds nearly all: the running sum is 1 in float32 before the last of them.
    scores = torch.full((1, 1001), -9.0)
    scores[0, 0] = 9.0
    noise = noise_stream(0, 0, CPU)
    drawn = {int(sample(scores, [Draw(2.0, noise=noise)])) for _ in range(4000)}
    assert max(drawn) > 900


def test_rows_with_and_without_sampling_mix():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(), Draw(1.0, noise=noise_stream(7, 0, CPU)), Draw(), Draw(1.0, noise=noise_stream(8, 0, CPU))]
    tokens = sample(scores, draws)
    assert tokens[[0, 2]].tolist() == scores[[0, 2]].argmax(-1).tolist()
    alone = sample(scores[1:2], [Draw(1.0, noise=noise_stream(7, 0, CPU))])
    assert tokens[1] == alone[0]


def test_copies_and_neighbouring_seeds_draw_different_noise():
    streams = [
        torch.rand(4, generator=noise_stream(seed, copy, CPU)) for seed, copy in itertools.product(range(5), range(5))
    ]
    assert len({tuple(stream.tolist()) for stream in streams}) == 25


@pytest.mark.parametrize("cuts", range(40))
def test_stop_texts_are_found_however_the_text_is_cut(cuts):
    rng = random.Random(cuts)
    stops = ("<|im_end|>", "end", "ab")
    text = "".join(rng.choice(["a", "b", "<", "|im_", "en", "d", "<|im_end|>", " "]) for _ in range(30))
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    # The stop text that is complete first wins, as it would token by token.
    matcher, seen, at = StopMatcher(stops), "", 0
    while at < len(text) and not matcher.matched:
        step = rng.randint(1, 4)
        seen += matcher.push(text[at : at + step])
        at += step
    seen += matcher.flush()
    if not places:
        assert seen == text
        return
    assert matcher.matched
    assert text.startswith(seen)
    assert any(text.startswith(stop, len(seen)) for stop in stops)
    assert not any(stop in seen for stop in stops)


def test_nothing_is_held_back_longer_than_needed():
    matcher = StopMatcher(["<|im_end|>"])
    assert matcher.push("a < b") == "a < b"
    assert matcher.push(" <|im") == " "
    assert matcher.push("age|>") == "<|image|>"
    assert matcher.push("x<|im_e") == "x"
    assert matcher.flush() == "<|im_e"
    assert StopMatcher([]).push("anything<") == "anything<"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected a number from 0 to 2"),
        ({"temperature": 2.01}, "temperature"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number, at least 1"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["x", ""]}, "stop"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; expected a whole number"),
        ({"seed": "x"}, "seed"),
        ({"min_p": 1.1}, "min_p is 1.1; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias"),
        ({"logit_bias": {7: 101}}, "logit_bias is {7: 101}; expected None, or a mapping from token ids to numbers"),
        ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
    ],
)
def test_parameters_out_of_their_limits_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_one_stop_text_may_stand_alone():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=None).stop == ()


def test_biases_are_kept_apart_from_the_callers_mapping():
    given = {7: 1.5}
    params = SamplingParams(logit_bias=given)
    given[7] = 1000
    assert params.logit_bias == {7: 1.5}
    assert hash(params) == hash(SamplingParams(logit_bias={7: 1.5}))
    assert SamplingParams(logit_bias={}).logit_bias is None
