"""Chat templates: Aria's own, and others in Jinja; text of messages stays text in all of them.

A template may trim, cut and join what it is given, so spans of text cannot be followed through it. Markers in the text
are broken up by a character that occurs nowhere else before rendering, and found and put together again after it.
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
    """One conversation as a Jinja template writes it; Aria's own is written by :func:`aria.processor.chat.render`.

    Args:
        template: as in ``tokenizer_config.json``; it knows ``messages``, ``tools``, ``add_generation_prompt``,
            ``raise_exception`` and ``strftime_now``, as with transformers.
        messages: mappings with a role and whatever else the template reads.
        add_generation_prompt: what it means is up to the template.
        continue_final_message: end with the last text of the last message.
        tools: JSON Schemas of functions.
        variables: what else the template reads, from the caller.
        constants: the same, from the tokenizer; the template need not read them.
        workers: where a template runs that is not Aria's; None: in this process.

    Returns:
        A prompt in which all is markup but the markers that stood in messages, tools and variables. Every ``<|img|>``
        that the template writes is the place of the next medium of the messages.

    Raises:
        ValueError: a template that cannot be parsed or rendered, variables that it does not read, or other numbers of
            places and media.
    """
    if not isinstance(template, str):
        raise ValueError(f"chat_template should be a Jinja template, but is {template!r:.100}")
    if any(callable(tool) for tool in tools or ()):
        raise ValueError("tools should be JSON Schemas of functions, not functions; describe each as a mapping")
    if is_default_template(template):
        if unknown := sorted(name for name, value in (variables or {}).items() if value is not None):
            raise ValueError(f"unknown arguments: {', '.join(unknown)}; Aria's chat template reads none")
        return render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt opens a new turn and continue_final_message the last one; use one")
    known = templates.variables_of(template, workers)
    variables = {name: value for name, value in (variables or {}).items() if value is not None}
    if unknown := sorted(variables.keys() - known):
        raise ValueError(f"the chat template reads no {', '.join(unknown)}; it reads {', '.join(sorted(known))}")
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
            raise ValueError("the chat template leaves out the final message, which should be continued")
        text, _, rest = text.rpartition(end)
        # A template that trims has cut off the space behind the mark, and would have trimmed the text itself.
        text = text if rest.startswith(" ") else text.rstrip()
    return _read(text.replace(end, ""), cut, media)


def _unused(text: str) -> tuple[str, str]:
    """Two characters that stand nowhere in a text."""
    unused = [free for free in templates.NONCHARACTERS if free not in text]
    if len(unused) < 2:
        raise ValueError("the messages hold nearly all of Unicode's noncharacters (U+FDD0 to U+FDEF); remove them")
    return unused[0], unused[1]


def is_default_template(template: str) -> bool:
    """Whether a chat template is the published one, which is not rendered with Jinja."""
    return str(template).strip() == CHAT_TEMPLATE.strip()


def variables_of(template: str, workers: Workers | None = None) -> frozenset[str]:
    """Names that a template reads beside those of :func:`render_template`'s own arguments; Aria's reads none."""
    if is_default_template(template):
        return frozenset()
    return templates.variables_of(template, workers) - {"messages", "tools", "add_generation_prompt"}


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the template sees it: of media that they are there, and not what they are."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = [
            {key: value if key == "type" else "" for key, value in part.items()}
            if isinstance(part, Mapping) and part.get("type") in MEDIA_KINDS
            else part
            for part in content
        ]
    shown = _plain({**message, "content": content} if "content" in message else message)
    assert isinstance(shown, dict), "a mapping stays one"
    return shown


def _plain(value: Any) -> Any:
    """Mappings, lists and strings as JSON has them, so that a template sees no object of ours or the caller's."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _guarded(value: Any, cut: str, key: str = "") -> Any:
    """The same with ``cut`` inside every marker of its texts, and in what begins or ends one at their edges."""
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
    """The prompt in a rendered text: markers with a cut inside were not written by the template."""
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
            f"the chat template writes {len(slots)} places {IMAGE_TOKEN} for the {len(media)} media of the messages"
        )
    edges = [0, *(edge for span in typed for edge in span), len(plain)]
    markup = [span for span in list(pairwise(edges))[::2] if span[0] < span[1]]
    return Prompt(plain, slots, media, markup)
