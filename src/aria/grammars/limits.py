"""Limits on what strangers send as JSON, schemas and grammars. JSON is walked without recursion, so depth does no harm.

llguidance follows references and rules by recursion, and compares patterns for as long as it takes. What passes here
costs it a bounded depth; what it costs in time and memory is tried in another process first, see :mod:`.trial`.
The figures below are those of one core of the machine that they were measured on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 100
"""Lists and objects inside each other. What reads and writes JSON recurses, and llguidance refuses more than 127."""
MAX_VALUES = 100_000
"""Values in one piece of JSON. Of schemas llguidance takes up to 50,000 subschemas."""
MAX_CHARACTERS = 2_000_000
"""Characters of a schema as JSON."""
MAX_PROPERTIES = 5_000
"""Properties of one object. Where all may be missing, the time grows with the square of their number: 1.6 s."""
MAX_NAME_PATTERNS = 100
"""Members of one patternProperties, each compared with all others: 0.1 s, and for 1,000 more than a minute."""
MAX_LISTED = 20_000
"""Values in all lists of enum together: 0.1 s."""
MAX_PATTERN = 10_000
"""Characters of a pattern."""
MAX_DIVISOR = 100_000
"""A whole number as multipleOf, without factors of ten: so many remainders are told apart, in 1.3 s and 50 MB."""
MAX_GRAMMAR = 200_000
"""Characters of a grammar as text."""
MAX_RULES = 1_000
"""Rules of a grammar as text. Each that leads to the next, from within groups, takes up to 50 KB of stack."""
MAX_MADE_RULES = 5_000
"""The same for grammars that are made here, whose rules are plain: up to 7 KB."""

_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w.-]*[ \t]*(\[[^\]\n]*\][ \t]*)?(::=|:)", re.MULTILINE)

Pointer = Callable[[], str]


def check_json(value: Any, most: float = MAX_VALUES) -> None:
    """Refuse JSON that is nested too deeply for the programs that read and write it, or too large.

    Args:
        value: mappings, lists, texts and numbers.
        most: how many values it may have.

    Raises:
        ValueError: it is, or contains itself.
    """
    for _ in _containers(value, most):
        pass


def check_schema(schema: Any) -> None:
    """Refuse a schema that is too large, before anything else reads it.

    Raises:
        ValueError: the message has the limit, what was found, where, and what to do.
    """
    listed = characters = 0
    for node, place in _containers(schema, MAX_VALUES):
        texts = node if isinstance(node, list | tuple) else [*node, *node.values()]
        characters += sum(len(text) for text in texts if isinstance(text, str))
        _check(characters, MAX_CHARACTERS, "characters", place, "split it into several questions")
        if not isinstance(node, dict):
            continue
        # Where these are names of properties, or data, their values are of other types or as harmless.
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
    """Refuse a regular expression that is too long.

    Raises:
        ValueError: it is.
    """
    _check(len(pattern), MAX_PATTERN, "characters in a pattern", place, "shorten it")


def check_grammar(text: str) -> None:
    """Refuse a grammar as text that is too long.

    Raises:
        ValueError: it is.
    """
    _check(len(text), MAX_GRAMMAR, "characters", lambda: "", "shorten it")
    check_rules(text)


def check_rules(text: str, most: int = MAX_RULES) -> None:
    """Refuse a grammar in Lark or GBNF with too many rules.

    Raises:
        ValueError: it has more than ``most``.
    """
    _check(len(_RULE.findall(text)), most, "rules", lambda: "", "use fewer")


def _check(found: int, most: int, what: str, place: Pointer, advice: str) -> None:
    if found > most:
        where = f", at {place()}" if place() else ""
        raise ValueError(f"it has {found:,} {what}; expected at most {most:,}: {advice}{where}")


def _without_tens(divisor: float) -> int:
    """A whole number without its factors of ten, 0 for any other."""
    if divisor != divisor or abs(divisor) == float("inf") or divisor != int(divisor):
        return 0
    left = abs(int(divisor))
    while left and left % 10 == 0:
        left //= 10
    return left


def _containers(value: Any, most: float) -> Iterator[tuple[Any, Pointer]]:
    """The objects and lists of JSON, and where each stands as a JSON pointer."""
    waiting: list[tuple[Any, Any, int]] = [(value, None, 1)]
    count = 1
    while waiting:
        node, trail, depth = waiting.pop()
        if not isinstance(node, dict | list | tuple):
            continue
        if depth > MAX_DEPTH:
            raise ValueError(
                f"it is nested too deeply: over {MAX_DEPTH} lists and objects inside each other, at "
                f"{_pointer(trail):.200}; in a schema, define inner parts under $defs and refer to them"
            )
        count += len(node)
        if count > most:
            raise ValueError(f"it has over {most:,} values; make it smaller")
        yield node, lambda trail=trail: f"{_pointer(trail):.200}"  # type: ignore[misc]  # mypy cannot infer defaults
        members = node.items() if isinstance(node, dict) else enumerate(node)
        waiting += [(one, (trail, key), depth + 1) for key, one in members if isinstance(one, dict | list | tuple)]


def _pointer(trail: Any) -> str:
    """``((None, "items"), 0)`` -> ``#/items/0``."""
    keys = []
    while trail is not None:
        trail, key = trail
        keys.append(str(key)[:60].replace("~", "~0").replace("/", "~1"))
    return "/".join(["#", *reversed(keys)])
