"""Tasks that read media and report their progress to a waiting client."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Generic, TypeVar

from aria.media.progress import Progress, listen

T = TypeVar("T")


class TaskWithProgress(Generic[T]):
    """A task and the progress of the media that it reads.

    Args:
        work: The coroutine that the task runs.
    """

    def __init__(self, work: Coroutine[Any, Any, T]):
        loop = asyncio.get_running_loop()
        # None marks the end of the task.
        self._inbox: asyncio.Queue[Progress | None] = asyncio.Queue()
        self._first: Progress | None = None
        context = contextvars.copy_context()
        context.run(listen, lambda one: loop.call_soon_threadsafe(self._inbox.put_nowait, one))
        self._task = loop.create_task(work, context=context)
        self._task.add_done_callback(lambda _: self._inbox.put_nowait(None))

    async def begin(self) -> None:
        """Wait for the first progress, or for the end of a task that reads no media.

        Raises:
            Exception: What the task raised before any progress, when the response can still have a status.
        """
        try:
            self._first = await self._inbox.get()
            if self._first is None:
                self._task.result()
        except BaseException:
            await self.aclose()
            raise

    async def progress(self) -> AsyncGenerator[Progress, None]:
        """Yield progress until the task ends. Call it once, after :meth:`begin`."""
        one = self._first
        while one is not None:
            yield one
            one = await self._inbox.get()

    async def result(self) -> T:
        """The result of the task, or what it raised."""
        return await self._task

    @property
    def finished(self) -> T | None:
        """The result of the task, or None if it has none yet."""
        done = self._task.done() and not self._task.cancelled() and self._task.exception() is None
        return self._task.result() if done else None

    async def aclose(self) -> None:
        """Cancel the task if it is unfinished."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
