"""Rows -> batches for ever: read ahead by threads, packed in one order, and gone on with exactly where they stopped.

N rows of an epoch. The rows of all epochs are one endless deck, which is dealt to the ranks in turns: rank r of W takes
the rows numbered r, r + W, r + 2 W, ... So every row is used as often as the mixer says, and no rank ever runs out of
batches while another has some.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

from aria.config import AriaConfig
from aria.processor import AriaProcessor
from aria.train.batch import Batch, Sample
from aria.train.data.encode import Encoded, Encoder, rendered
from aria.train.data.order import Order, permutation
from aria.train.data.packer import Packer
from aria.train.data.report import Report, RowError
from aria.train.data.rows import Conversation, Customs, read_row
from aria.train.data.settings import DataSettings
from aria.train.data.sources import Sources

LEAST_TRIED = 100
"""Rows after which a stream may give up; a rank of many may meet the same few bad ones again and again."""

Read = TypeVar("Read")


class Waiting(NamedTuple):
    """A sequence that is to be packed."""

    number: int
    """Of its row, in the deck."""
    part: int
    """Which sequence of that row."""
    parts: int
    """How many that row has."""
    sample: Sample

    @property
    def tokens(self) -> int:
        return self.sample.tokens

    @property
    def num_crops(self) -> int:
        return self.sample.num_crops


class Held(NamedTuple):
    """What waits of a row, as a state tells it."""

    number: int
    """Of the row, in the deck."""
    left: tuple[int, ...]
    """Its sequences that wait, in their order: each enters the packer when the one before it was taken."""
    parts: int
    """How many sequences the row has."""


class DataStream:
    """Batches of one rank, without end or for so many passes over the data.

    With ``passes``, the rows of all ranks together are those of so many epochs, rounded to whole rows and at least one;
    the last batches are as full as the rows that are left make them.

    Attributes:
        report: what was used, trimmed and skipped so far.
        rows_in_all: that come before the stream ends, each as often as it comes, over all ranks.
    """

    def __init__(
        self,
        settings: DataSettings,
        processor: AriaProcessor,
        config: AriaConfig,
        *,
        tokens: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        passes: float | None = None,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank should be from 0 to {world - 1}, but is {rank}")
        self._settings, self._tokens, self._rank, self._world, self._seed = settings, tokens, rank, world, seed
        self._filler_id = processor.tokenizer.pad_token_id
        self._sources = Sources(settings.weights, settings.split)
        self._order = Order(
            self._sources.counts,
            list(settings.weights.values()),
            seed=seed,
            shuffle=settings.shuffle,
            resample=settings.resample,
        )
        self._encoder = Encoder(processor, config, settings, tokens)
        self._passes = passes
        self.rows_in_all = sys.maxsize if passes is None else max(1, round(passes * self._order.size))
        self._next = 0
        self._held: list[Held] = []
        self.report = Report()

    @property
    def rows(self) -> int:
        """N, over all ranks."""
        return self._order.size

    @property
    def sources(self) -> Sources:
        """What is read."""
        return self._sources

    @property
    def epochs(self) -> float:
        """Passes over the data up to the last batch that was given: rows that wait to be packed do not count."""
        used = max(0.0, self._next - sum(len(one.left) / one.parts for one in self._held))
        if self._passes is None:
            return used * self._world / self._order.size
        # Ranks have as many rows, or one less; each is done when its own are.
        own = len(range(self._rank, self.rows_in_all, self._world))
        return self._passes * (used / own if own else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch that it gave: plain numbers, for JSON."""
        return {
            "rank": self._rank,
            "world": self._world,
            "next": self._next,
            "held": [[one.number, list(one.left), one.parts] for one in self._held],
            "rows": self._order.size,
            "sources": self._sources.fingerprint(),
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where streams of the same data, settings and seed were.

        Args:
            state: of one rank, or of all of them. On the same rank of as many ranks the same batches come as would have
                come there. On another number of ranks all go on from the first row that one of the states given has not
                read, and share what waits of rows before it: with those of all ranks no row is left out, and a few come
                twice.

        Raises:
            ValueError: the data have changed.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        for one in states:
            if not self._sources.has(one["sources"]) or one["rows"] != self._order.size:
                raise ValueError(
                    f"the data have changed since the state was saved: {'; '.join(one['sources'])} gave "
                    f"{one['rows']:,} rows, {'; '.join(self._sources.fingerprint())} give {self._order.size:,}; start "
                    "anew, or bring the old files back"
                )
        # Ranks that share sequences bring the same state.
        alike = {(one["rank"], one["world"]): one for one in states}.values()
        own = [one for one in states if (one["rank"], one["world"]) == (self._rank, self._world)]
        if own:
            self._next, self._held = own[0]["next"], _held(own[0])
        else:
            unread = min(one["next"] * one["world"] + one["rank"] for one in states)
            waiting = sorted(held for one in alike for held in _held(one) if held.number < unread)
            self._next, self._held = max(0, -((self._rank - unread) // self._world)), waiting[self._rank :: self._world]
        # Over all ranks each row counts once: what none continues is counted on the first.
        self.report = Report.joined(Report.of(one["report"]) for one in (own[:1] or (() if self._rank else alike)))

    def __iter__(self) -> Iterator[Batch]:
        packer: Packer[Waiting] = Packer(self._tokens, self._settings.max_crops, self._settings.lookahead)
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            numbers = sorted({held.number for held in self._held})
            again = {number: encoded for number, encoded in reader.read(numbers) if isinstance(encoded, Encoded)}
            if lost := [number for number in numbers if number not in again]:
                raise ValueError(f"{self._where(lost[0])} was usable when the state was saved, and is not any more")
            for number, left, parts in self._held:
                packer.add_pieces(Waiting(number, part, parts, again[number].samples[part]) for part in left)
            first = self._next * self._world + self._rank
            arriving = reader.read(range(first, self.rows_in_all, self._world))
            useless, most = 0, max(LEAST_TRIED, -(-self._order.size // self._world))
            while True:
                while not packer.ready:
                    number, encoded = next(arriving, (-1, None))
                    if encoded is None:
                        break
                    self._next = number // self._world + 1
                    samples = self._account(number, encoded)
                    self._add(packer, number, samples)
                    useless = 0 if samples else useless + 1
                    if useless == most:
                        raise ValueError(f"none of {useless:,} rows can be used: {self.report}")
                if not packer.held:
                    if useless and self._world == 1 and not self.report.sequences:
                        raise ValueError(f"none of {useless:,} rows can be used: {self.report}")
                    return
                taken = packer.take()
                self._held = [
                    Held(pieces[0].number, tuple(piece.part for piece in pieces), pieces[0].parts)
                    for pieces in packer.held
                ]
                yield self._packed([waiting.sample for waiting in taken])
        finally:
            reader.close()

    def rows_that_fill(self, batches: int) -> int:
        """How many rows, from the first on, have the tokens of so many batches: on every rank the same number."""
        left = batches * self._tokens
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            for number, encoded in reader.read(range(self._order.size)):
                if isinstance(encoded, Encoded):
                    left -= sum(sample.tokens for sample in encoded.samples)
                if left < 0:
                    return max(1, number)
        finally:
            reader.close()
        return self._order.size

    def once(self, rows: int | None = None) -> Iterator[Batch]:
        """Batches of one pass: each of this rank's rows once, the last batch as full as they make it. The report begins
        anew.

        Args:
            rows: the first ones, over all ranks; None: all.
        """
        self.report = Report()
        packer: Packer[Waiting] = Packer(self._tokens, self._settings.max_crops, self._settings.lookahead)
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            for number, encoded in reader.read(range(self._rank, rows or self._order.size, self._world)):
                self._add(packer, number, self._account(number, encoded))
                while packer.ready:
                    yield self._packed([waiting.sample for waiting in packer.take()])
            while packer.held:
                yield self._packed([waiting.sample for waiting in packer.take()])
        finally:
            reader.close()

    def filler(self) -> Batch:
        """A batch with nothing in it, for a rank that has no more while others do."""
        return Batch.pack([], self._tokens, self._filler_id)

    def _add(self, packer: Packer[Waiting], number: int, samples: Sequence[Sample]) -> None:
        """Let the sequences of a row wait: those of a document shuffled, and among those of other documents."""
        parts = len(samples)
        if not self._settings.shuffle:
            packer.add(Waiting(number, part, parts, sample) for part, sample in enumerate(samples))
            return
        order = permutation(parts, self._seed, 3, number).tolist()
        packer.add_pieces(Waiting(number, part, parts, samples[part]) for part in order)

    def _where(self, number: int) -> str:
        return self._sources.where(self._order.row(number))

    def _read(self, number: int) -> Encoded:
        return self._encoder(self._sources.read(self._order.row(number)))

    def _account(self, number: int, encoded: Encoded | RowError) -> list[Sample]:
        """The sequences of a row, none if it cannot be used; both go into the report."""
        report, where = self.report, self._where(number)
        report.rows += 1
        if isinstance(encoded, RowError):
            if self._settings.on_error == "stop":
                raise ValueError(f"{where}: {encoded.kind}: {encoded}") from encoded
            report.skip(encoded.kind, f"{where}: {encoded}")
            return []
        for note in encoded.notes:
            report.note(note.kind, f"{where}: {note.said}")
        return encoded.samples

    def _packed(self, samples: list[Sample]) -> Batch:
        batch, report = Batch.pack(samples, self._tokens, self._filler_id), self.report
        report.batches += 1
        report.sequences += len(samples)
        report.tokens += self._tokens - batch.filler
        report.filler += batch.filler
        report.labels += batch.labels
        report.crops += sum(sample.num_crops for sample in samples)
        return batch


class Reader(Generic[Read]):
    """Reads rows ahead of use, by threads, and gives them in the order that was asked for.

    Threads, because decoding, resizing and tokenising leave the interpreter free, nothing has to be copied between
    processes, and nothing can be forked at the wrong moment.
    """

    def __init__(self, read: Callable[[int], Read], workers: int, ahead: int):
        self._read, self._ahead = read, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="aria-data") if workers else None

    def read(self, keys: Iterable[int]) -> Iterator[tuple[int, Read | RowError]]:
        """Of each key what became of it; a fault that belongs to the row is given, others are raised."""
        if self._pool is None:
            for key in keys:
                yield key, self._tried(key)
            return
        flying: deque[tuple[int, Future[Read | RowError]]] = deque()
        try:
            for key in keys:
                flying.append((key, self._pool.submit(self._tried, key)))
                if len(flying) > self._ahead:
                    first, future = flying.popleft()
                    yield first, future.result()
            while flying:
                first, future = flying.popleft()
                yield first, future.result()
        finally:
            for _, future in flying:
                future.cancel()

    def _tried(self, key: int) -> Read | RowError:
        try:
            return self._read(key)
        except RowError as error:
            return error

    def close(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Drop what has not begun. When the interpreter ends it has done so itself, and half of it is gone."""
        if self._pool is not None and not _ending():
            self._pool.shutdown(wait=False, cancel_futures=True)


def _held(state: Mapping[str, Any]) -> list[Held]:
    """What waits in a state. Earlier versions told sequences one by one, each by its rank's count of rows."""
    if all(len(one) == 3 for one in state["held"]):
        return [Held(number, tuple(left), parts) for number, left, parts in state["held"]]
    pieces = Counter(card for card, _ in state["held"])
    return [Held(card * state["world"] + state["rank"], (part,), pieces[card]) for card, part in state["held"]]


def make_stream(
    settings: DataSettings,
    processor: AriaProcessor,
    config: AriaConfig,
    *,
    tokens: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    passes: float | None = None,
) -> DataStream:
    """The stream that ``[data]`` of a recipe asks for.

    Args:
        settings: ``[data]``.
        processor, config: of the model that is trained.
        tokens: of every batch.
        rank: of those that have data of their own.
        world: how many these are.
        seed: of order and mixture; the same on all ranks.
        passes: over the data, after which it ends; None: never.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: a data set of no known kind, or settings that do not fit the model.
    """
    return DataStream(settings, processor, config, tokens=tokens, rank=rank, world=world, seed=seed, passes=passes)


class Question(NamedTuple):
    """A conversation up to its last answer, and that answer."""

    messages: tuple[dict[str, Any], ...]
    """As the processor takes them, media named in them."""
    answer: str
    """As a prompt has it: pictures, clips and documents in it are ``<fim_prefix><|img|><fim_suffix>``."""


def questions(
    settings: DataSettings,
    processor: AriaProcessor,
    most: int,
    *,
    encoder: Encoder | None = None,
    report: Report | None = None,
    sources: Sources | None = None,
) -> list[Question]:
    """The first conversations of the data sets, for a model to answer.

    Rows that are text or cannot be read are passed over.

    Args:
        settings: ``[data]``, with the data sets to take them from.
        processor: of the model.
        most: how many.
        encoder: passes over what it could not use whole as well: media that are missing, and rows that are too long.
        report: is told of rows that cannot be used.
        sources: the data sets, where they are open already.
    """
    sources = sources or Sources(settings.weights, settings.split)
    customs = Customs(settings.num_frames, settings.timestamps, processor.image_processor.sizes)
    found: list[Question] = []
    for row in range(len(sources)):
        if len(found) == most:
            break
        try:
            fields = sources.read(row)
            read, _ = read_row(fields, customs)
            notes = encoder(fields).notes if encoder is not None and isinstance(read, Conversation) else []
            if trimmed := [note for note in notes if note.kind == "trimmed"]:
                raise RowError("too long", trimmed[0].said)
        except RowError as error:
            if report is not None:
                report.skip(error.kind, f"{sources.where(row)}: {error}")
            continue
        if isinstance(read, Conversation):
            last = max(i for i, message in enumerate(read.messages) if message["role"] == "assistant")
            found.append(Question(read.messages[:last], str(rendered(read.messages[last])[1])))
    return found
