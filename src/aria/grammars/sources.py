"""Convert JSON schemas, regular expressions, choices, structural tags, Lark and GBNF to llguidance grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aria.grammars import structural_tags
from aria.grammars.exact import lark as exact_lark
from aria.grammars.limits import (
    MAX_CHARACTERS,
    MAX_LISTED,
    MAX_MADE_RULES,
    check_grammar,
    check_pattern,
    check_rules,
    check_schema,
)
from aria.grammars.schemas import normalize
from aria.grammars.shape import MAX_FORCED, check_levels, max_forced_length, max_literal_length

_SETTINGS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}
_ESCAPES = 'nrbtf\\"'
"""Allowed escapes, without ``\\u``: lone surrogates are not text, and each name should have one spelling."""
_CONTROL = re.compile(r"\\u00[01][0-9a-f]|\\u007f")
"""Characters that need a ``\\u`` escape. In a schema with one of them, all escapes are allowed."""
_OURS = re.compile(r'\{"(regex|choices|structural_tag)": ?')
"""The internal form of regular expressions, choices and tags, which becomes a grammar when it is compiled."""
_LARK = re.compile(r"^[ \t]*(%llguidance\b|start[ \t]*:)", re.MULTILINE)
_JSON = re.compile(r"%json\s*")
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
"""Appended at the end, so that positions in errors are those of the original grammar. May occur twice."""


def from_regex(pattern: str) -> str:
    """The grammar of texts that fully match a regular expression."""
    return json.dumps({"regex": pattern})


def from_choices(texts: Sequence[str]) -> str:
    """The grammar that allows exactly the given texts."""
    return json.dumps({"choices": [*texts]})


def from_structural_tag(tag: Mapping[str, Any]) -> str:
    """The grammar of a structural tag, see :mod:`aria.grammars.structural_tags`."""
    return json.dumps({"structural_tag": tag})


def of_schema(text: str) -> str:
    """Return the llguidance grammar of a JSON schema.

    Args:
        text: JSON that passed :func:`aria.grammars.limits.check_schema`.

    Raises:
        ValueError: Not a JSON schema, an unsupported keyword, or no value matches it.
    """
    from llguidance import LLMatcher

    found, settings = _plain(json.loads(text))
    # Pass all settings, because a schema may contain its own under "x-guidance".
    exact = exact_lark(found, settings)
    if exact is not None:
        check_rules(exact, MAX_MADE_RULES)
        return LLMatcher.grammar_from_lark(_forced(exact, max_forced_length(found)))
    if max_forced_length(found) > MAX_FORCED:
        inner = json.dumps({**found, "x-guidance": settings})
        return LLMatcher.grammar_from_lark(f"start: %json {inner}{_UNFORCED}")
    return LLMatcher.grammar_from_json_schema(json.dumps(found), overrides=settings)  # type: ignore[arg-type]  # a plain dict


def of_grammar(text: str) -> str:
    """Return the llguidance grammar of a text: Lark, GBNF, or the internal form made by the functions above.

    Raises:
        ValueError: Too large, or none of these. Whether it compiles is not checked here.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if (kind := _OURS.match(text)) is not None:
        return LLMatcher.grammar_from_lark(_of_ours(kind[1], text))
    check_grammar(text)
    if not _LARK.search(text):
        try:
            text = gbnf_to_lark(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except Exception as error:
            raise ValueError(f"it is neither Lark, which has a start rule, nor GBNF: {error}") from None
    _check_schemas(text)
    # Nested repetitions grow exponentially, so the length of forced text is unknown.
    return LLMatcher.grammar_from_lark(text + _UNFORCED)


def _of_ours(kind: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}: shorten it")
    try:
        value = json.loads(text)[kind]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if kind == "regex":
        return _forced(f"start: {_regex(value)}", max_literal_length(value))
    if kind == "choices":
        if len(value) > MAX_LISTED:
            raise ValueError(f"it has {len(value):,} choices; expected at most {MAX_LISTED:,}")
        # One terminal: the parser would follow each rule separately.
        texts = " | ".join(json.dumps(one, ensure_ascii=False) for one in value)
        return _forced(f"start: TEXT\nTEXT: {texts}", max(map(len, value), default=0))
    check_schema(value)
    lengths = [len(text)]

    def inline(schema: Any) -> str:
        found, settings = _plain(json.loads(json.dumps(schema)))
        if exact_lark(found, settings) is not None:
            raise ValueError("numbers beyond 2^53 are not supported in schemas of structural tags")
        lengths.append(max_forced_length(found))
        return f"%json {json.dumps({**found, 'x-guidance': settings})}"

    def matched(pattern: str) -> str:
        lengths.append(max_literal_length(pattern))
        return _regex(pattern)

    grammar = structural_tags.lark(value, inline, matched)
    check_rules(grammar, MAX_MADE_RULES)
    return _forced(grammar, sum(lengths))


def _regex(pattern: str) -> str:
    """The Lark expression of a regular expression."""
    from llguidance import LLMatcher

    check_pattern(pattern)
    source = json.loads(LLMatcher.grammar_from_regex(pattern))
    return str(source["grammars"][0]["lark_grammar"]).removeprefix("start: ")


def _forced(grammar: str, length: int) -> str:
    """Disable forcing for a grammar that may force long texts."""
    return grammar if length <= MAX_FORCED else grammar + _UNFORCED


def _plain(schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Normalize a schema, which is modified; returns it with the llguidance settings for it."""
    settings = {**_SETTINGS, **({} if _CONTROL.search(json.dumps(schema)) else {"json_allowed_escapes": _ESCAPES})}
    found = normalize(schema)
    found = {} if found is True else found
    check_levels(found)
    return found, settings


def _check_schemas(grammar: str) -> None:
    """Apply the limits of schemas to the JSON schemas embedded in a grammar."""
    place = 0
    while (found := _JSON.search(grammar, place)) is not None:
        place = found.end()
        try:
            schema, place = json.JSONDecoder().raw_decode(grammar, place)
        except RecursionError:
            raise ValueError("a JSON schema in it is nested too deeply") from None
        except ValueError:
            continue  # llguidance reports the error
        check_schema(schema)
