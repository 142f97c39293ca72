"""Convert structural tags, as in vLLM and xgrammar, to Lark: free text in which tagged parts follow a schema.

The older form lists ``structures`` (``begin``, ``schema``, ``end``) and the ``triggers`` that start one in free text.
The newer one has a nested ``format``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANY = r"/(.|\n)*/"


def lark(tag: Mapping[str, Any], of_schema: Callable[[Any], str], of_pattern: Callable[[str], str]) -> str:
    """Return the Lark grammar of a structural tag.

    Args:
        tag: ``structures`` and ``triggers``, or ``format``.
        of_schema: Converts a JSON schema to a Lark expression.
        of_pattern: Converts a regular expression to a Lark expression.

    Raises:
        ValueError: Not a structural tag, or an unsupported part (named with its place).
    """
    if ("structures" in tag) == ("format" in tag):
        raise ValueError("a structural tag must have structures and triggers, or format")
    form = tag.get("format")
    if form is None:
        parts = [
            {"type": "tag", "begin": _field(one, "begin", "structures"), "end": _field(one, "end", "structures"),
             "content": {"type": "json_schema", "json_schema": one.get("schema") or {}}}
            for one in _listed(tag, "structures", "structural_tag")
        ]  # fmt: skip
        form = {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": parts}
    writer = _TagWriter(of_schema, of_pattern)
    start = writer.part(form, "format")
    return "\n".join([f"start: {start}", f"ANY: {ANY}", *writer.rules])


class _TagWriter:
    def __init__(self, of_schema: Callable[[Any], str], of_pattern: Callable[[str], str]):
        self._of_schema, self._of_pattern = of_schema, of_pattern
        self.rules: list[str] = []

    def _rule(self, body: str, options: str = "") -> str:
        self.rules.append(f"p{len(self.rules)}{options}: {body}")
        return f"p{len(self.rules) - 1}"

    def part(self, form: Any, place: str) -> str:
        """The Lark expression of a part."""
        kind = form.get("type") if isinstance(form, Mapping) else None
        if kind == "const_string":
            return _text(_field(form, "value", place))
        if kind == "json_schema":
            return self._of_schema(form.get("json_schema"))
        if kind == "regex":
            return self._of_pattern(_field(form, "pattern", place))
        if kind == "any_text" and not form.get("excludes"):
            return "ANY"
        if kind in ("sequence", "or"):
            inner = [self.part(one, f"{place}.elements[{i}]") for i, one in enumerate(_listed(form, "elements", place))]
            return self._rule((" " if kind == "sequence" else " | ").join(inner))
        if kind == "tag":
            return self._rule(f"{_text(_field(form, 'begin', place))} {self._rest(form, place)}")
        if kind == "triggered_tags" and not form.get("excludes"):
            return self._triggered(form, place)
        if kind == "tags_with_separator":
            return self._separated(form, place)
        raise ValueError(
            f"{place} has the type {kind!r:.40}, or has excludes; expected const_string, json_schema, regex, "
            "any_text, sequence, or, tag, triggered_tags or tags_with_separator, without excludes"
        )

    def _rest(self, form: Mapping[str, Any], place: str) -> str:
        """The Lark expression of the content and end of a tag."""
        ends = form.get("end")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, list) or not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"{place}.end should be a string or a list of strings, but is {ends!r:.60}")
        content = form.get("content")
        end = " | ".join(_text(one) for one in ends)
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(ends):
            # Lazy: stops at the first end.
            return self._rule(f"ANY ({end})", "[lazy]")
        return f"{self.part(content, f'{place}.content')} ({end})"

    def _triggered(self, form: Mapping[str, Any], place: str) -> str:
        triggers = _listed(form, "triggers", place)
        tags = []
        for i, tag in enumerate(_listed(form, "tags", place)):
            begin = _field(tag, "begin", f"{place}.tags[{i}]")
            trigger = next((one for one in triggers if isinstance(one, str) and one and begin.startswith(one)), None)
            if trigger is None:
                raise ValueError(f"{place}.tags[{i}].begin is {begin!r:.60}, which starts with none of the triggers")
            head = self._rule(f"ANY {_text(trigger)}", "[lazy]")
            first = _text(begin[len(trigger) :])
            tags.append(self._rule(f"{head} {first} {self._rest(tag, f'{place}.tags[{i}]')}"))
        one = self._rule(" | ".join(tags))
        if form.get("stop_after_first"):
            return self._rule(one if form.get("at_least_one") else f"{one} | ANY")
        return self._rule(f"{one}{'+' if form.get('at_least_one') else '*'} ANY")

    def _separated(self, form: Mapping[str, Any], place: str) -> str:
        tags = [self.part({"type": "tag", **tag}, f"{place}.tags[{i}]")
                for i, tag in enumerate(_listed(form, "tags", place))]  # fmt: skip
        one = self._rule(" | ".join(tags))
        more = "" if form.get("stop_after_first") else f" ({_text(_field(form, 'separator', place))} {one})*"
        return self._rule(f"({one}{more})" + ("" if form.get("at_least_one") else "?"))


def _listed(form: Mapping[str, Any], name: str, place: str) -> Sequence[Any]:
    found = form.get(name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{place}.{name} should be a non-empty list, but is {found!r:.60}")
    return found


def _field(form: Any, name: str, place: str) -> str:
    found = form.get(name) if isinstance(form, Mapping) else None
    if not isinstance(found, str):
        raise ValueError(f"{place}.{name} should be a string, but is {found!r:.60}")
    return found


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
