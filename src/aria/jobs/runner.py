"""A job: many items through the engine, a bounded number at once, each one's record kept before it counts as done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aria.engine import AsyncEngine

Item = TypeVar("Item", contravariant=True)
Record = dict[str, Any]

MAX_HEAVY_IN_FLIGHT = 4
"""Clips and documents in flight: a clip of 256 frames holds 180 MB until it has been encoded."""

MAX_NAMED = 10
"""Items that an error names."""


class JobTask(Protocol[Item]):
    """What is done with an item, and how its record is known again."""

    def name(self, item: Item) -> str:
        """The item's name, by which its record is found."""

    def heavy(self, item: Item) -> bool:
        """Whether it is one of those of which only :data:`MAX_HEAVY_IN_FLIGHT` are in flight."""

    async def do(self, engine: AsyncEngine, item: Item) -> Record:
        """The item's record. What is wrong with the item belongs into it: an exception means that the engine failed."""

    def give_up(self, item: Item, error: Exception) -> Record:
        """The record of an item that made the engine fail twice."""

    def recognize(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """Name of the item that a record is of, and whether that failed; ValueError for what is no such record."""

    def changed(self, item: Item, record: Mapping[str, Any]) -> str | None:
        """What of an item is no longer as it was when its record was made, such as ``its content``; None: nothing."""


class RecordSink(Protocol):
    """Where records are kept."""

    def read(self) -> Iterator[Record]:
        """Those of earlier runs."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep one for good."""


@dataclass
class JobCounts:
    """Items counted; each is one of the three."""

    before: int = 0
    """Done by earlier runs."""
    done: int = 0
    """Done by this one."""
    failed: int = 0
    """By any run."""


class BatchJob:
    """Items to do, less those whose records are in the output already.

    Args:
        work: what is done with each.
        items: all of them; their names differ.
        output: read at once, to the end.

    Raises:
        ValueError: the output holds something else, or records of items that have changed since.
    """

    def __init__(self, work: JobTask[Item], items: Collection[Item], output: RecordSink):
        self._work: JobTask[Any] = work
        self._output = output
        by_name = {work.name(item): item for item in items}
        known: dict[str, bool] = {}
        changed: dict[str, list[str]] = {}
        for record in output.read():
            name, known_failed = work.recognize(record)
            known[name] = known_failed
            if name in by_name and (what := work.changed(by_name[name], record)) is not None:
                changed.setdefault(what, []).append(name)
        if changed:
            raise ValueError(_told(changed))
        self.todo: Sequence[Any] = [item for item in items if work.name(item) not in known]
        failed = sum(known.get(work.name(item), False) for item in items)
        self.tally = JobCounts(before=len(items) - len(self.todo) - failed, failed=failed)

    async def run(self, engine: AsyncEngine, *, at_once: int, progress: Callable[[], None] = lambda: None) -> None:
        """Do what is to be done; records come in the order in which items are finished.

        A failure of the engine takes along whatever is in flight. Such items are done again at the end, one by one, and
        only those that fail then are given up. When more fail than one item can take along, the job ends instead.

        Args:
            engine: answers.
            at_once: items in flight.
            progress: called after each item.

        Raises:
            OSError: an item could not be read, or its record not be kept.
            Exception: what the engine failed with, too often.
        """
        waiting = iter(self.todo)
        heavy = asyncio.Semaphore(MAX_HEAVY_IN_FLIGHT)
        again: list[Any] = []

        async def keep(record: Record) -> None:
            # In a thread: a disk takes its time, and answers need not wait for it.
            await asyncio.to_thread(self._output.write, record)
            _, failed = self._work.recognize(record)
            self.tally.failed += failed
            self.tally.done += not failed
            progress()

        async def worker() -> None:
            for item in waiting:
                try:
                    if self._work.heavy(item):
                        async with heavy:
                            record = await self._work.do(engine, item)
                    else:
                        record = await self._work.do(engine, item)
                except OSError:
                    raise  # the machine's trouble, which no second try ends
                except Exception:
                    again.append(item)
                    if len(again) > 2 * at_once:
                        raise
                else:
                    await keep(record)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(at_once, len(self.todo))):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for item in again:
            try:
                record = await self._work.do(engine, item)
            except OSError:
                raise
            except Exception as error:
                record = self._work.give_up(item, error)
            await keep(record)


def _told(changed: Mapping[str, Sequence[str]]) -> str:
    """What to say of items that have changed, by what of them has."""
    parts = []
    for what, names in changed.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        parts.append(f"{what} of {', '.join(repr(name[-200:]) for name in names[:MAX_NAMED])}{more}")
    return (
        f"since the output was begun, there have changed: {'; '.join(parts)}. Name another output, or delete their "
        "lines in it to have them done anew"
    )
