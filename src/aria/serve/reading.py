"""Work that reads media, and its progress for a client that waits."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Generic, TypeVar

from aria.media.progress import Progress, listen

T = TypeVar("T")


class Reading(Generic[T]):
    """A task, and the progress of the media that it reads.

    Args:
        work: what the task does.
    """

    def __init__(self, work: Coroutine[Any, Any, T]):
        loop = asyncio.get_running_loop()
        # None follows the last progress.
        self._inbox: asyncio.Queue[Progress | None] = asyncio.Queue()
        self._first: Progress | None = None
        context = contextvars.copy_context()
        context.run(listen, lambda one: loop.call_soon_threadsafe(self._inbox.put_nowait, one))
        self._task = loop.create_task(work, context=context)
        self._task.add_done_callback(lambda _: self._inbox.put_nowait(None))

    async def begin(self) -> None:
        """Wait for the first progress, or for the end of work that reads no media.

        Raises:
            Exception: what the work raised before any progress; a response can still have its status.
        """
        try:
            self._first = await self._inbox.get()
            if self._first is None:
                self._task.result()
        except BaseException:
            await self.aclose()
            raise

    async def progress(self) -> AsyncGenerator[Progress, None]:
        """Progress as it comes, up to the end of the work. To be called once, after :meth:`begin`."""
        one = self._first
        while one is not None:
            yield one
            one = await self._inbox.get()

    async def result(self) -> T:
        """The work's result, or what it raised."""
        return await self._task

    @property
    def finished(self) -> T | None:
        """The work's result if it has one by now."""
        done = self._task.done() and not self._task.cancelled() and self._task.exception() is None
        return self._task.result() if done else None

    async def aclose(self) -> None:
        """Cancel the work if it is not finished."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
