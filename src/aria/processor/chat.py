"""Render messages to prompts in Aria's chat format, keeping control tokens apart from text that looks like them."""

from __future__ import annotations

import functools
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from aria.processor import calls

IMAGE_TOKEN = "<|img|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
"""Ends a message. It is text of several tokens in Aria's vocabulary, so it is used as a stop string."""
IMAGE_WRAPPING = ("<fim_prefix>", "<fim_suffix>")
"""The text before and after the image tokens of an image."""
# Pieces 0 to 18 of Aria's vocabulary. Only the tokenizer_config.json of rhymes-ai/Aria lists them. Other published
# repositories have the same vocabulary, so they are special there too.
SPECIAL_TOKENS = (
    *("<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", IMAGE_TOKEN),
    *(f"<|reserved{i:03}|>" for i in range(9)),
)
MARKERS = (*SPECIAL_TOKENS, START_OF_TURN, END_OF_TURN, *IMAGE_WRAPPING)
"""Control tokens if written by the template, plain text if written by a user."""
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] is iterable %}{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% elif item['type'] == 'image' %}<fim_prefix><|img|><fim_suffix>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The published Jinja template, as in ``tokenizer_config.json``. :func:`render` produces the same text."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_MORE_KEYS = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}
MEDIA_KINDS = ("image", "video", "document")
_ADDRESSES = ("path", "url")
_SIZES = ("max_image_size", "split_image")
_PART_KEYS = {
    "text": ("type", "text"),
    "image": ("type", "image", *_ADDRESSES, *_SIZES),
    "video": ("type", "video", *_ADDRESSES, "num_frames", "fps", "max_frames", "timestamps", *_SIZES),
    "document": ("type", "document", *_ADDRESSES, "pages", *_SIZES),
}

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class MediaPart:
    """A media part of a message. Fields that are None are decided by the call that prepares it.

    Attributes:
        source: The data, path or address, as for :mod:`aria.media.open`; None: given by the call.
        max_image_size: Side of its crops in pixels.
        split_image: Whether its images are split.
    """

    source: Any = None
    max_image_size: int | None = None
    split_image: bool | None = None


@dataclass(frozen=True)
class ImagePart(MediaPart):
    """An image part of a message."""


