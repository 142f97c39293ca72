"""Messages to prompt: Aria's chat format, with every place for a picture marked apart from text that looks like one."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

IMAGE_TOKEN = "<|img|>"
END_OF_TURN = "<|im_end|>"
"""Ends a message; ordinary text of several tokens in Aria's vocabulary, so an answer is searched for it as text."""
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
"""The published template, in Jinja, as it stands in ``tokenizer_config.json``; :func:`render` writes the same text."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
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
    """What a message says about one medium; fields that are None are decided by the call that prepares it.

    Attributes:
        source: the medium, path or address, as :mod:`aria.processor.media` takes it; None: the call gives it.
        max_image_size: side of its crops in pixels.
        split_image: whether its pictures are split.
    """

    source: Any = None
    max_image_size: int | None = None
    split_image: bool | None = None


@dataclass(frozen=True)
class ImagePart(MediaPart):
    """A picture."""


@dataclass(frozen=True)
class VideoPart(MediaPart):
    """A clip: as many pictures as frames are taken of it, see :func:`aria.processor.video.read_clip`.

    Attributes:
        num_frames: how many.
        fps: or how many a second.
        max_frames: with ``fps``.
        timestamps: whether ``[MM:SS]`` stands before each.
    """

    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    timestamps: bool = True


@dataclass(frozen=True)
class DocumentPart(MediaPart):
    """A document: as many pictures as pages are taken of it.

    Attributes:
        pages: see :func:`aria.processor.document.read_document`.
    """

    pages: str | tuple[int, ...] | None = None


class Prompt(str):
    """Text that knows which of its ``<|img|>`` are places for media; the others are just text.

    A clip or document has one place; the processor opens it into a place for each frame or page.

    It is an ordinary string for everybody else. A plain ``str`` given to the processor or tokenizer has a picture at
    every ``<|img|>``, as in transformers; ``Prompt(text)`` has none, however the text reads.

    ``+`` on either side, ``strip``, ``lstrip``, ``rstrip`` and slices keep the places; what a plain string adds is just
    text. Every other method of ``str`` that makes text (``replace``, ``split``, ``format``, f-strings, ``%``, ...)
    gives a plain ``str``, and raises ValueError where an ``<|img|>`` is just text and would become a place. A plain
    ``str`` knows nothing of what messages say of their pictures; the processor then asks for them. ``str(prompt)`` asks
    for the plain text by name; ``"".join`` and ``re.sub`` do too, because they read the characters and never ask.

    Attributes:
        slots: offsets of the ``<|img|>`` that are places for media.
        parts: what is known about the medium of each slot.
    """

    slots: tuple[int, ...]
    parts: tuple[MediaPart, ...]

    def __new__(cls, text: str = "", slots: Sequence[int] = (), parts: Sequence[MediaPart] | None = None) -> Prompt:
        self = super().__new__(cls, text)
        self.slots = tuple(slots)
        self.parts = tuple(parts) if parts is not None else (ImagePart(),) * len(self.slots)
        if len(self.parts) != len(self.slots):
            raise ValueError(f"{len(self.slots)} slots but {len(self.parts)} picture parts")
        if any(not text.startswith(IMAGE_TOKEN, slot) for slot in self.slots):
            raise ValueError(f"every slot should be the offset of a {IMAGE_TOKEN}, but they are {self.slots}")
        return self

    @classmethod
    def of(cls, text: str) -> Prompt:
        """The prompt itself, or a plain string with a slot at every ``<|img|>``."""
        if isinstance(text, Prompt):
            return text
        lengths = [len(segment) for segment in text.split(IMAGE_TOKEN)]
        return cls(text, [sum(lengths[: i + 1]) + i * len(IMAGE_TOKEN) for i in range(len(lengths) - 1)])

    def segments(self) -> list[str]:
        """Text around the slots: one piece more than there are slots."""
        starts = [0, *(slot + len(IMAGE_TOKEN) for slot in self.slots)]
        return [str(self)[start:end] for start, end in zip(starts, [*self.slots, len(self)], strict=True)]

    def __add__(self, other: str) -> Prompt:
        """Joined text; ``<|img|>`` in a plain string that is added stays text."""
        if not isinstance(other, str):
            return NotImplemented
        slots, parts = (other.slots, other.parts) if isinstance(other, Prompt) else ((), ())
        return Prompt(str(self) + str(other), (*self.slots, *(len(self) + s for s in slots)), (*self.parts, *parts))

    def __radd__(self, other: str) -> Prompt:
        """A plain string with this after it; Python asks here first, because this class is the narrower one."""
        return Prompt(other) + self if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        """One character, or a slice with its places. A slice that begins or ends inside a place is a ValueError."""
        if not isinstance(key, slice):
            return str(self)[key]
        start, stop, step = key.indices(len(self))
        if step != 1:
            self._check_plain("a slice with a step")
            return str(self)[key]
        return self._cut(start, max(start, stop))

    def strip(self, chars: str | None = None, /) -> Prompt:
        """As of a string, with the places that stay."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Prompt:
        """As of a string, with the places that stay."""
        return self._cut(len(self) - len(str(self).lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Prompt:
        """As of a string, with the places that stay."""
        return self._cut(0, len(str(self).rstrip(chars)))

    def _cut(self, start: int, stop: int) -> Prompt:
        slots, parts = [], []
        for slot, part in zip(self.slots, self.parts, strict=True):
            end = slot + len(IMAGE_TOKEN)
            if start <= slot and end <= stop:
                slots.append(slot - start)
                parts.append(part)
            elif start < end and slot < stop and start < stop:
                raise ValueError(f"characters {start} to {stop} end inside a picture's place, {slot} to {end}")
        return Prompt(str(self)[start:stop], slots, parts)

    def _check_plain(self, operation: str) -> None:
        """Refuse an operation that gives a plain string where a plain string would mean other pictures."""
        if self.slots != Prompt.of(str(self)).slots:
            raise ValueError(
                f"{operation} makes a plain string of this prompt: here an {IMAGE_TOKEN} is just text, and would "
                "become a picture's place; +, strip and slices keep the places, str(prompt) gives the plain text"
            )


def _checked(name: str) -> Callable[..., Any]:
    """A method of ``str`` that asks the prompt first whether a plain string may stand for it."""
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


def render(messages: Conversation, *, add_generation_prompt: bool = False) -> Prompt:
    """One conversation as the text that Aria was trained on.

    Args:
        messages: mappings with ``role`` (system, developer, user, assistant, tool; developer is written as system) and
            ``content``: a string, None (empty), or a list of parts ``{"type": "text", "text": ...}``,
            ``{"type": "image", ...}``, ``{"type": "video", ...}`` and ``{"type": "document", ...}``. The medium stands
            under the name of its type (an object in memory; clips and documents: bytes), ``path`` or ``url`` (an
            address, a data: URI or a local path), or under none of them: then it is the next of ``images=`` or
            ``videos=``. All of them may carry ``max_image_size`` and ``split_image``; videos ``num_frames``, or
            ``fps`` with ``max_frames``, and ``timestamps``; documents ``pages``. Keys whose value is None count as
            absent.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        ValueError: an unknown role, key or part type, by name and place.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages should be a list of mappings with role and content, but is {messages!r:.100}")
    text = ""
    slots: list[int] = []
    parts: list[MediaPart] = []
    for i, message in enumerate(messages):
        role, content = _read_message(message, f"message {i}")
        text += f"<|im_start|>{role}\n"
        for part in [content] if isinstance(content, str) else _read_parts(content, f"message {i}"):
            if isinstance(part, MediaPart):
                text += "<fim_prefix>"
                slots.append(len(text))
                parts.append(part)
                text += f"{IMAGE_TOKEN}<fim_suffix>"
            else:
                text += part
        text += "<|im_end|>\n"
    if add_generation_prompt:
        text += "<|im_start|>assistant\n"
    return Prompt(text, slots, parts)


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one."""
    return isinstance(conversation, list | tuple) and bool(conversation) and isinstance(conversation[0], list | tuple)


def _read_message(message: Any, where: str) -> tuple[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} should be a mapping with role and content, but is {message!r:.100}")
    if unknown := sorted(key for key in message if key not in ("role", "content") and message[key] is not None):
        raise ValueError(f"{where} has unknown keys: {', '.join(map(str, unknown))}; known are role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"{where} has the role {role!r}; known are {', '.join(_ROLES)}")
    if "content" not in message:
        raise ValueError(f"{where} has no content; give a string or a list of parts")
    return _ROLES[role], "" if message["content"] is None else message["content"]


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
            f"{where} has unknown keys: {', '.join(unknown)}; {kind} parts know {', '.join(_PART_KEYS[kind])}"
        )
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise ValueError(f"text of {where} should be a string, but is {part.get('text')!r:.100}")
        return str(given["text"])
    return _read_medium(kind, given, where)


# Key -> what its values should be.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_image_size": (lambda value: type(value) is int, "a int"),
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
        raise ValueError(f"max_frames of {where} goes with fps; num_frames says how many frames there are")
    sources = [key for key in (kind, *_ADDRESSES) if key in given]
    if len(sources) > 1:
        noun = "picture" if kind == "image" else kind
        raise ValueError(f"{where} gives its {noun} under {' and '.join(sources)}; use one of them")
    source = _read_source(sources[0], given[sources[0]], kind, where) if sources else None
    if kind == "document":
        if source is None:
            raise ValueError(f"{where} names no document; give it under document (bytes), path or url")
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
        return Path(value)  # never an address, however it is spelled
    return value
