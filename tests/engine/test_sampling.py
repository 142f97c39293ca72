"""Drawing tokens, matching stop texts, and parameters out of their limits."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.testing import assert_close

from aria.engine import SamplingParams
from aria.engine.outputs import StopMatcher
from aria.engine.sampler import EndText, SamplerState
from aria.ops import sampling

CPU = torch.device("cpu")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def extras(state: SamplerState, *rows: int) -> bool:
    """Whether one of these rows changes its logits at place 100."""
    return state.extras(rows, [100] * len(rows))


def changed_by(state: SamplerState, logits: torch.Tensor, *rows: int, place: int = 100, last: int = 0) -> torch.Tensor:
    """Scores after what these rows ask for."""
    return state.adjust_logits(logits, int32(*rows), int32(*[place] * len(rows)), torch.tensor([last] * len(rows)))


def sampler(*settings: dict, vocabulary: int, banned=(), prompt=(), outputs=()) -> SamplerState:
    """A row for each of the settings; row n has seed n."""
    state = SamplerState(len(settings), vocabulary, CPU, banned)
    for row, params in enumerate(settings):
        state.set_row(row, SamplingParams(**params), row, prompt, outputs)
    return state


def drawn(logits: list[float], count: int = 2500, **settings) -> torch.Tensor:
    """Fraction of draws of each token."""
    state = sampler(settings, vocabulary=len(logits))
    places = torch.arange(count, dtype=torch.int32)
    tokens = state.sample(torch.tensor(logits).expand(count, -1), torch.zeros_like(places), places)
    return torch.bincount(tokens, minlength=len(logits)) / count


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be sampled, by the definitions, one at a time in descending order."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -logits[token])
    if top_k:
        order = [token for token in order if logits[token] >= logits[order[min(top_k, len(order)) - 1]]]
    if top_p < 1:
        target, mass, nucleus = top_p * sum(probs[token] for token in order), 0.0, []
        for token in order:
            if mass >= target and logits[token] < logits[nucleus[-1]]:
                break
            nucleus.append(token)
            mass += probs[token]
        order = nucleus
    return {token for token in order if probs[token] >= min_p * probs[order[0]]}


def test_frequencies_are_those_of_the_softmax_at_the_temperature():
    logits = [1.0, 0.0, -1.0, 0.5, 2.0, -3.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        chi_square = ((drawn(logits, temperature=temperature) - expected).square() / expected).sum() * 2500
        # Five degrees of freedom: exceeded once in ten thousand seeds.
        assert chi_square < 25.7


def test_noise_is_gumbel_and_fresh_for_every_seed_position_and_token():
    seeds, positions = torch.arange(40, dtype=torch.int32) % 8, torch.arange(40, dtype=torch.int32) // 8
    noise = sampling.gumbel_noise(seeds, seeds * 0, positions, 5000)
    assert noise.isfinite().all()
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    # P(noise < x) = exp(-exp(-x)), everywhere.
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0):
        p = math.exp(-math.exp(-x))
        assert abs(float((noise < x).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / noise.numel())
    # No row is like another, shifted or not.
    correlation = torch.corrcoef(noise) - torch.eye(40)
    assert correlation.abs().max() < 0.08
    assert abs(float(torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))[0, 1])) < 0.02


def test_noise_is_philox_with_ten_rounds():
    # The known answers that Random123 comes with.
    ones = torch.tensor([0xFFFFFFFF])
    zero = torch.tensor([0])
    words = [int(word) for word in sampling.philox((zero, zero), zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    high_seed = sampling.philox((zero, ones), zero, zero)
    assert [int(word) for word in high_seed] != words


@pytest.mark.slow
def test_top_k_and_top_p_cut_the_tail_and_renormalise():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert (drawn(logits, temperature=1.0, top_k=2) - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03
    assert (drawn(logits, temperature=1.0, top_p=0.6) - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03
    assert (drawn(logits, temperature=1.0, top_p=0.4) - torch.tensor([0, 1.0, 0, 0])).abs().max() == 0
    assert (drawn(logits, temperature=1.0, min_p=0.4) - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03
    # Of the three likeliest, renormalised, two hold more than 0.8.
    cut = drawn(logits, temperature=1.0, top_k=3, top_p=0.8)
    assert (cut - torch.tensor([0, 2 / 3, 0, 1 / 3])).abs().max() < 0.03


@pytest.mark.parametrize("trial", range(60))
def test_what_is_kept_is_what_the_definitions_keep(trial):
    rng = random.Random(trial)
    torch.manual_seed(trial)
    V = rng.choice([2, 7, 50, 300])
    temperature = rng.choice([0.3, 1.0, 1.7])
    top_k, top_p = rng.choice([0, 1, 3, V // 2, V, 1000]), rng.choice([1.0, 0.9, 0.5, 0.01, rng.random()])
    min_p = rng.choice([0.0, 0.0, 0.05, 0.5, 1.0])
    logits = torch.randn(V) * rng.choice([0.1, 2, 8])
    if trial % 3 == 0:
        logits = (logits * 2).round() / 2  # many alike
    state = sampler({"temperature": temperature, "top_k": 2 if top_k == 1 else top_k, "top_p": top_p, "min_p": min_p},
                    vocabulary=V)  # fmt: skip
    least = sampling.thresholds(logits[None], sampling.Settings.of(state._table))
    found = set((logits >= least).nonzero()[:, 0].tolist())
    assert found == kept(logits, temperature, 2 if top_k == 1 else top_k, top_p, min_p)


def test_the_lowest_temperatures_are_greedy():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 10
    for temperature in (1e-38, 1e-5, 1e-3):
        state = sampler({"temperature": temperature}, vocabulary=50)
        assert state.sample(logits, int32(0), int32(3)) == logits.argmax()


def test_top_p_of_one_keeps_every_token():
    # A thousand tokens after one that holds nearly all: the running sum is 1 in float32 before the last of them.
    tokens = drawn([9.0, *[-9.0] * 1000], temperature=2.0, top_p=1.0)
    assert tokens[900:].sum() > 0


def test_a_seed_samples_the_same_tokens_in_any_batch():
    V = 3000
    warm = {"temperature": 1.0, "top_p": 0.9}
    state = sampler({}, warm, {"temperature": 1.5}, warm, {}, {"temperature": 1.0, "top_k": 4}, vocabulary=V)
    logits = torch.randn(6, V)
    tokens = state.sample(logits, int32(*range(6)), int32(*range(6)))
    assert tokens[[0, 4]].tolist() == logits[[0, 4]].argmax(-1).tolist()
    for n in range(6):
        assert state.sample(logits[n : n + 1], int32(n), int32(n)) == tokens[n]
    # Another place of the state and of the batch, with the same seed and position.
    other = SamplerState(9, V, CPU)
    other.set_row(7, SamplingParams(**warm), 3, [1, 2])
    assert other.sample(logits[[0, 3]], int32(0, 7), int32(0, 3))[1] == tokens[3]


def test_seeds_and_positions_change_the_noise():
    state = sampler(*[{"temperature": 1.0}] * 40, vocabulary=10_000)
    flat = torch.zeros(40, 10_000)
    rows = torch.arange(40, dtype=torch.int32)
    assert len(state.sample(flat, rows, rows * 0).unique()) > 35
    assert len(state.sample(flat, rows * 0, rows).unique()) > 35
    state.set_row(0, SamplingParams(temperature=1.0), 2**63 - 1, [])
    state.set_row(1, SamplingParams(temperature=1.0), 2**31 - 1, [])
    assert state.sample(flat[:2], int32(0, 1), int32(0, 0)).unique().numel() == 2


def test_banned_tokens_are_never_sampled():
    state = sampler({}, {"temperature": 2.0}, {"temperature": 1.0, "top_p": 0.5}, vocabulary=5, banned=(3, 0))
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0, 0.0]]).repeat(3, 1)
    given = logits.clone()
    for place in range(50):
        assert set(state.sample(logits, int32(0, 1, 2), int32(*[place] * 3)).tolist()) <= {1, 2, 4}
    assert logits.equal(given)
    chosen, ids, values = state.logprobs(logits, torch.tensor([2, 1, 4]), 3)
    expected = logits[:, [1, 2, 4]].log_softmax(-1)
    assert ids.tolist() == [[2, 1, 4]] * 3
    assert_close(values, expected[:, [1, 0, 2]])
    assert_close(chosen, expected[[0, 1, 2], [1, 0, 2]])


def test_penalties_follow_their_formulas_and_count_sampled_tokens():
    V, prompt, outputs = 8, [1, 1, 2], [2, 3, 3]
    settings = {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": -0.7}
    state = sampler(settings, {}, {"frequency_penalty": 2.0}, vocabulary=V, prompt=prompt, outputs=outputs)
    assert extras(state, 0) and extras(state, 1, 2) and not extras(state, 1) and not extras(state)
    logits = torch.randn(3, V)
    for _ in range(3):
        expected = logits.clone()
        for token in range(V):
            if token in prompt or token in outputs:
                expected[0, token] = logits[0, token] / 1.5 if logits[0, token] > 0 else logits[0, token] * 1.5
            times = outputs.count(token)
            expected[0, token] -= 0.3 * times - 0.7 * (times > 0)
            expected[2, token] -= 2.0 * times
        changed = changed_by(state, logits, 0, 1, 2)
        assert_close(changed, expected)
        assert_close(changed_by(state, logits[[2, 0]].bfloat16(), 2, 0), expected[[2, 0]], rtol=0.02, atol=0.02)
        token = int(state.sample(changed, int32(0, 1, 2), int32(5, 5, 5))[0])
        assert token == int(expected[0].argmax())
        outputs.append(token)
        state.count(int32(0, 2, 1), torch.tensor([token, token, 6]))
    # The same request in another row, after preemption, and a row whose next request asks for nothing.
    state.set_row(1, SamplingParams(**settings), 0, prompt, outputs)
    twice = changed_by(state, logits[[0, 0]], 0, 1)
    assert_close(twice[0], twice[1], rtol=0, atol=0)
    state.clear_row(1)
    state.set_row(1, SamplingParams(temperature=1.0), 0, prompt, [])
    assert_close(changed_by(state, logits, 0, 1, 2)[1], logits[1], rtol=0, atol=0)
    assert not extras(state, 1)


def test_biases_are_added_and_cleared_with_their_request():
    state = sampler({"logit_bias": {3: 100.0}}, {"logit_bias": {0: -100, 1: -100, 5: 2.5}}, {}, vocabulary=6)
    logits = torch.randn(3, 6)
    expected = logits.clone()
    expected[0, 3] += 100
    expected[1, [0, 1]] -= 100
    expected[1, 5] += 2.5
    assert extras(state, 0) and not extras(state, 2)
    assert_close(changed_by(state, logits, 0, 1, 2), expected)
    state.set_row(0, SamplingParams(), 0, [])
    assert not extras(state, 0, 2)
    assert_close(changed_by(state, logits, 0, 1)[0], logits[0])
    with pytest.raises(AssertionError, match="a bias for token 6"):
        state.set_row(0, SamplingParams(logit_bias={6: 1.0}), 0, [])


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
        ({"top_p": -0.1}, "top_p is -0.1; expected a number from 0 .greedy. to 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": -1}, "max_tokens is -1; expected a whole number, 0 or more"),
        ({"n": 0}, "n is 0"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; expected None, or a whole number from 0 to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs is True"),
        ({"stop": ["x", ""]}, "stop"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; expected a whole number"),
        ({"seed": "x"}, "seed"),
        ({"min_p": 1.1}, "min_p is 1.1; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number from 0.01 to 100"),
        ({"repetition_penalty": 1e308}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias"),
        ({"logit_bias": {7: 101}}, "logit_bias is {7: 101}; expected None, or a mapping from token ids to numbers"),
        ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
        ({"skip_special_tokens": 0}, "skip_special_tokens is 0; expected True or False"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output is 'no'"),
        ({"stop_token_ids": [True]}, "stop_token_ids is .True.; expected None, or token ids"),
        ({"stop_token_ids": "7"}, "stop_token_ids is '7'"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens is -1; expected a whole number, 0 or more"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; expected at most max_tokens, which is 8"),
        ({"min_tokens": 1, "json_schema": True}, "min_tokens is 1; expected 0 beside json_schema"),
    ],
)
def test_parameters_out_of_range_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_a_single_stop_text_needs_no_list():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=None).stop == ()


def test_biases_are_copied():
    given = {7: 1.5}
    params = SamplingParams(logit_bias=given)
    given[7] = 1000
    assert params.logit_bias == {7: 1.5}
    assert hash(params) == hash(SamplingParams(logit_bias={7: 1.5}))
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_ends_are_not_sampled_before_min_tokens():
    tokens = [b"a", b"<|", b"<", b"|", b"im_end|>", b"x<", b"<|im_end|>", b"|im", b"||", b"", b"<|im_", b"|>"]
    end_text = EndText.of("<|im_end|>", tokens, CPU)
    state = SamplerState(3, 12, CPU)
    for row, ends in enumerate(([4, 0], [0], [])):
        text = None if row == 0 else end_text
        state.set_row(row, SamplingParams(min_tokens=5), 0, [1] * 10, end_ids=ends, end_text=text)
    logits = torch.randn(3, 12)

    def banned(place: int, last: int) -> list[set[int]]:
        changed = changed_by(state, logits, 0, 1, 2, place=place, last=last)
        gone = changed == float("-inf")
        assert_close(changed[~gone], logits[~gone])
        return [set(row.nonzero()[:, 0].tolist()) for row in gone]

    # The first character alone stays free, and behind it nothing that continues the text.
    text = {1, 6, 10}
    for place in (10, 14):
        assert state.extras([1], [place])
        assert banned(place, 0) == [{0, 4}, {0} | text, text]
        assert banned(place, 5) == [{0, 4}, {0, 3, 7} | text, {3, 7} | text]
    assert banned(15, 5) == [set()] * 3
    assert not state.extras([0, 1, 2], [15] * 3)
    # What a request that has left asked for is forgotten.
    state.set_row(1, SamplingParams(min_tokens=5), 0, [1] * 10)
    state.set_row(2, SamplingParams(), 0, [1] * 10)
    assert banned(10, 5) == [{0, 4}, set(), set()]


def test_a_top_p_of_zero_is_greedy():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    state = sampler({"temperature": 2.0, "top_p": 0.0}, vocabulary=50)
    assert all(state.sample(logits, int32(0), int32(place)) == logits.argmax() for place in range(20))


def test_stop_texts_can_be_kept_and_delayed():
    matcher = StopMatcher(["ab", "<|im_end|>"], kept=["ab"])
    assert matcher.push("xaby ab a", search=False) == "xaby ab "
    assert matcher.push("bz") == "ab" and matcher.matched == "ab"
    assert matcher.flush() == ""
    dropped = StopMatcher(["ab", "<|im_end|>"], kept=["ab"])
    assert dropped.push("x<|im_") == "x"
    assert dropped.push("end|>ab") == "" and dropped.matched == "<|im_end|>"
    # One that ended before it was looked for does not count later, be it still held back.
    nested = StopMatcher(["ab", "xabyz"])
    assert nested.push("xab", search=False) == ""
    assert nested.push("c") == "xabc" and nested.matched is None
