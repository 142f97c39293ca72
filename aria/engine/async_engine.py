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
        self._listeners: dict[Answer, Callable[[Piece | BaseException], bool]] = {}
        self._closed = False
        # Held while a call is put, so that none comes after the one that ends the thread.
        self._closing = threading.Lock()
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

        def tell(news: Piece | BaseException) -> bool:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, news)
            except RuntimeError:
                return False  # The loop is closed: nobody listens any more.
            return True

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

        with self._closing:
            if self._closed:
                raise RuntimeError("the engine is closed")
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
        with self._closing:
            self._closed = True
            self._calls.put(None)
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        going = True
        while going:
            try:
                going = self._take_calls()
                for piece in self.engine.step() if going else ():
                    piece.answer.pieces.clear()
                    listener = self._listeners.get(piece.answer)
                    if listener is not None and not listener(piece):
                        del self._listeners[piece.answer]
                        self.engine.cancel(piece.answer)
            except Exception as error:
                self._fail(error)
        self._fail(RuntimeError("the engine was closed"))
        self.engine.core.close()

    def _take_calls(self) -> bool:
        """Do what callers ask for, asleep while there is nothing else to do. False once the engine is closed."""
        wait = not self.engine.core.busy
        while True:
            try:
                call = self._calls.get(wait)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def _fail(self, error: BaseException) -> None:
        """Tell everybody, and end all requests, so that a later one starts from a clean state."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener(error)
        for answer in listeners:
            self.engine.cancel(answer)
