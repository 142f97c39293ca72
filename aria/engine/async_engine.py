"""`AsyncEngine`: the engine in a thread of its own, for programs that run on asyncio."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from aria.engine.engine import Answer, Engine, Message, Piece
from aria.engine.outputs import Result
from aria.engine.sampling_params import SamplingParams


class AsyncEngine:
    """Takes the arguments of :class:`Engine`, or an engine that nobody else uses.

    Messages are prepared in worker threads; one thread alone runs the model, so answers of all callers grow together.
    A caller that stops listening has its request cancelled.
    """

    def __init__(self, *args: Any, engine: Engine | None = None, **kwargs: Any):
        if engine is not None and (args or kwargs):
            raise ValueError("give an engine, or what one is made from, not both")
        self.engine = engine or Engine(*args, **kwargs)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[Answer, Callable[[Piece | BaseException], None]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="aria-engine", daemon=True)
        self._thread.start()

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **kwargs: Any) -> Result:
        """Answer one conversation. Arguments and errors are those of :meth:`pieces`."""
        answer: Answer | None = None
        async for piece in self.pieces(messages, params, **kwargs):
            answer = piece.answer
        assert answer is not None, "an answer has at least one token"
        return answer.result()

    async def stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """Answer one conversation; the pieces joined are the first choice's text."""
        pieces = self.pieces(messages, params, **kwargs)
        try:
            async for piece in pieces:
                if piece.choice == 0 and piece.text:
                    yield piece.text
        finally:
            await pieces.aclose()

    async def pieces(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncGenerator[Piece, None]:
        """Answer one conversation; every token of every choice as it comes.

        Raises:
            ValueError: a message that is not well-formed, or a prompt that leaves no room for an answer.
            RuntimeError: the engine was closed.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        prepared = await asyncio.to_thread(self.engine.prepare, messages)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def tell(news: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, news)

        started: list[Answer] = []

        def start() -> None:
            answer = self.engine.queue(prepared, params, priority=priority)
            started.append(answer)
            self._listeners[answer] = tell

        def stop() -> None:
            for answer in started:
                self.engine.cancel(answer)
                self._listeners.pop(answer, None)

        def start_or_tell() -> None:
            try:
                start()
            except Exception as error:
                tell(error)

        self._calls.put(start_or_tell)
        try:
            growing = (params or SamplingParams()).n
            while growing:
                news = await inbox.get()
                if isinstance(news, BaseException):
                    raise news
                growing -= news.finish_reason is not None
                yield news
        finally:
            self._calls.put(stop)

    def close(self) -> None:
        """End all requests and the thread."""
        self._closed = True
        self._calls.put(None)
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            # Sleeps while there is nothing to do; else takes what is there and goes on.
            block = not self.engine.core.busy
            try:
                while (call := self._calls.get(block)) is not None:
                    call()
                    block = False
            except queue.Empty:
                pass
            else:
                break
            try:
                for piece in self.engine.step():
                    piece.answer.pieces.clear()
                    listener = self._listeners.get(piece.answer)
                    if listener is not None:
                        listener(piece)
            except Exception as error:
                self._fail(error)
        self._fail(RuntimeError("the engine was closed"))
        self.engine.core.close()

    def _fail(self, error: BaseException) -> None:
        """Tell everybody, and end all requests, so that a later one starts from a clean state."""
        for answer, listener in list(self._listeners.items()):
            self.engine.cancel(answer)
            listener(error)
        self._listeners.clear()
