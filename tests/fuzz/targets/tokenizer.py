"""Text to ids and back: the same text, at once and token by token, without splitting characters."""

from __future__ import annotations

from collections.abc import Iterator

from aria.processor import AriaTokenizer
from aria.processor.chat import MARKERS, Prompt
from aria.processor.tokenizer import TextStream
from tests.fuzz.draw import Draw
from tests.fuzz.tokenizers import tokenizers

LONGEST = 512
WORDS = (*MARKERS, "\u2581", "the quick brown fox", "naïve", "世界", "\r\n", "```", "<0x41>", "<mark4", "0123", "<unk>")


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    tokenizer = draw.one(tokenizers())
    if draw.flag():
        _check_text(tokenizer, draw.text(WORDS, 10))
    _check_text(tokenizer, draw.bytes(100).decode("utf-8", "surrogateescape" if draw.flag() else "replace"))
    _check_ids(tokenizer, [draw.below(tokenizer.vocab_size) for _ in range(draw.below(60))], draw.flag())


def _check_text(tokenizer: AriaTokenizer, text: str) -> None:
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    for kind in (str, Prompt, Prompt.raw):
        try:
            ids = tokenizer.encode_segments(kind(text)) if kind is str else [tokenizer.encode(kind(text))]
        except ValueError as error:
            assert "surrogate" in str(error), error
            continue
        assert all(0 <= index < tokenizer.vocab_size for segment in ids for index in segment)
        whole = "<|img|>".join(map(tokenizer.decode, ids))
        if not any(tokenizer.unk_token_id in segment for segment in ids):
            assert whole == text, f"{text!r} became {whole!r}"
        if kind is Prompt:
            assert special.isdisjoint(ids[0]), "a text gave a special token"


def _check_ids(tokenizer: AriaTokenizer, ids: list[int], skip: bool) -> None:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(index) for index in ids]
    text = "".join([*pieces, stream.flush()])
    assert text == tokenizer.decode(ids, skip_special_tokens=skip), "other text token by token"
    text.encode()
    assert stream.flush() == ""


def seeds() -> Iterator[bytes]:
    for vocabulary in (0, 1):
        yield bytes([vocabulary, 0]) + "hello 世界 \u2581 <|im_start|>".encode()
        yield bytes([vocabulary, *range(1, 200, 3)])
