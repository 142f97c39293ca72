"""Rows of every supported format to conversations for the processor, and which turns are trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aria.processor.calls import add_instructions, format_call, text_or_parts
from aria.train.data.report import CONVERT, RowError
from aria.train.data.sources import Row

_ROLES = ("system", "developer", "user", "assistant", "tool")
_ROW_FIELDS = {"text": ("text",), "messages": ("messages", "images", "video", "videos", "tools", "parallel_tool_calls")}
_MESSAGE_FIELDS = ("role", "content", "weight", "name", "tool_calls", "tool_call_id", "refusal")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_OPENAI = {"image_url": "image", "video_url": "video", "file": "document"}
_OTHERS = {
    ("conversations",): "ShareGPT's format",
    ("instruction", "output"): "Alpaca's format",
    ("instruction", "response"): "Alpaca's format",
    ("query", "response"): "ms-swift's query and response",
    ("prompt", "completion"): "a prompt and a completion",
    ("prompt", "response"): "a prompt and a response",
    ("question", "answer"): "a question and an answer",
    ("input", "output"): "an input and an output",
}
"""Fields that identify unsupported formats."""
_OTHER_ROLES = ("human", "gpt", "chatgpt", "model", "bot", "observation", "function", "function_call", "tool_call")
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""Placeholders of media in texts for ms-swift, LLaMA-Factory and LLaVA."""


@dataclass(frozen=True)
class Text:
    """Plain text, trained on as a whole."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages that name their media."""

    messages: tuple[dict[str, Any], ...]
    """Messages for :func:`aria.processor.chat.render`."""
    trained_on: tuple[bool, ...]
    """For each message whether it is trained on: answers are, unless their ``weight`` is 0."""


@dataclass(frozen=True)
class MediaDefaults:
    """Defaults for media settings that a row leaves out."""

    num_frames: int
    timestamps: bool
    sizes: tuple[int, ...]
    """Sides of the model's crops in pixels, smallest first."""


def read_row(row: Row, defaults: MediaDefaults) -> tuple[Text | Conversation, list[str]]:
    """Read a row.

    Returns:
        Its text or conversation, and the names of unknown fields.

    Raises:
        RowError: It cannot be trained on.
    """
    fields = {key: value for key, value in row.fields.items() if value is not None}
    kind = "messages" if "messages" in fields else "text"
    if kind not in fields:
        if other := next((name for names, name in _OTHERS.items() if fields.keys() >= set(names)), None):
            raise RowError("other format", f"the row is in {other}, not in messages; {CONVERT}")
        known = ", ".join(sorted(fields)) or "none"
        raise RowError("no messages", f"expected a row with messages (a conversation) or text; its fields are {known}")
    others = sorted(key for key in fields if key not in _ROW_FIELDS[kind])
    if kind == "text":
        if not isinstance(fields["text"], str) or not fields["text"].strip():
            raise RowError("empty text", f"text should be a string that is not blank, but is {fields['text']!r:.60}")
        return Text(fields["text"]), others
    return _conversation(fields, row.folder, defaults), others


