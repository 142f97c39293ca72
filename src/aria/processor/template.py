"""Render chat templates: Aria's own, and others in Jinja. Markers in message text stay plain text in all of them.

A template may trim, cut and join its input, so spans of text cannot be tracked through it. Before rendering, markers in
the text are broken up with a character that occurs nowhere else; afterwards they are located by it and restored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from aria import templates
from aria.processor.chat import CHAT_TEMPLATE, IMAGE_TOKEN, MARKERS, MEDIA_KINDS, MediaPart, Prompt, read_media, render
from aria.workers import Workers


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
) -> Prompt:
    """Render a conversation with a Jinja template. Aria's own is rendered by :func:`aria.processor.chat.render`.

    Args:
        template: As in ``tokenizer_config.json``, with ``messages``, ``tools``, ``add_generation_prompt``,
            ``raise_exception`` and ``strftime_now`` as in transformers.
        messages: Mappings with a role and whatever else the template reads.
        add_generation_prompt: Passed to the template.
        continue_final_message: End with the last text of the last message.
        tools: JSON Schemas of functions.
        variables: Other variables of the template, from the caller.
        constants: Other variables, from the tokenizer. The template need not use them.
        workers: Worker processes in which other templates than Aria's run; None: this process.

    Returns:
        A prompt in which everything is markup except markers from messages, tools and variables. Every ``<|img|>``
        written by the template is the slot of the next media part of the messages.

    Raises:
        ValueError: A template that cannot be parsed or rendered, variables that it does not use, or different numbers
            of slots and media parts.
    """
    if not isinstance(template, str):
        raise ValueError(f"chat_template should be a Jinja template, but is {template!r:.100}")
    if any(callable(tool) for tool in tools or ()):
        raise ValueError("tools should be JSON Schemas of functions, not functions; describe each as a mapping")
    if is_default_template(template):
        if unknown := sorted(name for name, value in (variables or {}).items() if value is not None):
            raise ValueError(f"unknown arguments: {', '.join(unknown)}; Aria's chat template has no variables")
        return render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other; use one")
    known = templates.variables_of(template, workers)
    variables = {name: value for name, value in (variables or {}).items() if value is not None}
    if unknown := sorted(variables.keys() - known):
        raise ValueError(f"the chat template has no variables {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if isinstance(messages, str) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"messages should be a list of mappings with role and content, but is {messages!r:.100}")
    media = [part for i, message in enumerate(messages) for part in read_media(message, f"message {i}")]
    given = {"messages": [_shown(message) for message in messages], "tools": _plain(tools), **_plain(variables)}
    cut, end = _unused(json.dumps([template, given], ensure_ascii=False, default=str))
    given = _guarded(given, cut)
    if continue_final_message:
        _mark_end(given["messages"], f"{end} ")
    values = {**(constants or {}), **given, "add_generation_prompt": add_generation_prompt}
    text = templates.render(template, values, workers)
    if continue_final_message:
        if end not in text:
            raise ValueError("the chat template omits the final message, which should be continued")
        text, _, rest = text.rpartition(end)
        # If the template trimmed the space after the mark, it would have trimmed the text itself.
        text = text if rest.startswith(" ") else text.rstrip()
    return _read(text.replace(end, ""), cut, media)


def _unused(text: str) -> tuple[str, str]:
    """Two characters that do not occur in a text."""
    unused = [free for free in templates.NONCHARACTERS if free not in text]
    if len(unused) < 2:
        raise ValueError("the messages contain nearly all Unicode noncharacters (U+FDD0 to U+FDEF); remove them")
    return unused[0], unused[1]


def is_default_template(template: str) -> bool:
    """Whether a chat template is Aria's published one, which is not rendered with Jinja."""
    return str(template).strip() == CHAT_TEMPLATE.strip()


def variables_of(template: str, workers: Workers | None = None) -> frozenset[str]:
    """Names of the variables of a template, without the arguments of :func:`render_template`. Aria's has none."""
    if is_default_template(template):
        return frozenset()
    return templates.variables_of(template, workers) - {"messages", "tools", "add_generation_prompt"}


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the template sees it, without the sources of media."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [
            {key: value if key == "type" else "" for key, value in part.items()}
            if isinstance(part, Mapping) and part.get("type") in MEDIA_KINDS
            else part
            for part in content
        ]
    shown = _plain({**message, "content": content} if "content" in message else message)
    assert isinstance(shown, dict), "a mapping becomes a dict"
    return shown


def _plain(value: Any) -> Any:
    """Convert mappings, lists and strings to plain JSON types, so that a template sees no other objects."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _guarded(value: Any, cut: str, key: str = "") -> Any:
    """Insert ``cut`` inside every marker in strings, and inside partial markers at their beginning and end."""
    if isinstance(value, dict):
        return {name: _guarded(one, cut, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_guarded(one, cut) for one in value]
    if not isinstance(value, str) or key in ("role", "type"):  # templates compare these
        return value
    cuts = {at + 1 for at, _ in Prompt(value).literal_markers()}
    for marker in MARKERS:
        for size in range(1, len(marker)):
            if value.endswith(marker[:size]):
                cuts.add(len(value) - size + 1)
            if value.startswith(marker[-size:]):
                cuts.add(0)
    edges = [0, *sorted(cuts), len(value)]
    return cut.join(value[start:stop] for start, stop in pairwise(edges)) if cuts else value


def _mark_end(messages: list[dict[str, Any]], mark: str) -> None:
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + mark
    elif isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        content[-1]["text"] += mark
    else:
        raise ValueError("continue_final_message needs a final message that ends with text")


def _read(text: str, cut: str, media: Sequence[MediaPart]) -> Prompt:
    """Make a prompt of a rendered text. Markers with a cut inside were not written by the template."""
    pieces = text.split(cut)
    plain, cuts, at = "".join(pieces), set(), 0
    for piece in pieces[:-1]:
        at += len(piece)
        cuts.add(at)
    typed, slots = [], []
    for start, marker in sorted(Prompt(plain).literal_markers()):
        if cuts.isdisjoint(range(start + 1, start + len(marker))):
            slots += [start] if marker == IMAGE_TOKEN else []
        else:
            typed.append((start, start + len(marker)))
    if len(slots) != len(media):
        raise ValueError(
            f"the chat template writes {IMAGE_TOKEN} {len(slots)} times for {len(media)} media parts of the messages"
        )
    edges = [0, *(edge for span in typed for edge in span), len(plain)]
    markup = [span for span in list(pairwise(edges))[::2] if span[0] < span[1]]
    return Prompt(plain, slots, media, markup)
