"""Conversations to tokens and targets, with the processor's own code, so that tokens are those of inference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from aria.config import AriaConfig
from aria.media.budgets import PixelBudget
from aria.media.cache import MediaCache
from aria.media.limits import MediaSettings
from aria.processor import AriaProcessor
from aria.processor.chat import END_OF_TURN, IMAGE_WRAPPING, START_OF_TURN, MediaPart, Prompt, render
from aria.processor.expand import expand, resolve_defaults
from aria.processor.image import NeededSizes
from aria.processor.image_inputs import Crops, ImageInput, read_image_inputs
from aria.processor.template import is_default_template
from aria.train.batch import Sample
from aria.train.data.report import RowError
from aria.train.data.rows import Conversation, MediaDefaults, Text, read_row
from aria.train.data.settings import DataSettings
from aria.train.data.sources import Row
from aria.train.loss import IGNORE_INDEX
from aria.workers import BusyError

_NEWLINE = "\n"


class Note(NamedTuple):
    """A row was used with changes."""

    kind: str
    message: str


class Encoded(NamedTuple):
    """An encoded row."""

    samples: list[Sample]
    """One for a conversation; one or more for a text."""
    notes: list[Note]


class Turn(NamedTuple):
    """One message as tokens."""

    ids: list[int]
    trained_on: list[bool]
    """For each token whether it is predicted."""
    images: list[ImageInput]
    role: str

    @property
    def num_crops(self) -> int:
        return sum(len(image.extents) for image in self.images)


class RowEncoder:
    """Encodes rows as sequences. Thread-safe.

    Args:
        processor: Processor of the model.
        config: Configuration of the model.
        settings: ``[data]``.
        tokens: Tokens of a batch. No sequence is longer than that, nor than the model's context.

    Raises:
        ValueError: Model, processor and settings do not fit together.
    """

    def __init__(self, processor: AriaProcessor, config: AriaConfig, settings: DataSettings, tokens: int):
        self._processor, self._settings = processor, settings
        self.patch_size = config.vision.patch_size
        images = processor.image_processor
        self._defaults = MediaDefaults(settings.num_frames, settings.timestamps, images.sizes)
        self.max_length = min(settings.max_length or tokens, tokens, config.text.max_position_embeddings)
        if config.image_token_index != processor.tokenizer.image_token_id:
            raise ValueError(
                f"the model's image_token_index is {config.image_token_index}, but its tokenizer has "
                f"{processor.tokenizer.image_token_id}; the two do not belong together"
            )
        if not is_default_template(processor.tokenizer.chat_template):
            raise ValueError(
                "the tokenizer brings a chat template of its own, but training uses Aria's template; "
                "remove it from tokenizer_config.json and chat_template.jinja"
            )
        if settings.max_image_size is not None and settings.max_image_size not in images.sizes:
            raise ValueError(
                f"[data] max_image_size is {settings.max_image_size}; this model's sizes are "
                f"{', '.join(map(str, images.sizes))}"
            )
        if settings.labels == "joint" and not self._newline_splits():
            raise ValueError(
                '[data] labels = "joint" needs a tokenizer in which a newline is a token by itself, and this one '
                'joins it with others; use "per_turn"'
            )

    @property
    def _media(self) -> MediaSettings:
        settings = self._settings
        workers = settings.workers if settings.media_workers is None else settings.media_workers
        return replace(self._processor.media, workers=workers)

    def _newline_splits(self) -> bool:
        """Whether text before and after a newline is tokenized independently."""
        encode = self._processor.tokenizer.encode
        before, after = f"{START_OF_TURN}assistant{_NEWLINE}", f"yes{END_OF_TURN}{_NEWLINE}"
        parted = encode(before) + encode(after) + encode(before)
        return len(encode(_NEWLINE)) == 1 and encode(before + after + before) == parted

    def __call__(self, row: Row) -> Encoded:
        """The sequences of a row.

        Raises:
            RowError: It cannot be used.
        """
        read, unread = read_row(row, self._defaults)
        notes = [Note("unread fields", f"unknown fields are ignored: {', '.join(unread)}")] if unread else []
        if isinstance(read, Text):
            with _faults("text", "bad text"):
                samples, more = self._text(read.text)
        else:
            samples, more = self._conversation(read)
        return Encoded(samples, notes + more)

    def _text(self, text: str) -> tuple[list[Sample], list[Note]]:
        """Encode text. Targets are its tokens from the second to the end-of-text token; markers in it are just text."""
        tokenizer, most = self._processor.tokenizer, self.max_length
        ids = tokenizer.encode(Prompt(text))
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        # A piece of one token would have no target: then it takes a token from the one before.
        starts = list(range(0, len(ids), most))
        if len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts[-1] -= 1
        ends = [*starts[1:], len(ids)]
        samples = [_sample(ids[a:b], [True] * (b - a)) for a, b in zip(starts, ends, strict=True)]
        notes = []
        if len(samples) > 1:
            notes.append(Note("text cut", f"{len(ids):,} tokens became {len(samples)} sequences of at most {most:,}"))
        if START_OF_TURN in text or END_OF_TURN in text:
            notes.append(Note("markers read as text", "a conversation belongs in messages, where its turns are known"))
        return samples, notes

    def _conversation(self, conversation: Conversation) -> tuple[list[Sample], list[Note]]:
        turns = self._turns(conversation)
        kept = self._fitted(turns)
        notes = []
        if len(kept) < len(turns):
            message = f"{len(turns) - len(kept)} of {len(turns)} messages left out: {self._size(turns)}"
            notes.append(Note("trimmed", message))
        ids = [index for turn in kept for index in turn.ids]
        trained_on = [one for turn in kept for one in turn.trained_on]
        crops = tuple(image.load() for turn in kept for image in turn.images)
        return [_sample(ids, trained_on, crops)], notes

    def _turns(self, conversation: Conversation) -> list[Turn]:
        budget, cache = PixelBudget(self._media.prompt_pixels), MediaCache()
        turns = []
        for i, (message, trained_on) in enumerate(zip(conversation.messages, conversation.trained_on, strict=True)):
            with _faults(f"message {i}", "bad message"):
                role, content = rendered(message)
            with _faults(f"message {i}", "bad medium"):
                content, images = self._opened(content, budget, cache)
            with _faults(f"message {i}", "bad message"):
                turns.append(self._turn(role, content, images, trained_on))
        return turns

    def _opened(self, content: Prompt, budget: PixelBudget, cache: MediaCache) -> tuple[Prompt, list[ImageInput]]:
        """The content with clips and documents expanded to images, and the images."""
        settings, images, media = self._settings, self._processor.image_processor, self._media
        content = resolve_defaults(
            content, images, max_image_size=settings.max_image_size, split_image=settings.split_image
        )

        def cutting(part: MediaPart) -> dict[str, Any]:
            return {"max_image_size": part.max_image_size, "split_image": part.split_image}

        expanded = expand(content, images, media, cache, budget, lambda part: NeededSizes(images, **cutting(part)))
        content = expanded.prompt
        own = [cutting(part) for part in content.parts]
        return content, read_image_inputs([part.source for part in content.parts], images, own, media, budget)

    def _turn(self, role: str, content: Prompt, images: list[ImageInput], trained_on: bool) -> Turn:
        """Encode a message. Targets are its text, the end of the turn and the newline after it."""
        tokenizer = self._processor.tokenizer
        headers: tuple[str, ...] = (START_OF_TURN, role, _NEWLINE)
        ends: tuple[str, ...] = (END_OF_TURN, _NEWLINE)
        if self._settings.labels == "joint":
            # Newlines end both header and message and split tokenization there, so that encoded turns can be joined.
            content += Prompt.raw("".join(ends))
            headers, ends = ("".join(headers),), ()
        head = [index for text in headers for index in tokenizer.encode(text)]
        tail = [index for text in ends for index in tokenizer.encode(text)]
        first, *rest = tokenizer.encode_segments(content)
        body, counts = self._filled(first, rest, images)
        counts = [False] * len(head) + counts + [True] * len(tail)
        return Turn([*head, *body, *tail], [trained_on and one for one in counts], images, role)

    def _filled(
        self, first: list[int], rest: Iterable[list[int]], images: Sequence[ImageInput]
    ) -> tuple[list[int], list[bool]]:
        """Ids with image tokens, and which ids may be targets: neither image tokens nor the markers around them."""
        tokenizer = self._processor.tokenizer
        marks = tuple(tokenizer.convert_tokens_to_ids(mark) for mark in IMAGE_WRAPPING)
        ids, counts = list(first), [True] * len(first)
        for image, segment in zip(images, rest, strict=True):
            if ids and ids[-1] == marks[0]:
                counts[-1] = False
            places = len(image.extents) * self._processor.size_conversion[image.size]
            ids += [tokenizer.image_token_id] * places + segment
            counts += [False] * places + [True] * len(segment)
            if segment and segment[0] == marks[1]:
                counts[-len(segment)] = False
        return ids, counts

    def _fitted(self, turns: list[Turn]) -> list[Turn]:
        """The turns that fit: system messages at the beginning, and whole exchanges."""
        if self._fits(turns):
            return turns
        limit = f"{self.max_length:,} tokens"
        if self._settings.max_crops is not None:
            limit += f" and {self._settings.max_crops} crops"
        if self._settings.too_long == "skip":
            raise RowError("too long", f"{self._size(turns)}, {limit} fit")
        start = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
        system, exchanges = turns[:start], _exchanges(turns[start:])
        while len(exchanges) > 1:
            del exchanges[0 if self._settings.too_long == "drop_first" else -1]
            kept = system + [turn for exchange in exchanges for turn in exchange]
            while kept and kept[-1].role != "assistant":
                kept.pop()
            if any(any(turn.trained_on) for turn in kept) and self._fits(kept):
                return kept
        raise RowError("too long", f"{self._size(turns)}, {limit} fit, and no whole turns that fit have an answer")

    def _fits(self, turns: Sequence[Turn]) -> bool:
        most = self._settings.max_crops
        return sum(len(turn.ids) for turn in turns) <= self.max_length and (
            most is None or sum(turn.num_crops for turn in turns) <= most
        )

    def _size(self, turns: Sequence[Turn]) -> str:
        crops = sum(turn.num_crops for turn in turns)
        return f"{sum(len(turn.ids) for turn in turns):,} tokens" + (f" and {crops} crops" if crops else "")


def rendered(message: dict[str, Any]) -> tuple[str, Prompt]:
    """The role of a message in the prompt, and the text between the header and the end of the turn."""
    prompt = render([message])
    role = str(prompt).partition(_NEWLINE)[0].removeprefix(START_OF_TURN)
    content = prompt[len(START_OF_TURN + role + _NEWLINE) : len(prompt) - len(END_OF_TURN + _NEWLINE)]
    assert isinstance(content, Prompt), "a slice of a prompt is not a prompt"
    return role, content


@contextmanager
def _faults(where: str, kind: str) -> Iterator[None]:
    """Turn errors of a message into :class:`RowError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise RowError("missing medium", f"{where}: {error}") from error
    except (ValueError, TypeError, OSError, MemoryError, BusyError) as error:
        raise RowError(kind, f"{where}: {error}") from error


def _exchanges(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Group turns into exchanges that begin with the user."""
    groups: list[list[Turn]] = []
    for before, turn in zip([None, *turns], turns, strict=False):
        if before is None or (turn.role == "user" and before.role != "user"):
            groups.append([])
        groups[-1].append(turn)
    return groups


def _sample(ids: Sequence[int], trained_on: Sequence[bool], crops: tuple[Crops, ...] = ()) -> Sample:
    """A sequence whose targets are shifted to the token before."""
    input_ids, counts = torch.tensor(ids), torch.tensor(trained_on)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    targets[:-1] = torch.where(counts[1:], input_ids[1:], IGNORE_INDEX)
    return Sample(input_ids, targets, crops)
