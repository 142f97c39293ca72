"""Messages to prompt: Aria's chat format, with every place for a picture marked apart from text that looks like one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<|img|>"
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
_SOURCES = ("image", "path", "url")
_PART_KEYS = {"text": ("type", "text"), "image": ("type", *_SOURCES, "max_image_size", "split_image")}

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class ImagePart:
    """What a message says about one picture; fields that are None are decided by the call that prepares it.

    Attributes:
        source: the picture, path or address, as :func:`~aria.processor.media.load_image` takes it.
        max_image_size: side of its crops in pixels.
        split_image: whether it is split.
    """

    source: Any = None
    max_image_size: int | None = None
    split_image: bool | None = None


class Prompt(str):
    """Text that knows which of its ``<|img|>`` are places for pictures; the others are just text.

    It is an ordinary string for everybody else. A plain ``str`` given to the processor or tokenizer has a picture at
    every ``<|img|>``, as in transformers; ``Prompt(text)`` has none, however the text reads. Adding and stripping keep
    what it knows. Any other operation (formatting, replacing, slicing) gives a plain ``str``; if its text then reads as
    if it had more places than there are pictures, that is an error with both counts, never a wrong answer.

    Attributes:
        slots: offsets of the ``<|img|>`` that are places for pictures.
        parts: what is known about the picture of each slot.
    """

    slots: tuple[int, ...]
    parts: tuple[ImagePart, ...]

    def __new__(cls, text: str = "", slots: Sequence[int] = (), parts: Sequence[ImagePart] | None = None) -> Prompt:
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
        slots, parts = (other.slots, other.parts) if isinstance(other, Prompt) else ((), ())
        return Prompt(str(self) + str(other), (*self.slots, *(len(self) + s for s in slots)), (*self.parts, *parts))

    def __radd__(self, other: str) -> Prompt:
        """The same, with the plain string in front."""
        return Prompt(str(other)) + self

    def strip(self, chars: str | None = None, /) -> Prompt:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Prompt:
        return self._cut(len(self) - len(str(self).lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> Prompt:
        return self._cut(0, len(str(self).rstrip(chars)))

    def _cut(self, start: int, end: int) -> Prompt:
        """The text from ``start`` to ``end``, with the places that lie in it whole."""
        kept = [
            (slot - start, part)
            for slot, part in zip(self.slots, self.parts, strict=True)
            if slot >= start and slot + len(IMAGE_TOKEN) <= end
        ]
        return Prompt(str(self)[start:end], [slot for slot, _ in kept], [part for _, part in kept])


def render(messages: Conversation, *, add_generation_prompt: bool = False) -> Prompt:
    """One conversation as the text that Aria was trained on.

    Args:
        messages: mappings with ``role`` (system, developer, user, assistant, tool; developer is written as system) and
            ``content``: a string, None (empty), or a list of parts ``{"type": "text", "text": ...}`` and
            ``{"type": "image", ...}``. The picture stands under ``image`` (an object in memory), ``path`` or ``url``
            (an address, a data: URI or a local path), or under none of them: then it is the next of ``images=``. Image
            parts may carry ``max_image_size`` and ``split_image``. Keys whose value is None count as absent.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        ValueError: an unknown role, key or part type, by name and place.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages should be a list of mappings with role and content, but is {messages!r:.100}")
    text = ""
    slots: list[int] = []
    parts: list[ImagePart] = []
    for i, message in enumerate(messages):
        role, content = _read_message(message, f"message {i}")
        text += f"<|im_start|>{role}\n"
        for part in [content] if isinstance(content, str) else _read_parts(content, f"message {i}"):
            if isinstance(part, ImagePart):
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


def _read_parts(content: Any, where: str) -> list[str | ImagePart]:
    if not isinstance(content, list | tuple):
        raise ValueError(f"content of {where} should be a string or a list of parts, but is {content!r:.100}")
    return [_read_part(part, f"part {i} of {where}") for i, part in enumerate(content)]


def _read_part(part: Any, where: str) -> str | ImagePart:
    if not isinstance(part, Mapping):
        raise ValueError(f'{where} should be a mapping such as {{"type": "text", "text": ...}}, but is {part!r:.100}')
    kind = part.get("type")
    if kind not in _PART_KEYS:
        raise ValueError(f"{where} has the type {kind!r}; supported are {', '.join(_PART_KEYS)}")
    given = {key: value for key, value in part.items() if value is not None}
    if unknown := sorted(key for key in given if key not in _PART_KEYS[kind]):
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}; {kind} parts know {', '.join(_PART_KEYS[kind])}"
        )
    if kind == "text":
        if not isinstance(given.get("text"), str):
            raise ValueError(f"text of {where} should be a string, but is {part.get('text')!r:.100}")
        return str(given["text"])
    for key, expected in (("max_image_size", int), ("split_image", bool)):
        if type(given.get(key, expected())) is not expected:
            raise ValueError(f"{key} of {where} should be a {expected.__name__}, but is {given[key]!r}")
    sources = [key for key in _SOURCES if key in given]
    if len(sources) > 1:
        raise ValueError(f"{where} gives its picture under {' and '.join(sources)}; use one of them")
    return ImagePart(
        source=_read_source(sources[0], given[sources[0]], where) if sources else None,
        max_image_size=given.get("max_image_size"),
        split_image=given.get("split_image"),
    )


def _read_source(key: str, value: Any, where: str) -> Any:
    if key == "url" and not isinstance(value, str):
        raise ValueError(f"url of {where} should be a string, but is a {type(value).__name__}; objects go under image")
    if key == "path":
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"path of {where} should be a string or Path, but is a {type(value).__name__}")
        return Path(value)  # never an address, however it is spelled
    return value
