"""Vocabularies for targets: nano's, whose markers of turns are single pieces, and one in which they are several as in
Aria's."""

from __future__ import annotations

from functools import cache

from aria.processor import AriaTokenizer
from tests.helpers import small_tokenizer


@cache
def tokenizers() -> tuple[AriaTokenizer, ...]:
    return AriaTokenizer.from_pretrained(), AriaTokenizer(small_tokenizer.model())
