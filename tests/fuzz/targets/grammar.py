"""Grammars in Lark, GBNF, regular expressions, choices and structural tags: compiled, or a ValueError."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache

from aria.engine.grammar import Grammars, from_choices, from_regex, from_structural_tag
from aria.processor import AriaTokenizer
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.made_schemas import KEYWORDS, PATTERNS, schema

LONGEST = 512
WORDS = (
    *("start: ", "root ::= ", "\n", " | ", "(", ")", "*", "+", "?", "{1,3}", "/a|b/", '"text"', "[a-z]", "%json {}"),
    *("%regex {", "[lazy]", '[stop=""]', "%llguidance {}", "%ignore", "%import", "<|im_end|>", "start: start", ".*"),
)
_LARK = (*WORDS, *PATTERNS)
_TAG = (
    "const_string",
    "json_schema",
    "regex",
    "any_text",
    "sequence",
    "or",
    "tag",
    "triggered_tags",
    "tags_with_separator",
)
_TAGS = (
    {"structures": [{"begin": "<a>", "schema": {"type": "integer"}, "end": "</a>"}], "triggers": ["<a"]},
    {"format": {"type": "sequence", "elements": [{"type": "const_string", "value": "a"}, {"type": "any_text"}]}},
    {"format": {"type": "tag", "begin": "<", "content": {"type": "regex", "pattern": "a+"}, "end": [">", "|"]}},
)


@cache
def _grammars() -> Grammars:
    tokenizer = AriaTokenizer.from_pretrained()
    return Grammars(tokenizer, tokenizer.vocab_size)


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    try:
        text = _grammar(draw)
        assert isinstance(text, str)
        text.encode()  # halves of surrogate pairs do not come through a request
        [matcher] = _grammars().matchers(text, 1)
    except ValueError as error:
        assert isinstance(error, UnicodeError) or len(str(error)) < 5000, "a message as long as the grammar"
        return
    assert matcher.error is None


def _grammar(draw: Draw) -> str:
    match draw.byte() % 5:
        case 0:
            return draw.rest().decode("latin-1")
        case 1:
            return draw.text(_LARK, 12)
        case 2:
            return from_regex(draw.text((*PATTERNS, *"()[]{}|*+?^$\\.", "{0,99}", "(?i)", r"\p{L}", "(?<=a)"), 10))
        case 3:
            return from_choices([draw.text(_LARK) for _ in range(1 + draw.below(3))])
    tag = json.loads(json.dumps(draw.one(_TAGS)))
    tag["x" if draw.flag() else "schema"] = schema(draw, 1)
    tag = spoiled(draw, tag, (*_TAG, *KEYWORDS, "begin", "end", "type", "content"))
    return from_structural_tag(tag if isinstance(tag, dict) else {"format": tag})


def seeds() -> Iterator[bytes]:
    for text in ('start: A B*\nA: /a+/\nB: "b"', 'root ::= "a" [0-9]{2} root?', 'start: %json {"type": "null"}'):
        yield b"\0" + text.encode()
    chance = random.Random(0)
    yield from (bytes([kind]) + chance.randbytes(40) for kind in (1, 2, 3, 4) for _ in range(8))
