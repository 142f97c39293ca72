"""JSON schemas to grammars: rejected, or every value that the grammar allows matches the schema."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np

from aria.engine.grammar import Grammars
from aria.engine.matcher import fill_masks
from aria.processor import AriaTokenizer
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.made_schemas import KEYWORDS, schema

LONGEST = 512
_NUMBERS = re.compile(r"-?[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]+")
STEPS = 120
"""Tokens of a value; one that has not ended by then is not looked at."""


@cache
def _grammars() -> tuple[AriaTokenizer, Grammars]:
    tokenizer = AriaTokenizer.from_pretrained()
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size)


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    spoils, seed = draw.byte() % 4 == 1, draw.byte()
    given = schema(draw)
    if spoils:
        given = spoiled(draw, given, KEYWORDS)
        if not isinstance(given, dict):
            return
    try:
        text = _walk_randomly(given, seed)
    except ValueError as error:
        assert len(str(error)) < 2000, "a message as long as the schema"
        return
    if text is None or any(math.isinf(float(number)) for number in _NUMBERS.findall(text)):
        return  # exponents beyond those of doubles: the other reader has no such numbers
    value = json.loads(text)
    try:
        validator = jsonschema_rs.Draft202012Validator(given)
    except ValueError:  # it is stricter about what says nothing
        return
    assert validator.is_valid(value), f"{text} does not fit {json.dumps(given)}"


def _walk_randomly(given: Any, seed: int) -> str | None:
    """A text of tokens that the grammar allows, rather those that end something."""
    tokenizer, grammars = _grammars()
    choice = random.Random(seed)
    [matcher] = grammars.matchers(given, 1, ("<|im_end|>",))
    ids: list[int] = []
    for _ in range(STEPS):
        [mask] = fill_masks([matcher], tokenizer.vocab_size)
        if matcher.error is not None:
            return None
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        closing = [index for index in allowed if tokenizer.token_bytes(index)[:1] in (b'"', b"}", b"]")]
        ids.append(choice.choice(closing if closing and choice.random() < 0.5 else allowed))
        end = matcher.accept(ids[-1])
        if end == "error":
            return None
        if end is not None:
            return tokenizer.decode(ids[:-1] if end == "over" else ids)
    return None


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (chance.randbytes(48) for _ in range(40))