def _conversation(fields: Mapping[str, Any], folder: Path, defaults: MediaDefaults) -> Conversation:
    listed = _listed(fields["messages"], "messages")
    if not listed:
        raise RowError("bad message", "messages is an empty list")
    given = _Given(fields, folder, defaults)
    messages, trained_on = [], []
    for i, message in enumerate(listed):
        read, weight = _message(message, f"message {i}", given)
        messages.append(read)
        trained_on.append(read["role"] == "assistant" and weight)
    if not given.complete or any(fields.get(name) for name in ("image", "audio", "audios")):
        _check_placeholders(messages)
    given.finish()
    if fields.get("tools"):
        messages = add_instructions(messages, _functions(fields["tools"]))
        # A system message may have been inserted at the beginning.
        trained_on = [False] * (len(messages) - len(trained_on)) + trained_on
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(message["role"] for message in messages)
        raise RowError("no answer", f"no message is from the assistant; roles are {roles:.60}")
    if not any(trained_on):
        raise RowError("nothing to learn", "every answer has weight 0")
    for i, (message, counts) in enumerate(zip(messages, trained_on, strict=True)):
        if counts and not _text(message["content"]).strip():
            raise RowError("empty answer", f"message {i} is an empty answer; weight 0 leaves it out")
    return Conversation(tuple(messages), tuple(trained_on))


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _check_placeholders(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse texts with placeholders of other formats, which would be trained on as text."""
    texts = "".join(_text(message["content"]) for message in messages)
    if found := [placeholder for placeholder in _PLACEHOLDERS if placeholder in texts]:
        raise RowError(
            "other format",
            f"{found[0]} in a text is a placeholder of ms-swift, LLaMA-Factory and LLaVA; here media are parts of the "
            f"message's content; {CONVERT}",
        )


def _listed(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise RowError("bad message", f"{name} should be a list, but is {value!r:.60}")
    return value


class _Given:
    """Media listed beside the messages, as in the authors' format, which are assigned to the parts that name none."""

    def __init__(self, fields: Mapping[str, Any], folder: Path, defaults: MediaDefaults):
        self.folder, self.defaults = folder, defaults
        videos = fields.get("videos", [])
        if "video" in fields:
            if "videos" in fields:
                raise RowError("media count", "the row has video and videos; use one of them")
            videos = fields["video"] if isinstance(fields["video"], list | tuple) else [fields["video"]]
        self._media = {"image": _listed(fields.get("images", []), "images"), "video": _listed(videos, "videos")}
        self._used = {"image": 0, "video": 0}

    def next(self, kind: str, where: str) -> Any:
        """The medium for the next place."""
        if kind not in self._media:
            raise RowError("bad message", f"{where} names no {kind}; set path or url")
        used = self._used[kind]
        self._used[kind] += 1
        # Surplus places count too, so that the error has both numbers.
        return self._media[kind][used] if used < len(self._media[kind]) else None

    @property
    def complete(self) -> bool:
        """Whether the numbers of places and media are equal."""
        return all(self._used[kind] == len(media) for kind, media in self._media.items())

    def finish(self) -> None:
        """Refuse a row with different numbers of places and media."""
        for kind, media in self._media.items():
            if self._used[kind] != len(media):
                noun = "image" if kind == "image" else "clip"
                raise RowError(
                    "media count", f"messages have {self._used[kind]} places for {noun}s, but the row has {len(media)}"
                )


def _message(message: Any, where: str, given: _Given) -> tuple[dict[str, Any], bool]:
    if not isinstance(message, Mapping):
        raise RowError("bad message", f"{where} should be an object with role and content, but is {message!r:.60}")
    fields = {key: value for key, value in message.items() if value is not None}
    role = fields.get("role")
    if role is None and fields.keys() >= {"from", "value"}:
        raise RowError("other format", f"{where} has from and value, as in ShareGPT's format; {CONVERT}")
    if role in _OTHER_ROLES:
        raise RowError("other format", f"{where} has the role {role!r}, which is another format's; {CONVERT}")
    if role not in _ROLES:
        raise RowError("unknown role", f"{where} has the role {role!r:.40}; known are {', '.join(_ROLES)}")
    if unknown := sorted(str(key) for key in fields if key not in _MESSAGE_FIELDS):
        raise RowError(
            "bad message", f"{where} has unknown fields: {', '.join(unknown)}; known are {', '.join(_MESSAGE_FIELDS)}"
        )
    weight = fields.get("weight", 1)
    if weight not in (0, 1):
        raise RowError("bad message", f"weight of {where} should be 0 or 1, but is {weight!r:.40}")
    content = fields.get("content", "")
    if not isinstance(content, str):
        parts = _listed(content, f"content of {where}, if not text,")
        content = [_part(part, f"part {i} of {where}", given) for i, part in enumerate(parts)]
    if role == "assistant":
        content = _with_calls(content, fields, where)
    elif role == "tool" and "name" in fields:
        # As the server marks whose result it is.
        named = f"{fields['name']}: "
        content = named + content if isinstance(content, str) else [{"type": "text", "text": named}, *content]
    return {"role": role, "content": content}, bool(weight)


def _functions(tools: Any) -> list[dict[str, Any]]:
    """Name, description and parameters of each of a row's tools, as the server passes them."""
    functions = []
    for tool in _listed(tools, "tools"):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("bad message", f"tools should be a list of functions with names: {tool!r:.60}")
        named = ("name", "description", "parameters")
        functions.append({key: function[key] for key in named if function.get(key) is not None})
    return functions


def _with_calls(content: Any, fields: Mapping[str, Any], where: str) -> Any:
    """An answer, with its tool calls as the model writes them."""
    refusal = fields.get("refusal", "")
    if not isinstance(refusal, str):
        raise RowError("bad message", f"refusal of {where} should be a string, but is {refusal!r:.60}")
    content = text_or_parts(content) or refusal
    calls = []
    for call in _listed(fields.get("tool_calls", ()), f"tool_calls of {where}"):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("bad message", f"tool_calls of {where} should hold functions with names: {call!r:.60}")
        try:
            given = function.get("arguments") or "{}"
            # A string in OpenAI's API; an object in many data sets.
            calls.append(format_call(function["name"], given if isinstance(given, str) else json.dumps(given)))
        except (TypeError, ValueError) as error:
            raise RowError("bad message", f"tool_calls of {where}: {error}") from None
    if not calls:
        return content
    if isinstance(content, str):
        return "\n".join([content, *calls] if content else calls)
    return [*content, {"type": "text", "text": "".join(f"\n{call}" for call in calls)}]


def _part(part: Any, where: str, given: _Given) -> dict[str, Any]:
    """A part for the processor, with its medium resolved."""
    if not isinstance(part, Mapping):
        raise RowError("bad message", f"{where} should be an object with type, but is {part!r:.60}")
    kind, fields = part.get("type"), {key: value for key, value in part.items() if value is not None}
    if not isinstance(kind, str):
        raise RowError("bad message", f"type of {where} should be a string, but is {kind!r:.60}")
    if kind in ("text", "refusal"):
        text = fields.get(kind)
        if not isinstance(text, str):
            raise RowError("bad message", f"{kind} of {where} should be a string, but is {text!r:.60}")
        return {"type": "text", "text": text}
    if kind in _OPENAI:
        fields = _from_openai(kind, fields, where, given.defaults)
    elif kind not in ("image", "video", "document"):
        known = ", ".join(("text", "image", "video", "document", *_OPENAI))
        raise RowError("bad message", f"{where} has the type {kind!r:.40}; known are {known}")
    kind = fields["type"]
    named = [key for key in (kind, "path", "url") if key in fields]
    # The authors' files have "text": null, or "", in every part.
    if kind in ("image", "video") and fields.pop("text", ""):
        raise RowError("bad message", f"{where} is a {kind} and has text; give the text a part of its own")
    if len(named) > 1:
        raise RowError("bad message", f"{where} names its medium under {' and '.join(named)}; use one of them")
    source = fields.pop(named[0]) if named else given.next(kind, where)
    if kind == "video":
        if isinstance(source, Mapping):
            fields = {**_frames_of(source, where), **fields}
            source = source.get("path")
        fields = {**({} if "fps" in fields else {"num_frames": given.defaults.num_frames}), **fields}
        fields = {"timestamps": given.defaults.timestamps, **fields}
    if source is None:
        return fields  # the row has too few media, which is an error once all are counted
    return {**fields, kind: _located(source, given.folder, where)}


def _frames_of(video: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Frames in the authors' ``video`` object; numbers that are not positive mean the default."""
    if unknown := sorted(key for key in video if key not in ("path", "num_frames") and video[key] is not None):
        raise RowError("bad message", f"the video of {where} has unknown fields: {', '.join(unknown)}")
    count = video.get("num_frames")
    return {"num_frames": count} if isinstance(count, int) and count > 0 else {}


def _located(source: Any, folder: Path, where: str) -> Any:
    """A medium; paths are relative to the folder of their file."""
    if isinstance(source, Mapping):  # an image that datasets has not decoded
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str):
        if not source.strip():
            raise RowError("missing medium", f"{where} names its medium by an empty string")
        return source if _ADDRESS.match(source) else folder / source
    if source is None:
        raise RowError("missing medium", f"{where} names no medium")
    return source


def _from_openai(kind: str, fields: Mapping[str, Any], where: str, defaults: MediaDefaults) -> dict[str, Any]:
    """A part of OpenAI's chat format, with the server's extensions, as a part for the processor."""
    inner = fields.get(kind)
    inner = {"url": inner} if isinstance(inner, str) else inner
    if not isinstance(inner, Mapping):
        raise RowError("bad message", f"{kind} of {where} should be an object, but is {inner!r:.60}")
    inner = {key: value for key, value in inner.items() if value is not None}
    part = {"type": _OPENAI[kind], **dict(_settings(inner, kind, defaults, where))}
    if kind != "file":
        part["url"] = inner.get("url", "")
        return part
    data = inner.get("file_url") or inner.get("file_data") or ""
    if "file_data" in inner and isinstance(data, str) and data[:5].lower() != "data:":
        data = f"data:application/pdf;base64,{data}"
    return {**part, "url": data}


def _settings(inner: Mapping[str, Any], kind: str, defaults: MediaDefaults, where: str) -> Iterator[tuple[str, Any]]:
    named = ("file_url", "file_data", "filename") if kind == "file" else ("url",)
    alike = {
        "image_url": {"split": "split_image"},
        "video_url": {name: name for name in ("num_frames", "fps", "max_frames", "timestamps")},
        "file": {"pages": "pages", "split": "split_image"},
    }[kind]
    for key, value in inner.items():
        if key == "detail":
            if value not in ("auto", "low", "high"):
                raise RowError("bad message", f"detail of {where} should be auto, low or high, but is {value!r:.40}")
            if value != "auto":
                yield "max_image_size", defaults.sizes[0 if value == "low" else -1]
        elif key in alike:
            yield alike[key], value
        elif key not in named:
            known = ", ".join((*named, "detail", *alike))
            raise RowError("bad message", f"{kind} of {where} has the unknown field {key!r}; known are {known}")
