"""Nano's text data: right answers, held-out material, needles, and batches of one shape."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
import torch

from recipes.nano.scenes import verbal
from recipes.nano.text import glosses, haystack, text_questions, tokenizer
from recipes.nano.train import stages, text_batches
from recipes.nano.train.text_batches import Texts

WORDS = ("apple", "bridge", "candle", "donkey", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle")


@pytest.fixture(autouse=True)
def small_dictionary(monkeypatch: pytest.MonkeyPatch):
    """A small dictionary instead of WordNet's."""
    known = {
        f"{word}{end}": f"a thing that is called {word}{end}" for word in WORDS for end in ("", "er", "ful", "let")
    }
    fields = {"definitions": known, "others": [f"{word}ism" for word in WORDS] + [f"{word}ity" for word in WORDS]}
    monkeypatch.setattr(glosses, "read", lambda: type("Glosses", (), fields))
    for cached in (text_questions.words, text_questions.others):
        cached.cache_clear()
    yield
    for cached in (text_questions.words, text_questions.others):
        cached.cache_clear()


def turns_of(kind: str, held_out: bool, count: int = 600) -> list[tuple[str, str]]:
    rng = Random(4)
    return [text_questions.KINDS[kind](rng, held_out) for _ in range(count)]


def test_sums_are_right_and_held_out_pairs_are_never_taught() -> None:
    seen = {}
    for held_out in (False, True):
        pairs = set()
        for question, answer in turns_of("sums", held_out, 3000):
            a, b = map(int, re.findall(r"\d+", question))
            assert answer == f"{a + b}."
            pairs.add(frozenset((a, b)))
            assert not held_out or min(a, b) >= 10, "held-out numbers should have two digits"
        seen[held_out] = pairs
    assert not seen[False] & seen[True] and len(seen[True]) > 200


def test_differences_and_tables_are_right() -> None:
    for question, answer in turns_of("reckoning", False):
        a, b = map(int, re.findall(r"\d+", question))
        times = any(sign in question for sign in (" x ", "times"))
        assert answer == f"{a * b if times else a - b}."


def test_held_out_definitions_use_taught_words_and_held_out_wordings() -> None:
    known = glosses.read().definitions
    taught, held = turns_of("definitions", False), turns_of("definitions", True)
    forms = []
    for turns in (taught, held):
        found = set()
        for question, answer in turns:
            word = next(word for word in sorted(known, key=len, reverse=True) if word in question)
            assert answer.casefold().startswith(known[word].casefold())
            found.add(question.replace(word, "{}"))
        forms.append(found)
    assert not forms[0] & forms[1]


def test_words_are_spelled_counted_and_held_out() -> None:
    assert not set(text_questions.words(True)) & set(text_questions.words(False))
    for question, answer in turns_of("words", True):
        word = max((word for word in text_questions.words(True) if word in question), key=len)
        if "pell" in question:
            assert answer == "-".join(word.upper()) + "."
        elif "many" in question or "Count" in question:
            assert answer == f"{len(word)}."
    assert [text_questions.plural_of(noun) for noun in ("box", "city", "day", "cat")] == [
        "boxes",
        "cities",
        "days",
        "cats",
    ]


