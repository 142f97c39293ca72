"""Measure normalized schemas: their depth, and the longest text that they force.

If only one continuation is possible, llguidance computes it byte by byte before the next token is sampled: 100 KB take
0.15 s and 40 MB. Grammars that could force long texts are compiled with ``no_forcing``, which allows one token at a
time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from aria.grammars.trampoline import Steps, run

MAX_FORCED = 10_000
"""Bytes that a grammar may force at once: 10 ms."""
MAX_LEVELS = 5_000
"""Nesting of subschemas, through references too. llguidance recurses, with up to 10 KB of stack per level."""
_UNBOUNDED = 10**12


def max_forced_length(schema: Mapping[str, Any]) -> int:
    """Estimate the longest text, in characters, that a schema forces at once.

    Every alternative counts as if it were the only one, and a recursive reference counts once: since values are finite,
    every cycle contains a choice.

    Args:
        schema: A schema from :func:`aria.grammars.schemas.normalize`.
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
    """Length in characters of the longest alternatives of a regular expression, with minimal repetitions.

    >>> max_literal_length("(ab{3}|[cd]?){10,20}x+y*")
    41
    """
    above: list[tuple[int, int]] = []
    """For each open group: the length of its longest alternative so far, and of the current one."""
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
    """Reject a normalized schema that is nested too deeply, including its definitions.

    Raises:
        ValueError: Too deep.
    """
    definitions = schema.get("$defs", {})
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    seen: set[str] = set()
    while waiting:
        # Each definition is visited at its first reference, as in llguidance.
        node, depth = waiting.pop()
        if depth > MAX_LEVELS:
            raise ValueError(
                f"its references are nested over {MAX_LEVELS:,} levels deep, from one definition into the next; remove "
                "some of them"
            )
        if isinstance(node, dict) and "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name not in seen:
                seen.add(name)
                waiting.append((definitions[name], depth + 1))
        waiting += [(child, depth + 1) for child in reversed([*children(node)])]


def children(schema: Any) -> Iterator[Any]:
    """The direct subschemas of a normalized schema, in order, without its definitions."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("anyOf", "allOf", "prefixItems"):
            yield from value
        elif key in ("properties", "patternProperties"):
            yield from value.values()
        elif key in ("items", "additionalProperties"):
            yield value
