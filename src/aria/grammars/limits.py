"""Limits on untrusted JSON, schemas and grammars. JSON is walked iteratively, so deep nesting is safe.

llguidance follows references and rules recursively, and compares patterns for as long as it takes. Input that passes
here has bounded depth; its cost in time and memory is tested in another process first, see :mod:`.trial`. The figures
below were measured on one core.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from aria.json_walk import iter_containers, trail_keys

MAX_DEPTH = 100
"""Nesting of lists and objects. JSON parsers recurse, and llguidance rejects more than 127 levels."""
MAX_VALUES = 100_000
"""Values in a JSON document. llguidance accepts up to 50,000 subschemas."""
MAX_CHARACTERS = 2_000_000
"""Characters of a schema as JSON."""
MAX_PROPERTIES = 5_000
"""Properties of an object. If all are optional, time grows with the square of their number: 1.6 s."""
MAX_NAME_PATTERNS = 100
"""Members of a patternProperties, each compared with all others: 0.1 s; 1,000 take more than a minute."""
MAX_LISTED = 20_000
"""Values in all enums together: 0.1 s."""
MAX_PATTERN = 10_000
"""Characters of a regular expression."""
MAX_DIVISOR = 100_000
"""An integer multipleOf, without factors of ten: the number of remainders to distinguish, in 1.3 s and 50 MB."""
MAX_GRAMMAR = 200_000
"""Characters of a text grammar."""
MAX_RULES = 1_000
"""Rules of a text grammar. A chain of rules through nested groups takes up to 50 KB of stack per rule."""
MAX_MADE_RULES = 5_000
"""Rules of a generated grammar, which are flat and take up to 7 KB of stack each."""

_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w.-]*[ \t]*(\[[^\]\n]*\][ \t]*)?(::=|:)", re.MULTILINE)

Pointer = Callable[[], str]


def check_json(value: Any, most: float = MAX_VALUES) -> None:
    """Reject JSON that is nested too deeply or too large.

    Args:
        value: Parsed JSON: dicts, lists, strings and numbers.
        most: Maximum number of values.

    Raises:
        ValueError: Too deep (or circular), or too large.
    """
    for _ in _containers(value, most):
        pass


def check_schema(schema: Any) -> None:
    """Reject a schema that is too large, before any other code reads it.

    Raises:
        ValueError: Over a limit. The message has the limit, the value found, its place and advice.
    """
    listed = characters = 0
    for node, place in _containers(schema, MAX_VALUES):
        texts = node if isinstance(node, list | tuple) else [*node, *node.values()]
        characters += sum(len(text) for text in texts if isinstance(text, str))
        _check(characters, MAX_CHARACTERS, "characters", place, "split it into several requests")
        if not isinstance(node, dict):
            continue
        # If these are names of properties or part of data, their values have other types or are as harmless.
        if isinstance(values := node.get("enum"), list):
            listed += len(values)
            _check(listed, MAX_LISTED, "values in enum", place, "describe them by a pattern")
        for keyword, kind in (("properties", dict), ("required", list)):
            if isinstance(named := node.get(keyword), kind):
                _check(len(named), MAX_PROPERTIES, f"names in {keyword}", place, "group them in objects")
        if isinstance(patterns := node.get("patternProperties"), dict):
            _check(len(patterns), MAX_NAME_PATTERNS, "patterns in patternProperties", place, "join some with |")
        for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(pattern, str):
                check_pattern(pattern, place)
        if isinstance(divisor := node.get("multipleOf"), int | float) and _without_tens(divisor) > MAX_DIVISOR:
            raise ValueError(
                f"multipleOf is {divisor!r:.60}; expected at most {MAX_DIVISOR:,}, not counting factors of ten, "
                f"at {place()}"
            )


def check_pattern(pattern: str, place: Pointer = lambda: "") -> None:
    """Reject a regular expression that is too long.

    Raises:
        ValueError: It is too long.
    """
    _check(len(pattern), MAX_PATTERN, "characters in a pattern", place, "shorten it")


def check_grammar(text: str) -> None:
    """Reject a text grammar that is too long or has too many rules.

    Raises:
        ValueError: Over a limit.
    """
    _check(len(text), MAX_GRAMMAR, "characters", lambda: "", "shorten it")
    check_rules(text)


def check_rules(text: str, most: int = MAX_RULES) -> None:
    """Reject a grammar in Lark or GBNF with too many rules.

    Raises:
        ValueError: More than ``most`` rules.
    """
    _check(len(_RULE.findall(text)), most, "rules", lambda: "", "use fewer")


def _check(found: int, most: int, what: str, place: Pointer, advice: str) -> None:
    if found > most:
        where = f", at {place()}" if place() else ""
        raise ValueError(f"it has {found:,} {what}; expected at most {most:,}: {advice}{where}")


def _without_tens(divisor: float) -> int:
    """An integer without its factors of ten; 0 for any other number."""
    if divisor != divisor or abs(divisor) == float("inf") or divisor != int(divisor):
        return 0
    left = abs(int(divisor))
    while left and left % 10 == 0:
        left //= 10
    return left


def _containers(value: Any, most: float) -> Iterator[tuple[Any, Pointer]]:
    """Iterate over the objects and lists of a JSON document, each with a function that returns its JSON pointer."""
    count = 1
    for node, trail, depth in iter_containers(value):
        if depth > MAX_DEPTH:
            raise ValueError(
                f"it is nested too deeply: over {MAX_DEPTH} lists and objects inside each other, at "
                f"{_pointer(trail)}; in a schema, define inner parts under $defs and refer to them"
            )
        count += len(node)
        if count > most:
            raise ValueError(f"it has over {most:,} values; make it smaller")
        yield node, partial(_pointer, trail)


def _pointer(trail: Any) -> str:
    """``((None, "items"), 0)`` -> ``#/items/0``."""
    keys = [str(key)[:60].replace("~", "~0").replace("/", "~1") for key in trail_keys(trail)]
    return "/".join(["#", *keys])[:200]
