"""An infinite, resumable stream of packed batches; threads read rows ahead.

N rows of an epoch. The rows of all epochs are one infinite sequence, dealt to the ranks in turn: rank r of W takes the
row indices r, r + W, r + 2 W, ... So every row is used as often as the mixer says, and no rank runs out of batches
while another has some.
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
from aria.train.data.encode import Encoded, RowEncoder, rendered
from aria.train.data.order import RowOrder, permutation
from aria.train.data.packer import Packer
from aria.train.data.report import Report, RowError
from aria.train.data.rows import Conversation, MediaDefaults, read_row
from aria.train.data.settings import DataSettings
from aria.train.data.sources import Sources

LEAST_TRIED = 100
"""Minimum rows before a stream gives up: one of many ranks may read the same few bad rows again and again."""

Read = TypeVar("Read")


class Waiting(NamedTuple):
    """A sequence that waits for packing."""

    row_index: int
    """Index of its row in the infinite sequence."""
    part: int
    """Index of the sequence in its row."""
    parts: int
    """Number of sequences of the row."""
    sample: Sample

    @property
    def tokens(self) -> int:
        return self.sample.tokens

    @property
    def num_crops(self) -> int:
        return self.sample.num_crops


class Held(NamedTuple):
    """The waiting sequences of a row, in a state."""

    row_index: int
    """Index of the row in the infinite sequence."""
    left: tuple[int, ...]
    """Indices of the waiting sequences, in order: each enters the packer when the one before it was taken."""
    parts: int
    """Number of sequences of the row."""


class DataStream:
    """Batches of one rank, infinite or for a number of passes over the data.

    With ``passes``, all ranks together read the rows of that many epochs, rounded to whole rows and at least one; the
    last batches hold what is left.

    Args:
        settings: ``[data]`` of a recipe.
        processor, config: Processor and configuration of the model.
        tokens: Tokens of every batch.
        rank, world: Rank and world size, among ranks with data of their own.
        seed: Seed of order and mixture; the same on all ranks.
        passes: Passes over the data after which the stream ends; None: never.

    Attributes:
        report: What was used, trimmed and skipped so far.
        rows_in_all: Rows over all ranks until the stream ends, with repetitions.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: A data set is of an unknown kind, or the settings do not fit the model.
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
        self._order = RowOrder(
            self._sources.counts,
            list(settings.weights.values()),
            seed=seed,
            shuffle=settings.shuffle,
            resample=settings.resample,
        )
        self._encoder = RowEncoder(processor, config, settings, tokens)
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
        """The data sets."""
        return self._sources

    @property
    def epochs(self) -> float:
        """Passes over the data up to the last batch, without rows that wait for packing."""
        used = max(0.0, self._next - sum(len(one.left) / one.parts for one in self._held))
        if self._passes is None:
            return used * self._world / self._order.size
        # Ranks have equally many rows, or one less; each ends with its own.
        own = len(range(self._rank, self.rows_in_all, self._world))
        return self._passes * (used / own if own else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch: plain values, for JSON."""
        return {
            "rank": self._rank,
            "world": self._world,
            "next": self._next,
            "held": [[one.row_index, list(one.left), one.parts] for one in self._held],
            "rows": self._order.size,
            "sources": self._sources.fingerprint(),
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resume from the states of streams with the same data, settings and seed.

        Args:
            state: State of one rank, or of all. With the same rank and world size, the same batches follow. With
                another world size, all ranks continue from the first row that any state has not read, and share the
                waiting sequences of the rows before it: given the states of all ranks, no row is lost, and a few come
                twice.

        Raises:
            ValueError: The data have changed.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        for one in states:
            if not self._sources.has(one["sources"]) or one["rows"] != self._order.size:
                raise ValueError(
                    f"the data have changed since the state was saved: {'; '.join(one['sources'])} gave "
                    f"{one['rows']:,} rows, {'; '.join(self._sources.fingerprint())} give {self._order.size:,}; start "
                    "over, or restore the old files"
                )
        # Ranks that share sequences have the same state.
        alike = {(one["rank"], one["world"]): one for one in states}.values()
        own = [one for one in states if (one["rank"], one["world"]) == (self._rank, self._world)]
        if own:
            self._next, self._held = own[0]["next"], _held(own[0])
        else:
            unread = min(one["next"] * one["world"] + one["rank"] for one in states)
            waiting = sorted(held for one in alike for held in _held(one) if held.row_index < unread)
            self._next, self._held = max(0, -((self._rank - unread) // self._world)), waiting[self._rank :: self._world]
        # Each row counts once over all ranks: reports that no rank continues are added on the first.
        self.report = Report.joined(Report.of(one["report"]) for one in (own[:1] or (() if self._rank else alike)))

    def __iter__(self) -> Iterator[Batch]:
        packer: Packer[Waiting] = Packer(self._tokens, self._settings.max_crops, self._settings.lookahead)
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            indices = sorted({held.row_index for held in self._held})
            again = {index: encoded for index, encoded in reader.read(indices) if isinstance(encoded, Encoded)}
            if lost := [index for index in indices if index not in again]:
                raise ValueError(f"{self._where(lost[0])} was usable when the state was saved, and is not any more")
            for row_index, left, parts in self._held:
                packer.add_pieces(Waiting(row_index, part, parts, again[row_index].samples[part]) for part in left)
            first = self._next * self._world + self._rank
            arriving = reader.read(range(first, self.rows_in_all, self._world))
            useless, most = 0, max(LEAST_TRIED, -(-self._order.size // self._world))
            while True:
                while not packer.ready:
                    row_index, encoded = next(arriving, (-1, None))
                    if encoded is None:
                        break
                    self._next = row_index // self._world + 1
                    samples = self._account(row_index, encoded)
                    self._add(packer, row_index, samples)
                    useless = 0 if samples else useless + 1
                    if useless == most:
                        raise ValueError(f"none of {useless:,} rows can be used: {self.report}")
                if not packer.held:
                    if useless and self._world == 1 and not self.report.sequences:
                        raise ValueError(f"none of {useless:,} rows can be used: {self.report}")
                    return
                taken = packer.take()
                self._held = [
                    Held(pieces[0].row_index, tuple(piece.part for piece in pieces), pieces[0].parts)
                    for pieces in packer.held
                ]
                yield self._packed([waiting.sample for waiting in taken])
        finally:
            reader.close()

    def rows_that_fill(self, batches: int) -> int:
        """Number of rows, from the first, with the tokens of this many batches; the same on every rank."""
        left = batches * self._tokens
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            for row_index, encoded in reader.read(range(self._order.size)):
                if isinstance(encoded, Encoded):
                    left -= sum(sample.tokens for sample in encoded.samples)
                if left < 0:
                    return max(1, row_index)
        finally:
            reader.close()
        return self._order.size

    def once(self, rows: int | None = None) -> Iterator[Batch]:
        """Batches of one pass over this rank's rows; resets the report.

        Args:
            rows: Number of rows over all ranks, from the first; None: all.
        """
        self.report = Report()
        packer: Packer[Waiting] = Packer(self._tokens, self._settings.max_crops, self._settings.lookahead)
        reader = Reader(self._read, self._settings.workers, self._settings.workers * self._settings.prefetch)
        try:
            for row_index, encoded in reader.read(range(self._rank, rows or self._order.size, self._world)):
                self._add(packer, row_index, self._account(row_index, encoded))
                while packer.ready:
                    yield self._packed([waiting.sample for waiting in packer.take()])
            while packer.held:
                yield self._packed([waiting.sample for waiting in packer.take()])
        finally:
            reader.close()

    def filler(self) -> Batch:
        """A batch of filler, for a rank that has no more data while others do."""
        return Batch.pack([], self._tokens, self._filler_id)

    def _add(self, packer: Packer[Waiting], row_index: int, samples: Sequence[Sample]) -> None:
        """Add the sequences of a row to the packer; pieces of a document are shuffled, and mixed with others'."""
        parts = len(samples)
        if not self._settings.shuffle:
            packer.add(Waiting(row_index, part, parts, sample) for part, sample in enumerate(samples))
            return
        order = permutation(parts, self._seed, 3, row_index).tolist()
        packer.add_pieces(Waiting(row_index, part, parts, samples[part]) for part in order)

    def _where(self, row_index: int) -> str:
        return self._sources.where(self._order.row(row_index))

    def _read(self, row_index: int) -> Encoded:
        return self._encoder(self._sources.read(self._order.row(row_index)))

    def _account(self, row_index: int, encoded: Encoded | RowError) -> list[Sample]:
        """The sequences of a row, none if it cannot be used; counted in the report."""
        report, where = self.report, self._where(row_index)
        report.rows += 1
        if isinstance(encoded, RowError):
            if self._settings.on_error == "stop":
                raise ValueError(f"{where}: {encoded.kind}: {encoded}") from encoded
            report.skip(encoded.kind, f"{where}: {encoded}")
            return []
        for note in encoded.notes:
            report.note(note.kind, f"{where}: {note.message}")
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
    """Reads rows ahead with threads, and returns them in the requested order.

    Threads, because decoding, resizing and tokenizing release the interpreter lock, nothing is copied between
    processes, and nothing is forked at the wrong moment.
    """

    def __init__(self, read: Callable[[int], Read], workers: int, ahead: int):
        self._read, self._ahead = read, ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="aria-data") if workers else None

    def read(self, keys: Iterable[int]) -> Iterator[tuple[int, Read | RowError]]:
        """The result for each key. A :class:`RowError` is returned, other errors are raised."""
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
        """Cancel what has not started. An exiting interpreter has done so itself, and half of the pool is gone."""
        if self._pool is not None and not _ending():
            self._pool.shutdown(wait=False, cancel_futures=True)


