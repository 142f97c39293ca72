"""Schemas, patterns, texts to choose from, structural tags, Lark and GBNF -> grammars as llguidance reads them."""

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
"""Without those by number: halves of surrogate pairs are no text, and a name has one way to be spelled."""
_CONTROL = re.compile(r"\\u00[01][0-9a-f]|\\u007f")
"""Characters that have no other escape; in a schema that holds one, all escapes are allowed."""
_OURS = re.compile(r'\{"(regex|choices|structural_tag)": ?')
"""What the functions below make of patterns, texts and tags: it becomes a grammar when it is compiled."""
_LARK = re.compile(r"^[ \t]*(%llguidance\b|start[ \t]*:)", re.MULTILINE)
_JSON = re.compile(r"%json\s*")
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
"""At the end, so that places in errors are those of the grammar as it came. Of two such lines both hold."""


def from_regex(pattern: str) -> str:
    """The grammar of texts that a pattern matches from end to end."""
    return json.dumps({"regex": pattern})


def from_choices(texts: Sequence[str]) -> str:
    """The grammar of some texts."""
    return json.dumps({"choices": [*texts]})


def from_structural_tag(tag: Mapping[str, Any]) -> str:
    """The grammar of a structural tag, see :mod:`aria.grammars.structural_tags`."""
    return json.dumps({"structural_tag": tag})


def of_schema(text: str) -> str:
    """The grammar of a JSON schema.

    Args:
        text: JSON that :func:`aria.grammars.limits.check_schema` let pass.

    Raises:
        ValueError: it is no JSON schema, it has a keyword that cannot be followed, or no value fits it.
    """
    from llguidance import LLMatcher

    found, settings = _plain(json.loads(text))
    # All settings are given: a schema may carry some of its own under "x-guidance".
    exact = exact_lark(found, settings)
    if exact is not None:
        check_rules(exact, MAX_MADE_RULES)
        return LLMatcher.grammar_from_lark(_forced(exact, max_forced_length(found)))
    if max_forced_length(found) > MAX_FORCED:
        inner = json.dumps({**found, "x-guidance": settings})
        return LLMatcher.grammar_from_lark(f"start: %json {inner}{_UNFORCED}")
    return LLMatcher.grammar_from_json_schema(json.dumps(found), overrides=settings)  # type: ignore[arg-type]  # a plain dict


def of_grammar(text: str) -> str:
    """The grammar of a text: Lark, GBNF, or what the functions above made.

    Raises:
        ValueError: it is too large, or none of these. That it can be compiled is not known yet.
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
            raise ValueError(f"it is neither Lark, which has a rule start, nor GBNF: {error}") from None
    _check_schemas(text)
    # Rules that repeat others double a text with each: nobody knows how long one may be that is forced.
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
            raise ValueError(f"it has {len(value):,} texts to choose from; expected at most {MAX_LISTED:,}")
        # One token of the grammar: each rule would be followed for itself.
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
    """An expression of Lark for what a regular expression matches."""
    from llguidance import LLMatcher

    check_pattern(pattern)
    source = json.loads(LLMatcher.grammar_from_regex(pattern))
    return str(source["grammars"][0]["lark_grammar"]).removeprefix("start: ")


def _forced(grammar: str, length: int) -> str:
    """A grammar that forces texts of up to a length."""
    return grammar if length <= MAX_FORCED else grammar + _UNFORCED


def _plain(schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain schema of one that may be changed, and llguidance's settings for it."""
    settings = {**_SETTINGS, **({} if _CONTROL.search(json.dumps(schema)) else {"json_allowed_escapes": _ESCAPES})}
    found = normalize(schema)
    found = {} if found is True else found
    check_levels(found)
    return found, settings


def _check_schemas(grammar: str) -> None:
    """Check the JSON schemas in a grammar as schemas of their own."""
    place = 0
    while (found := _JSON.search(grammar, place)) is not None:
        place = found.end()
        try:
            schema, place = json.JSONDecoder().raw_decode(grammar, place)
        except RecursionError:
            raise ValueError("a JSON schema in it is nested too deeply") from None
        except ValueError:
            continue  # llguidance says why
        check_schema(schema)
