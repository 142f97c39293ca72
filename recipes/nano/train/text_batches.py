"""Batches without images: conversations and long texts, packed to a fixed number of tokens.

T tokens, S sequences. A batch has the token keys of ``image_batches``, and ``size`` 0.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from recipes.nano.scenes import verbal
from recipes.nano.text import haystack, text_questions, tokenizer
from recipes.nano.train import batches

PLAIN, NEEDLES, VERBAL = "plain text", "needles", "verbal scenes"
Sequence = tuple[np.ndarray, np.ndarray]  # ids and unshifted labels


@dataclass(frozen=True)
class Texts:
    """Configuration of text batches; it (without ``first`` and ``workers``) and n determine the content of batch n.

    Attributes:
        seed: Seed of the run.
        shares: Share of each kind of text: ``plain text``, ``needles``, ``verbal scenes`` or a key of
            :data:`recipes.nano.text.text_questions.KINDS`.
        tokens: T, tokens of a batch.
        shortest: Minimum number of tokens of a text with a needle.
        longest: Maximum number of tokens of a text with a needle.
        workers: Worker processes; 0 builds batches in this process.
        first: Number of the first batch.
    """

    seed: int
    shares: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 32768
    shortest: int = 256
    longest: int = 512
    workers: int = 2
    first: int = 0

    @property
    def sequences(self) -> int:
        """S, fixed so that compiled layers have one shape; conversations have 40 tokens or more."""
        return max(8, self.tokens // 32)


def loader(texts: Texts, pin_memory: bool = False) -> Iterator[dict[str, Any]]:
    """Yield batches endlessly, in order, from ``texts.first`` on."""
    return batches.loader(TextBatches(texts), texts.workers, pin_memory)


class TextBatches(IterableDataset):
    """The endless sequence of text batches, or this worker's share of it."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, step = (info.id, info.num_workers) if info else (0, 1)
        for number in itertools.count(self.texts.first + worker, step):
            batch = make_batch(self.texts, Random(f"{self.texts.seed} text {number}"))
            yield batches.bundle(batch) if info else batch


def make_batch(texts: Texts, rng: Random) -> dict[str, Any]:
    """Pack sequences until the next does not fit; filler and empty sequences give batches one shape."""
    remaining, found = texts.tokens, list[tuple[Any, Any]]()
    fillers = -(-texts.tokens // 256)  # maximum number of filler pieces of 256 tokens
    while len(found) < texts.sequences - fillers:
        ids, labels = _sequence(texts, rng)
        if len(ids) > remaining:
            break
        found.append((ids, labels))
        remaining -= len(ids)
    lengths = np.array([len(ids) for ids, _ in found] + _filler(remaining), np.int64)
    lengths = np.pad(lengths, (0, texts.sequences - len(lengths)))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    used = texts.tokens - remaining
    input_ids = np.full(texts.tokens, tokenizer.PAD_TOKEN_ID, np.int64)
    labels = np.full(texts.tokens, -100, np.int64)
    input_ids[:used] = np.concatenate([ids for ids, _ in found])
    labels[:used] = np.concatenate([wanted for _, wanted in found])
    return {
        "kind": "text",
        "size": 0,
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "weights": torch.from_numpy(batches.answer_weights(labels)),
        "positions": torch.from_numpy(np.arange(texts.tokens) - np.repeat(starts[:-1], lengths)),
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "max_seqlen": max(512, texts.longest),
        "num_tokens": used,
    }


def _filler(remaining: int) -> list[int]:
    """Split the remaining tokens into pieces of at most 256 tokens."""
    return [256] * (remaining // 256) + ([remaining % 256] if remaining % 256 else [])


def _sequence(texts: Texts, rng: Random) -> Sequence:
    """Draw a conversation, a text or a haystack, not longer than a batch's ``max_seqlen``."""
    while True:
        ids, labels = _drawn(texts, rng)
        if len(ids) <= max(512, texts.longest):
            return ids, labels


def _drawn(texts: Texts, rng: Random) -> Sequence:
    shares = dict(texts.shares)
    others = {kind: shares.pop(kind, 0.0) for kind in (NEEDLES, PLAIN, VERBAL)}
    kind = rng.choices((*others, ""), (*others.values(), sum(shares.values())))[0]
    if kind == VERBAL:
        return batches.tokens(verbal.conversation(rng, text_questions.words(False)))
    if kind == PLAIN:
        ids = np.array(tokenizer.encode(text_questions.text(rng) + "\n"), np.int64)
        labels = ids.copy()
        labels[0] = -100  # nothing predicts the first token
        return ids, labels
    if kind == NEEDLES:
        # Log-uniform lengths: short ones, which are learned first, are as frequent as long ones.
        length = round(texts.shortest * (texts.longest / texts.shortest) ** rng.random())
        return batches.tokens(haystack.haystack(rng, length, questions=1 + length // 512))
    return batches.tokens(text_questions.conversation(rng, shares))
