"""What a plain schema is like: how deep it leads, and how long a text it may leave no choice about.

Where only one text is possible llguidance finds it byte by byte to its end, before the next token is chosen: 100 KB
take 0.15 s and 40 MB. Where it could be long, a grammar says ``no_forcing``, and each token is allowed for itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from aria.grammars.trampoline import Steps, run

MAX_FORCED = 10_000
"""Bytes that a grammar may force at a time: 10 ms."""
MAX_LEVELS = 5_000
"""Subschemas on the way from one to the next that llguidance follows by recursion, in up to 10 KB of stack each."""
_UNBOUNDED = 10**12


def max_forced_length(schema: Mapping[str, Any]) -> int:
    """About the most characters of any text that a plain schema forces at a time.

    What depends on a choice counts as if it were chosen, and what leads back to itself once: there is a choice in every
    circle, as values are finite.

    Args:
        schema: of :func:`aria.grammars.schemas.normalize`.
    """
    return int(run(_Lengths(schema.get("$defs", {})).of(schema)))


class _Lengths:
    def __init__(self, definitions: Mapping[str, Any]):
        self._definitions = definitions
        self._known: dict[str, int] = {}

    def of(self, schema: Any) -> Steps:
        if not isinstance(schema, dict):
            return 0
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in self._known:
                self._known[name] = 0
                self._known[name] = yield self.of(self._definitions[name])
            return self._known[name]
        if "enum" in schema:
            return max(len(json.dumps(value, ensure_ascii=False)) for value in schema["enum"])
        found = 0
        for option in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
            found = max(found, (yield self.of(option)))
        found += schema.get("minLength", 0) + max_literal_length(schema.get("pattern") or schema.get("x-number") or "")
        found += yield from self._array(schema)
        found += yield from self._object(schema)
        return min(found, _UNBOUNDED)

    def _array(self, schema: Mapping[str, Any]) -> Steps:
        found, first = 0, schema.get("prefixItems", ())
        for item in first:
            found += 1 + (yield self.of(item))
        found += max(schema.get("minItems", 0) - len(first), 1) * (1 + (yield self.of(schema.get("items"))))
        return found

    def _object(self, schema: Mapping[str, Any]) -> Steps:
        found = 0
        for name, value in schema.get("properties", {}).items():
            found += len(name) + 4 + (yield self.of(value))
        for pattern, value in schema.get("patternProperties", {}).items():
            found += max_literal_length(pattern) + 4 + (yield self.of(value))
        return found + (yield self.of(schema.get("additionalProperties")))


_STEP = re.compile(
    r"""\\[pPxuU]\{[^}]*\}? | \\. | \[\^?\]?(?:\\.|[^\]\\])*\]?
    | (?P<open>\((?:\?(?:P?<\w*>|[a-zA-Z-]*:))?) | (?P<close>\)) | (?P<either>\|)
    | \{(?P<count>[0-9]+)(?:,[0-9]*)?\}\?? | (?P<maybe>[*?]\??) | (?P<more>\+\??) | .""",
    re.DOTALL | re.VERBOSE,
)


def max_literal_length(pattern: str) -> int:
    """Characters of the longest alternatives of a pattern, with whatever repeats as often as it has to.

    >>> max_literal_length("(ab{3}|[cd]?){10,20}x+y*")
    41
    """
    above: list[tuple[int, int]] = []
    """Of the groups that are open, outside of the innermost one: the longest alternative, and what is read of this."""
    longest = length = last = 0
    for step in _STEP.finditer(pattern):
        kind = step.lastgroup
        if kind == "open":
            above.append((longest, length))
            longest = length = last = 0
        elif kind == "close" and above:
            last = max(longest, length)
            longest, length = above.pop()
            length += last
        elif kind == "either":
            longest, length, last = max(longest, length), 0, 0
        elif kind in ("count", "maybe"):
            times = int(step["count"][:12]) if kind == "count" else 0
            length = min(length + last * (times - 1), _UNBOUNDED)
            last *= times
        elif kind != "more":
            length, last = length + 1, 1
    return max(longest, length) + sum(length for _, length in above)


def check_levels(schema: Mapping[str, Any]) -> None:
    """Refuse a plain schema that leads too deep, through its definitions too.

    Raises:
        ValueError: it does.
    """
    definitions = schema.get("$defs", {})
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    seen: set[str] = set()
    while waiting:
        # Each definition is read where it first comes, as llguidance does.
        node, depth = waiting.pop()
        if depth > MAX_LEVELS:
            raise ValueError(
                f"its references lead over {MAX_LEVELS:,} levels deep, from one definition into the next; expected "
                "less: remove some of them"
            )
        if isinstance(node, dict) and "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in seen:
                seen.add(name)
                waiting.append((definitions[name], depth + 1))
        waiting += [(child, depth + 1) for child in reversed([*children(node)])]


def children(schema: Any) -> Iterator[Any]:
    """The schemas that a plain one holds, in their order, without its definitions."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("anyOf", "allOf", "prefixItems"):
            yield from value
        elif key in ("properties", "patternProperties"):
            yield from value.values()
        elif key in ("items", "additionalProperties"):
            yield value