@dataclass(frozen=True)
class VideoPart(MediaPart):
    """A clip, which becomes one image per sampled frame, see :func:`aria.media.read.read_clip`.

    Attributes:
        num_frames: Number of frames.
        fps: Frames per second, instead of ``num_frames``.
        max_frames: Limit for ``fps``.
        timestamps: Whether to write ``[MM:SS]`` before each frame.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    timestamps: bool = True


@dataclass(frozen=True)
class DocumentPart(MediaPart):
    """A document, which becomes one image per page.

    Attributes:
        pages: See :func:`aria.media.read.read_document`.
    """

    pages: str | tuple[int, ...] | None = None


class Prompt(str):
    """A string that knows which of its markers were written by the template. All others are plain text.

    It has ``slots``, the offsets of ``<|img|>`` that stand for media, and ``markup``, the spans in which
    ``<|im_start|>``, ``<|im_end|>`` and the other :data:`MARKERS` are control tokens. A marker anywhere else is encoded
    as plain text, to other ids. A clip or document has one slot, which the processor expands to one per frame or page.

    For all other code it is an ordinary string. A plain ``str`` passed to the processor or tokenizer is treated as in
    transformers: every ``<|img|>`` is an image, and every marker a control token, even one from a user.
    ``Prompt(text)`` has neither; ``Prompt.raw(text)`` has control tokens but no images.

    ``+`` on either side, ``strip``, ``lstrip``, ``rstrip`` and slices keep slots and markup; plain strings that are
    added are plain text. All other ``str`` methods that return text (``replace``, ``split``, f-strings, ``%``, ...)
    return a plain ``str``, and raise ValueError if a marker that is plain text would become a control token. A plain
    ``str`` loses the media parts of the messages, so the processor requires them as arguments. ``str(prompt)`` returns
    the plain text without this check, and so do ``"".join`` and ``re.sub``, which cannot be intercepted.

    Attributes:
        slots: Offsets of the ``<|img|>`` that stand for media.
        parts: The media part of each slot.
        markup: ``(start, end)`` of the spans written by the template, in order and not touching.
    """

    slots: tuple[int, ...]
    parts: tuple[MediaPart, ...]
    markup: tuple[tuple[int, int], ...]

    def __new__(
        cls,
        text: str = "",
        slots: Sequence[int] = (),
        parts: Sequence[MediaPart] | None = None,
        markup: Sequence[tuple[int, int]] = (),
    ) -> Prompt:
        self = super().__new__(cls, text)
        self.slots = tuple(slots)
        self.parts = tuple(parts) if parts is not None else (ImagePart(),) * len(self.slots)
        self.markup = tuple(markup)
        if len(self.parts) != len(self.slots):
            raise ValueError(f"{len(self.slots)} slots but {len(self.parts)} image parts")
        if any(not text.startswith(IMAGE_TOKEN, slot) for slot in self.slots):
            raise ValueError(f"every slot should be the offset of a {IMAGE_TOKEN}, but they are {self.slots}")
        edges = [edge for span in self.markup for edge in span]
        if edges != sorted(set(edges)) or (edges and not 0 <= edges[0] < edges[-1] <= len(text)):
            raise ValueError(f"markup should be spans in order within {len(text)} characters, but is {self.markup}")
        return self

    @classmethod
    def of(cls, text: str) -> Prompt:
        """Return a prompt unchanged; read a plain string as transformers does: all markup, all ``<|img|>`` slots."""
        if isinstance(text, Prompt):
            return text
        lengths = [len(segment) for segment in text.split(IMAGE_TOKEN)]
        slots = [sum(lengths[: i + 1]) + i * len(IMAGE_TOKEN) for i in range(len(lengths) - 1)]
        return cls(text, slots, markup=cls.raw(text).markup)

    @classmethod
    def raw(cls, text: str) -> Prompt:
        """Make a prompt in which every marker is a control token, without image slots."""
        return cls(text, markup=[(0, len(text))] if text else ())

    @classmethod
    def concat(cls, pieces: Iterable[str]) -> Prompt:
        """Concatenate pieces. Plain strings are plain text."""
        texts: list[str] = []
        slots: list[int] = []
        parts: list[MediaPart] = []
        markup: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            texts.append(str(piece))
            if isinstance(piece, Prompt):
                slots += (at + slot for slot in piece.slots)
                parts += piece.parts
                for start, end in piece.markup:
                    start = markup.pop()[0] if markup and markup[-1][1] == at + start else at + start
                    markup.append((start, at + end))
            at += len(piece)
        return cls("".join(texts), slots, parts, markup)

    def with_parts(self, parts: Sequence[MediaPart]) -> Prompt:
        """The same prompt with other media parts."""
        return Prompt(str(self), self.slots, parts, self.markup)

    def segments(self) -> list[Prompt]:
        """The text around the slots: one piece more than there are slots."""
        starts = [0, *(slot + len(IMAGE_TOKEN) for slot in self.slots)]
        return [self._cut(start, end) for start, end in zip(starts, [*self.slots, len(self)], strict=True)]

    def literal_markers(self, markers: Iterable[str] = MARKERS) -> Iterator[tuple[int, str]]:
        """Offset and text of each marker that is plain text, grouped by marker."""
        text, ends = str(self), [end for _, end in self.markup]
        for marker in markers:
            at = text.find(marker)
            while at >= 0:
                span = bisect_left(ends, at + len(marker))
                written = span < len(ends) and self.markup[span][0] <= at
                if not (at in self.slots if marker == IMAGE_TOKEN else written):
                    yield at, marker
                at = text.find(marker, at + 1)

    def __add__(self, other: str) -> Prompt:
        """Concatenate. A plain string is plain text."""
        return Prompt.concat([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> Prompt:
        """Prepend a plain string. Python calls this before ``str.__add__``, because this is a subclass."""
        return Prompt.concat([other, self]) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        """A character, or a slice with its slots. A slice that begins or ends inside a slot raises ValueError."""
        if not isinstance(key, slice):
            return str(self)[key]
        start, stop, step = key.indices(len(self))
        if step != 1:
            self._check_plain("a slice with a step")
            return str(self)[key]
        return self._cut(start, max(start, stop))

    def strip(self, chars: str | None = None, /) -> Prompt:
        """Like ``str.strip``, keeping slots and markup."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Prompt:
        """Like ``str.lstrip``, keeping slots and markup."""
        return self._cut(len(self) - len(str(self).lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Prompt:
        """Like ``str.rstrip``, keeping slots and markup."""
        return self._cut(0, len(str(self).rstrip(chars)))

    def _cut(self, start: int, stop: int) -> Prompt:
        first, last = bisect_left(self.slots, start), bisect_left(self.slots, stop)
        for slot in (*self.slots[max(first - 1, 0) : first], *self.slots[max(last - 1, first) : last]):
            end = slot + len(IMAGE_TOKEN)
            if start < stop and (slot < start < end or slot < stop < end):
                raise ValueError(f"characters {start} to {stop} begin or end inside an image slot, {slot} to {end}")
        touching = self.markup[bisect_right([end for _, end in self.markup], start) :]
        markup = [(max(a, start) - start, min(b, stop) - start) for a, b in touching if a < stop and start < stop]
        slots = [slot - start for slot in self.slots[first:last]]
        return Prompt(str(self)[start:stop], slots, self.parts[first:last], markup)

    def _check_plain(self, operation: str) -> None:
        """Reject an operation that returns a plain string, if that would be encoded differently."""
        for _, marker in self.literal_markers():
            became = "an image slot" if marker == IMAGE_TOKEN else "a control token"
            raise ValueError(
                f"{operation} returns a plain string, in which {marker}, here plain text, would become {became}; +, "
                "strip and slices keep them apart, str(prompt) returns the plain text"
            )


def _checked(name: str) -> Callable[..., Any]:
    """Wrap a method of ``str`` so that it first checks whether the prompt may become a plain string."""
    method = getattr(str, name)

    @functools.wraps(method)
    def checked(self: Prompt, *arguments: Any, **named: Any) -> Any:
        self._check_plain(name)
        return method(self, *arguments, **named)

    return checked


for _name in (
    *("__format__", "__mod__", "__rmod__", "__mul__", "__rmul__", "format", "format_map", "join", "replace"),
    *("translate", "removeprefix", "removesuffix", "expandtabs", "center", "ljust", "rjust", "zfill"),
    *("capitalize", "casefold", "lower", "swapcase", "title", "upper"),
    *("partition", "rpartition", "split", "rsplit", "splitlines"),
):
    setattr(Prompt, _name, _checked(_name))


def render(
    messages: Conversation,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
) -> Prompt:
    """Render a conversation to the text format of Aria's training.

    Args:
        messages: Mappings with ``role`` (system, developer, user, assistant, tool; developer is written as system) and
            ``content``: a string, None (empty), or a list of parts ``{"type": "text", "text": ...}``,
            ``{"type": "image", ...}``, ``{"type": "video", ...}`` and ``{"type": "document", ...}``. The source of a
            media part is given under the name of its type (an object in memory; bytes for clips and documents), as
            ``path`` or as ``url`` (an address, a data: URI or a local path). Without a source it is the next item of
            ``images=`` or ``videos=``. All media parts may have ``max_image_size`` and ``split_image``; videos
            ``num_frames``, or ``fps`` with ``max_frames``, and ``timestamps``; documents ``pages``. Keys with the value
            None count as absent. Messages of the assistant may have ``tool_calls`` as in OpenAI's API, and those of
            tools the ``name`` of the tool; both are written to the text. ``tool_call_id`` is not, because results
            follow in order.
        add_generation_prompt: End with the start of an assistant message.
        continue_final_message: Leave the last message open, to be continued.
        tools: Functions that may be called, as in OpenAI's API, described in the system message.

    Raises:
        ValueError: An unknown role, key or part type (named with its place), no message to continue, or both options.
    """
    if continue_final_message and add_generation_prompt:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other; use one")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages should be a list of mappings with role and content, but is {messages!r:.100}")
    if continue_final_message and not messages:
        raise ValueError("there is no message to continue; continue_final_message needs one")
    read = [_read_message(message, f"message {i}") for i, message in enumerate(messages)]
    if tools:
        text = calls.instructions([_read_tool(tool, f"tool {i}") for i, tool in enumerate(tools)])
        if read and read[0][0] == "system":
            read[0][1].append(f"\n\n{text}" if any(read[0][1]) else text)
        else:
            read.insert(0, ("system", [text]))
    if continue_final_message and (not read[-1][1] or isinstance(read[-1][1][-1], MediaPart)):
        raise ValueError("continue_final_message needs a final message that ends with text")
    pieces: list[str] = []
    for role, parts in read:
        pieces.append(Prompt.raw(f"{START_OF_TURN}{role}\n"))
        pieces += [_PLACE.with_parts([part]) if isinstance(part, MediaPart) else str(part) for part in parts]
        pieces.append(Prompt.raw(f"{END_OF_TURN}\n"))
    if continue_final_message:
        pieces.pop()
    if add_generation_prompt:
        pieces.append(Prompt.raw(f"{START_OF_TURN}assistant\n"))
    return Prompt.concat(pieces)


_PLACE = Prompt.of(IMAGE_TOKEN.join(IMAGE_WRAPPING))


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one conversation."""
    return isinstance(conversation, list | tuple) and bool(conversation) and isinstance(conversation[0], list | tuple)


def read_media(message: Any, where: str) -> list[MediaPart]:
    """The media parts of a message. Other content is not checked."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list | tuple) else ()
    media = [
        _read_part(part, f"part {i} of {where}")
        for i, part in enumerate(parts)
        if isinstance(part, Mapping) and part.get("type") in MEDIA_KINDS
    ]
    return [part for part in media if isinstance(part, MediaPart)]


def _read_message(message: Any, where: str) -> tuple[str, list[str | MediaPart]]:
    """Parse a message: the role to write, and its texts and media parts."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} should be a mapping with role and content, but is {message!r:.100}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise ValueError(f"{where} has the role {role!r}; supported are {', '.join(_ROLES)}")
    known = ("role", "content", *_MORE_KEYS.get(role, ()))
    if unknown := sorted(str(key) for key in message if key not in known and message[key] is not None):
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}; supported are {', '.join(known[:-1])} and {known[-1]}"
        )
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"{where} has no content; give a string or a list of parts")
    parts: list[str | MediaPart] = [content or ""] if isinstance(content, str | None) else _read_parts(content, where)
    if role == "tool" and message.get("name") is not None:
        parts.insert(0, f"{message['name']}: ")
    for i, call in enumerate(message.get("tool_calls") or ()):
        parts += ["\n"] if any(parts) else []
        parts.append(_read_call(call, f"call {i} of {where}"))
    return _ROLES[role], parts


def _read_call(call: Any, where: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} should be a mapping such as {{"function": {{"name": ...}}}}, but is {call!r:.100}')
    arguments = function.get("arguments") or "{}"
    try:
        return calls.format_past_call(
            function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments)
        )
    except TypeError as error:
        raise ValueError(f"arguments of {where} cannot be written as JSON: {error}") from None


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{where} should be a mapping such as {{"name": ..., "parameters": JSON Schema}}, but is {tool!r:.100}'
        )
    return {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}


def _read_parts(content: Any, where: str) -> list[str | MediaPart]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"content of {where} should be a string or a list of parts, but is {content!r:.100}")
    return [_read_part(part, f"part {i} of {where}") for i, part in enumerate(content)]


def _read_part(part: Any, where: str) -> str | MediaPart:
    if not isinstance(part, Mapping):
        raise ValueError(f'{where} should be a mapping such as {{"type": "text", "text": ...}}, but is {part!r:.100}')
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise ValueError(f"{where} has the type {kind!r:.100}; supported are {', '.join(_PART_KEYS)}")
    given = {key: value for key, value in part.items() if value is not None}
    if unknown := sorted(str(key) for key in given if key not in _PART_KEYS[kind]):
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}; {kind} parts support {', '.join(_PART_KEYS[kind])}"
        )
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise ValueError(f"text of {where} should be a string, but is {part.get('text')!r:.100}")
        return str(given["text"])
    return _read_medium(kind, given, where)


# Check and description of the value of each setting.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_image_size": (lambda value: type(value) is int, "an int"),
    "split_image": (lambda value: type(value) is bool, "a bool"),
    "num_frames": (lambda value: type(value) is int and value >= 1, "a whole number above 0"),
    "fps": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
    "max_frames": (lambda value: type(value) is int and value >= 1, "a whole number above 0"),
    "timestamps": (lambda value: type(value) is bool, "a bool"),
    "pages": (
        lambda value: (
            isinstance(value, str) or (isinstance(value, list | tuple) and all(type(n) is int for n in value))
        ),
        'text such as "1-3,7" or a list of numbers',
    ),
}


def _read_medium(kind: str, given: Mapping[str, Any], where: str) -> MediaPart:
    settings = {key: value for key, value in given.items() if key in _SETTINGS}
    for key, value in settings.items():
        holds, expected = _SETTINGS[key]
        if not holds(value):
            raise ValueError(f"{key} of {where} should be {expected}, but is {value!r:.100}")
    if "fps" in given and "num_frames" in given:
        raise ValueError(f"{where} gives num_frames and fps; use one of them")
    if "max_frames" in given and "fps" not in given:
        raise ValueError(f"max_frames of {where} requires fps; use num_frames for a fixed number")
    sources = [key for key in (kind, *_ADDRESSES) if key in given]
    if len(sources) > 1:
        raise ValueError(f"{where} gives its {kind} as {' and '.join(sources)}; use one of them")
    source = _read_source(sources[0], given[sources[0]], kind, where) if sources else None
    if kind == "document":
        if source is None:
            raise ValueError(f"{where} has no source; give it as document (bytes), path or url")
        if isinstance(settings.get("pages"), list):
            settings["pages"] = tuple(settings["pages"])
        return DocumentPart(source, **settings)
    return VideoPart(source, **settings) if kind == "video" else ImagePart(source, **settings)


def _read_source(key: str, value: Any, kind: str, where: str) -> Any:
    if key == "url" and not isinstance(value, str):
        raise ValueError(f"url of {where} should be a string, but is a {type(value).__name__}; objects go under {kind}")
    if key == "path":
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"path of {where} should be a string or Path, but is a {type(value).__name__}")
        return Path(value)  # never an address
    return value
