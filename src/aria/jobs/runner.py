"""`BatchJob`: many items through the engine, with bounded concurrency and a durable record of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aria.engine import AsyncEngine

Item = TypeVar("Item", contravariant=True)
Record = dict[str, Any]

MAX_HEAVY_IN_FLIGHT = 4
"""Maximum number of videos and documents in flight: a video of 256 frames holds 180 MB until it is encoded."""

MAX_NAMED = 10
"""Maximum number of items that an error names."""


class JobTask(Protocol[Item]):
    """Processes items, and recognizes their records."""

    def name(self, item: Item) -> str:
        """Name of an item, which identifies its record."""

    def heavy(self, item: Item) -> bool:
        """Whether an item counts towards :data:`MAX_HEAVY_IN_FLIGHT`."""

    async def do(self, engine: AsyncEngine, item: Item) -> Record:
        """Process an item and return its record, which holds the item's own errors; exceptions are the engine's."""

    def give_up(self, item: Item, error: Exception) -> Record:
        """The record of an item on which the engine failed twice."""

    def recognize(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """Name of the item of a record, and whether it failed; raises ValueError for other records."""

    def changed(self, item: Item, record: Mapping[str, Any]) -> str | None:
        """What has changed about an item since its record was made, such as ``the content``; None if nothing has."""


class RecordSink(Protocol):
    """Stores records."""

    def read(self) -> Iterator[Record]:
        """Records of earlier runs."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Store a record durably."""


@dataclass
class JobCounts:
    """Numbers of finished items."""

    before: int = 0
    """Done by earlier runs."""
    done: int = 0
    """Done by this run."""
    failed: int = 0
    """Failed in any run."""


class BatchJob:
    """A list of items; those whose records are in the output already are skipped.

    Args:
        work: Processes each item.
        items: All items, with unique names.
        output: Read to its end at once.

    Raises:
        ValueError: The output holds other records, or records of items that have changed since.
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
            raise ValueError(_describe_changes(changed))
        self.todo: Sequence[Any] = [item for item in items if work.name(item) not in known]
        failed = sum(known.get(work.name(item), False) for item in items)
        self.counts = JobCounts(before=len(items) - len(self.todo) - failed, failed=failed)

    async def run(self, engine: AsyncEngine, *, at_once: int, progress: Callable[[], None] = lambda: None) -> None:
        """Process the remaining items. Records are written in the order in which items are finished.

        A failure of the engine affects all items in flight. They are retried at the end, one by one, and only those
        that fail again are given up. If more fail than one item can affect, the job ends with the error.

        Args:
            engine: Runs the model.
            at_once: Maximum number of items in flight.
            progress: Called after each item.

        Raises:
            OSError: An item cannot be read or its record cannot be written.
            Exception: The engine failed too often.
        """
        waiting = iter(self.todo)
        heavy = asyncio.Semaphore(MAX_HEAVY_IN_FLIGHT)
        again: list[Any] = []

        async def keep(record: Record) -> None:
            # In a thread, so that generation does not wait for the disk.
            await asyncio.to_thread(self._output.write, record)
            _, failed = self._work.recognize(record)
            self.counts.failed += failed
            self.counts.done += not failed
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
                    raise  # a problem of the machine, which a retry does not solve
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


def _describe_changes(changed: Mapping[str, Sequence[str]]) -> str:
    """An error message about changed items, by what has changed."""
    parts = []
    for what, names in changed.items():
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        parts.append(f"{what} of {', '.join(repr(name[-200:]) for name in names[:MAX_NAMED])}{more}")
    return (
        f"since the output was written these have changed: {'; '.join(parts)}. Name another output, or delete their "
        "lines in it to process them again"
    )
