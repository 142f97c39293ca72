"""`AsyncEngine`: the engine in a thread of its own, for asyncio programs."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from aria.checkpoint.adapter import read_adapter
from aria.config import AriaConfig
from aria.engine.engine import Answer, Engine, Message, Piece
from aria.engine.grammar import Grammars
from aria.engine.matcher import Matcher
from aria.engine.outputs import Result, Stats
from aria.engine.sampling_params import SamplingParams
from aria.model import Aria
from aria.processor import AriaProcessor
from aria.processor.image_inputs import Prepared
from aria.workers.cancellation import run_cancellable

logger = logging.getLogger(__name__)

Event = Piece | BaseException
"""What a caller receives: a piece of its answer, or the error that ends it."""


class AsyncEngine:
    """An engine for asyncio: takes the arguments of :class:`Engine`, or an engine that is used nowhere else.

    Messages are prepared in worker threads. A single thread runs the model, so that requests of all callers are batched
    together. If a caller stops listening, its request is cancelled.
    """

    def __init__(self, *args: Any, engine: Engine | None = None, **kwargs: Any):
        if engine is not None and (args or kwargs):
            raise ValueError("pass an engine, or the arguments to make one, not both")
        self.engine = engine or Engine(*args, **kwargs)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callers: dict[Answer, _Caller] = {}
        self._closed = False
        self._began: float | None = None
        # Held while a call is queued, so that none comes after the one that ends the thread.
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="aria-engine", daemon=True)
        self._thread.start()

    async def chat(
        self, messages: Sequence[Message] | Prepared, params: SamplingParams | None = None, **kwargs: Any
    ) -> Result:
        """Answer one conversation. Arguments and errors are those of :meth:`pieces`."""
        answer: Answer | None = None
        async for piece in self.pieces(messages, params, **kwargs):
            answer = piece.answer
        assert answer is not None, "an answer has at least one token"
        return answer.result()

    async def stream(
        self, messages: Sequence[Message] | Prepared, params: SamplingParams | None = None, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """Answer one conversation and yield the first choice's text in pieces."""
        pieces = self.pieces(messages, params, **kwargs)
        try:
            async for piece in pieces:
                if piece.choice == 0 and piece.text:
                    yield piece.text
        finally:
            await pieces.aclose()

    async def prepare(self, messages: Sequence[Message]) -> Prepared:
        """:meth:`Engine.prepare` in a worker thread, so that reading images does not block the event loop.

        Cancelling this stops downloads and decoding, too.
        """
        return await run_cancellable(None, lambda: self.engine.prepare(messages))

    async def prepare_text(self, text: str | Sequence[int]) -> Prepared:
        """:meth:`Engine.prepare_text` in a worker thread."""
        return await run_cancellable(None, lambda: self.engine.prepare_text(text))

    def prepare_blocking(self, messages: Sequence[Message], **kwargs: Any) -> Prepared:
        """:meth:`Engine.prepare` in the calling thread, which may be any."""
        return self.engine.prepare(messages, **kwargs)

    def prepare_text_blocking(self, text: str | Sequence[int]) -> Prepared:
        """:meth:`Engine.prepare_text` in the calling thread, which may be any."""
        return self.engine.prepare_text(text)

    @property
    def model(self) -> Aria:
        """The network; only the engine's thread runs it."""
        return self.engine.model

    @property
    def config(self) -> AriaConfig:
        """Configuration of the model."""
        return self.engine.config

    @property
    def device(self) -> torch.device:
        """Device of the weights and the KV cache."""
        return self.engine.device

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The model's ``generation_config.json``; empty if it has none."""
        return self.engine.generation_config

    @property
    def processor(self) -> AriaProcessor:
        """Turns messages into token ids and images."""
        return self.engine.processor

    @property
    def grammars(self) -> Grammars:
        """Compiles schemas and grammars, in any thread."""
        return self.engine.grammars

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return self.engine.adapters

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        return self.engine.max_model_len

    @property
    def max_batch(self) -> int:
        """Maximum number of concurrent sequences."""
        return self.engine.max_batch

    @property
    def failing(self) -> bool:
        """Whether a step failed and none has produced tokens since, or the engine's thread has ended."""
        return self.engine.failing or not self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """Seconds that the current step has taken so far, 0 if there is none. Any thread may call this."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def stats(self) -> Stats:
        """Current load and counters. Any thread may call this."""
        return self.engine.stats()

    async def pieces(
        self,
        messages: Sequence[Message] | Prepared,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Answer one conversation and yield every token of every choice as it is generated.

        Closing the generator cancels the request before the engine's next step.

        Args:
            messages: A conversation, or the result of :meth:`prepare` or :meth:`prepare_text`.
            params: How to sample, and when to stop.
            priority: Lower runs first.
            adapter: Name of the adapter that answers; None is the base model.

        Raises:
            ValueError: A malformed message, a prompt that leaves no room for an answer, parameters that do not fit the
                model, or an unknown adapter; always before the first piece.
            RuntimeError: The engine was closed, or the model failed on this conversation.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        params = params or SamplingParams()
        prepared = messages if isinstance(messages, Prepared) else await self.prepare(messages)
        matchers: Sequence[Matcher] | None = None
        if params.constraint is not None:
            # Compiled here and held by this request, because others may evict the grammar from the cache.
            grammars = self.engine.grammars
            matchers = await asyncio.to_thread(grammars.matchers, params.constraint, params.n, prepared.stop)
        if self.engine.core.block_size not in prepared.digests:
            await asyncio.to_thread(self.engine.digest, prepared)
        caller = _Caller()

        def start() -> None:
            try:
                caller.answer = self.engine.queue(
                    prepared, params, priority=priority, matchers=matchers, adapter=adapter
                )
                self._callers[caller.answer] = caller
            except Exception as error:
                self._deliver([(caller, error)])

        def stop() -> None:
            if caller.answer is not None:
                self._drop(caller.answer)

        with self._closing:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(start)
        try:
            open_choices = params.n
            while open_choices:
                event = await caller.inbox.get()
                if isinstance(event, BaseException):
                    raise event
                open_choices -= event.finish_reason is not None
                yield event
        finally:
            self._calls.put(stop)

    async def add_adapter(self, name: str, source: str | os.PathLike[str]) -> None:
        """:meth:`Engine.add_adapter` between two steps, after reading the files in a worker thread.

        Raises:
            RuntimeError: The engine was closed.
        """
        stored = await asyncio.to_thread(read_adapter, source, self.engine.model.config)
        await self._between_steps(lambda: self.engine.core.add_adapter(name, stored.weights))

    async def remove_adapter(self, name: str) -> None:
        """:meth:`Engine.remove_adapter` between two steps.

        Raises:
            RuntimeError: The engine was closed.
        """
        await self._between_steps(lambda: self.engine.remove_adapter(name))

    async def _between_steps(self, work: Callable[[], None]) -> None:
        """Run a function in the engine's thread, and wait for it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def resolve(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def call() -> None:
            error: Exception | None = None
            try:
                work()
            except Exception as raised:
                error = raised
            with suppress(RuntimeError):  # the caller's loop is closed
                loop.call_soon_threadsafe(resolve, error)

        with self._closing:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(call)
        await done

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._closing:
            self._closed = True
            self._calls.put(None)
        self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        running = True
        while running:
            try:
                running = self._take_calls()
                events: list[tuple[_Caller, Event]] = []
                for piece in self.engine.step() if running else ():
                    piece.answer.pieces.clear()
                    caller = self._callers.get(piece.answer)
                    if caller is not None:
                        events.append((caller, piece))
                for answer in self.engine.failed if running else ():
                    caller = self._callers.pop(answer, None)
                    if caller is not None and answer.error is not None:
                        events.append((caller, answer.error))
                self._deliver(events)
            except Exception as error:
                logger.error("the engine failed", exc_info=error)
                self._fail(f"the engine failed: {error}", error)
        self._began = None
        self._fail("the engine was closed")
        self.engine.close()

    def _deliver(self, events: Sequence[tuple[_Caller, Event]]) -> None:
        """Wake each event loop once with all events for its callers. Requests of closed loops are cancelled."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Caller, Event]]] = {}
        for caller, event in events:
            loops.setdefault(caller.loop, []).append((caller, event))
        for loop, batch in loops.items():
            try:
                loop.call_soon_threadsafe(_put_events, batch)
            except RuntimeError:
                for caller, _ in batch:
                    if caller.answer is not None:
                        self._drop(caller.answer)

    def _drop(self, answer: Answer) -> None:
        self.engine.cancel(answer)
        self._callers.pop(answer, None)

    def _take_calls(self) -> bool:
        """Run queued calls, blocking while the engine is idle. False once the engine is closed."""
        wait = not self.engine.busy
        while True:
            if wait:
                self._began = None
            try:
                call = self._calls.get(wait)
            except queue.Empty:
                return True
            finally:
                self._began = time.monotonic()
            if call is None:
                return False
            call()
            wait = False

    def _fail(self, reason: str, cause: Exception | None = None) -> None:
        """Fail and cancel all requests, so that later ones start from a clean state."""
        callers, self._callers = self._callers, {}
        events: list[tuple[_Caller, Event]] = []
        for answer, caller in callers.items():
            self.engine.cancel(answer)
            # A new one each time: two tasks must not raise the same exception.
            error = RuntimeError(reason)
            error.__cause__ = cause
            events.append((caller, error))
        self._deliver(events)


class _Caller:
    """Receives the events of one answer, in its event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[Event] = asyncio.Queue()
        self.answer: Answer | None = None


def _put_events(events: Sequence[tuple[_Caller, Event]]) -> None:
    for caller, event in events:
        caller.inbox.put_nowait(event)
