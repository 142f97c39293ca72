"""Messages to prompts, by Aria's chat template and others: texts are unchanged, and no marker in them becomes a control
token or an image slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aria.processor import AriaTokenizer
from aria.processor.chat import CHAT_TEMPLATE, END_OF_TURN, IMAGE_TOKEN, IMAGE_WRAPPING, MARKERS, START_OF_TURN, Prompt
from tests.fuzz.draw import Draw
from tests.fuzz.tokenizers import tokenizers

LONGEST = 512
WORDS = (*MARKERS, "<|im_", "end|>", "<|", "|>", "img", "\u2581", "＜|img|＞", "system", "assistant\n", "<fim_")
TEMPLATES = (
    CHAT_TEMPLATE,
    "{% for m in messages %}[INST]{{ m.role }}:{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|img|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "[/INST]{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}",
    "{% for m in messages %}{{ m.role ~ '<|im_start|>' }}{% if m.content is string %}{{ m.content[:9] }}{% endif %}"
    "{{ tools | tojson if tools else '' }}{% for p in m.content if p.type == 'image' %}<|img|>{% endfor %}{% endfor %}",
)
_ROLES = ("user", "assistant", "system", "tool")


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    template, tokenizer = draw.one(TEMPLATES), draw.one(tokenizers())
    messages = [_message(draw) for _ in range(1 + draw.below(3))]
    tools = [{"name": draw.text(WORDS), "description": draw.text(WORDS)}] if draw.byte() % 4 == 3 else None
    settings: dict[str, Any] = {"chat_template": template, "tools": tools}
    settings[draw.one(("add_generation_prompt", "continue_final_message"))] = True
    try:
        prompt = tokenizer.render(messages, **settings)
    except ValueError:
        return
    media = sum(
        part["type"] == "image" for one in messages if isinstance(one["content"], list) for part in one["content"]
    )
    assert len(prompt.slots) == media
    _check_markers(prompt, messages, tokenizer)
    if template == CHAT_TEMPLATE:
        _check_turns(prompt, messages, tools, settings)


def _message(draw: Draw) -> dict[str, Any]:
    if draw.flag():
        return {"role": draw.one(_ROLES), "content": draw.text(WORDS)}
    parts = [
        {"type": "image"} if draw.byte() % 3 == 2 else {"type": "text", "text": draw.text(WORDS)} for _ in range(3)
    ]
    return {"role": draw.one(_ROLES), "content": parts}


def _check_markers(prompt: Prompt, messages: Sequence[Any], tokenizer: AriaTokenizer) -> None:
    """Ids have as many control tokens as the template wrote markers."""
    try:
        segments = tokenizer.encode_segments(prompt)
    except ValueError as error:  # half of a surrogate pair
        assert "surrogate" in str(error), error
        return
    assert len(segments) == len(prompt.slots) + 1
    ids = [index for segment in segments for index in segment]
    written = [str(prompt)[start:end] for start, end in prompt.markup]
    special = {index for index in tokenizer.all_special_ids if index != tokenizer.unk_token_id}
    for index in special:
        marker = tokenizer.convert_ids_to_tokens(index)
        expected = 0 if marker == IMAGE_TOKEN else sum(text.count(marker) for text in written)
        assert ids.count(index) == expected, f"{ids.count(index)} of {marker}, the template wrote {expected}"
    for marker in (START_OF_TURN, END_OF_TURN, *IMAGE_WRAPPING):
        usual = tokenizer.encode(Prompt.raw(marker))
        expected = sum(text.count(marker) for text in written)
        assert sum(_count(segment, usual) for segment in segments) <= expected, f"{marker} came from a text"
    for segment, text in zip(segments, prompt.segments(), strict=True):
        if tokenizer.unk_token_id not in segment:
            assert tokenizer.decode(segment) == str(text), f"{text!r} became {tokenizer.decode(segment)!r}"


def _count(ids: Sequence[int], part: Sequence[int]) -> int:
    return sum(list(ids[at : at + len(part)]) == list(part) for at in range(len(ids) - len(part) + 1))


def _check_turns(prompt: Prompt, messages: Sequence[Any], tools: Any, settings: dict[str, Any]) -> None:
    """A turn for each message, and what the template wrote and nothing else is markup."""
    starts = sum(str(prompt)[start:end].count(START_OF_TURN) for start, end in prompt.markup)
    added = bool(tools) and messages[0]["role"] != "system"
    assert starts == len(messages) + added + bool(settings.get("add_generation_prompt"))
    for message in messages:
        content = message["content"]
        for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            assert text in str(prompt)


def seeds() -> Iterator[bytes]:
    yield from (bytes([template, vocabulary, *range(3, 160, 5)]) for template in range(3) for vocabulary in range(2))
    yield from (
        bytes([0, vocabulary, 1, 1, 6, 0, 0, marker, 0, 0, marker, 1, marker])
        for vocabulary in (0, 1)
        for marker in range(24)
    )