def _held(state: Mapping[str, Any]) -> list[Held]:
    """The waiting sequences in a state. Earlier versions listed them one by one, with the row index of their rank."""
    if all(len(one) == 3 for one in state["held"]):
        return [Held(row_index, tuple(left), parts) for row_index, left, parts in state["held"]]
    pieces = Counter(own for own, _ in state["held"])
    return [Held(own * state["world"] + state["rank"], (part,), pieces[own]) for own, part in state["held"]]


class Question(NamedTuple):
    """A conversation up to its last answer, and that answer."""

    messages: tuple[dict[str, Any], ...]
    """Messages for the processor, which name their media."""
    answer: str
    """The answer as in a prompt: media in it are ``<fim_prefix><|img|><fim_suffix>``."""


def questions(
    settings: DataSettings,
    processor: AriaProcessor,
    most: int,
    *,
    encoder: RowEncoder | None = None,
    report: Report | None = None,
    sources: Sources | None = None,
) -> list[Question]:
    """The first conversations of the data sets, for a model to answer.

    Rows that are text or cannot be read are skipped.

    Args:
        settings: ``[data]``, with the data sets.
        processor: Processor of the model.
        most: Maximum number of conversations.
        encoder: Also skips rows that it cannot use as a whole: with missing media, or too long.
        report: Counts rows that cannot be used.
        sources: The data sets, if they are open already.
    """
    sources = sources or Sources(settings.weights, settings.split)
    defaults = MediaDefaults(settings.num_frames, settings.timestamps, processor.image_processor.sizes)
    found: list[Question] = []
    for row in range(len(sources)):
        if len(found) == most:
            break
        try:
            fields = sources.read(row)
            read, _ = read_row(fields, defaults)
            notes = encoder(fields).notes if encoder is not None and isinstance(read, Conversation) else []
            if trimmed := [note for note in notes if note.kind == "trimmed"]:
                raise RowError("too long", trimmed[0].message)
        except RowError as error:
            if report is not None:
                report.skip(error.kind, f"{sources.where(row)}: {error}")
            continue
        if isinstance(read, Conversation):
            last = max(i for i, message in enumerate(read.messages) if message["role"] == "assistant")
            found.append(Question(read.messages[:last], str(rendered(read.messages[last])[1])))
    return found