@pytest.mark.parametrize("length", [256, 1000, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_is_at_the_requested_depth(length: int, depth: float) -> None:
    [(question, answer)] = haystack.haystack(Random(length), length, depth)
    *lines, asked = question.split("\n")
    owner = re.search(r"of the (\w+ \w+)|does the (\w+ \w+) have", asked)
    assert owner is not None
    needle = haystack.NEEDLE.format(owner[1] or owner[2], answer.rstrip("."))
    assert lines.index(needle) == round(depth * (len(lines) - 1))
    tokens = len(text_batches.batches.tokens([(question, answer)])[0])
    assert 0.75 * length < tokens <= length
    others = [line for line in lines if line.startswith("The secret number") and line != needle]
    assert len(others) == 1 + length // 600, "there should be other owners"


def test_held_out_needles_have_separate_owners_and_numbers() -> None:
    def drawn(held_out: bool) -> tuple[set[str], set[str]]:
        asked = [haystack.haystack(Random(seed), 400, held_out=held_out)[0] for seed in range(200)]
        owners = {re.search(r"the (\w+ \w+)[ ?.]*(have\?)?$", question.split("\n")[-1])[1] for question, _ in asked}
        return owners, {answer for _, answer in asked}

    for taught, held in zip(drawn(False), drawn(True), strict=True):
        assert not taught & held


def test_batches_of_text_have_one_shape_and_repeat() -> None:
    texts = Texts(
        3, {"definitions": 0.5, "sums": 0.2, text_batches.PLAIN: 0.2, text_batches.NEEDLES: 0.1}, tokens=2048, workers=0
    )
    batches = list(islice(text_batches.loader(texts), 4))
    for batch in batches:
        assert batch["size"] == 0 and batch["cu_seqlens"].shape == (texts.sequences + 1,)
        assert batch["cu_seqlens"][-1] == 2048 == len(batch["input_ids"])
        assert batch["cu_seqlens"].diff().max() <= batch["max_seqlen"]
        used = batch["num_tokens"]
        assert used > 1200 and (batch["input_ids"][used:] == tokenizer.PAD_TOKEN_ID).all()
        learned = batch["labels"] != -100
        assert learned[:used].any() and not learned[used:].any()
        assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
        assert not learned[batch["cu_seqlens"][:-1].long().clamp(max=2047)].any(), (
            "the first token of a sequence should not be a target"
        )
    again = list(islice(text_batches.loader(Texts(**{**vars(texts), "first": 2})), 2))
    for batch, same in zip(batches[2:], again, strict=True):
        assert all(torch.equal(batch[key], same[key]) for key in ("input_ids", "labels", "cu_seqlens"))


def test_a_stage_resumes_at_its_batch() -> None:
    def mixture() -> stages.Mixture:
        return stages.Mixture(stages.STAGES["language"], tokens=1024, workers=0, seed=5, device="cpu")

    whole, begun, resumed = mixture(), mixture(), mixture()
    expected = [batch["input_ids"] for batch in islice(iter(whole), 5)]
    list(islice(iter(begun), 3))
    resumed.load_state_dict(begun.state_dict())
    found = [batch["input_ids"] for batch in islice(iter(resumed), 2)]
    assert all(torch.equal(a, b) for a, b in zip(expected[3:], found, strict=True))


def test_answers_about_described_scenes_follow_from_the_description() -> None:
    rng, seen = Random(8), set()
    for _ in range(600):
        turns = verbal.conversation(rng, text_questions.words(False))
        first = turns[0][0]
        description = first.lower()
        for question, answer in turns:
            asked = question.lower().rsplit("\n", 1)[-1].rsplit(". ", 1)[-1]
            colour = re.search(r"(?:colou?r is|the colou?r of) the (\w+)", asked)
            if colour:
                seen.add("colour")
                assert f"{answer[:-1].lower()} {colour[1]}" in description
            value = re.fullmatch(r"(?:what is the value of|how much is) (\w+)\??", asked)
            if value and "bar chart" in description:
                seen.add("value")
                assert f"{value[1]} {answer[:-1]}" in description
            if asked.startswith(("which bar is the largest", "which bar is the longest")):
                seen.add("largest")
                bars = re.findall(r"(\w+) (\d+)(?:,| and|\.)", first.split(": ", 1)[1])
                assert answer[:-1] == max(bars, key=lambda bar: int(bar[1]))[0]
    assert seen == {"colour", "value", "largest"}


def test_some_definitions_have_text_around_them_but_no_held_out_wording() -> None:
    questions = [question for question, _ in turns_of("definitions", False, 2000)]
    around = [
        q for q in questions if any((b and q.startswith(b)) or (a and q.endswith(a)) for b, a in text_questions.AROUND)
    ]
    assert 400 < len(around) < 800
    words = "|".join(sorted(glosses.read().definitions, key=len, reverse=True))
    shapes = {re.sub(rf"\b({words})\b", "{}", question) for question in questions}
    assert not any(form in shape for form in text_questions.DEFINE[1] for shape in shapes)
