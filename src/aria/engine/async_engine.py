"""`AsyncEngine`: the engine in a thread of its own, for programs that run on asyncio."""

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

News = Piece | BaseException


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
        self._callers: dict[Answer, _Caller] = {}
        self._closed = False
        self._began: float | None = None
        # Held while a call is put, so that none comes after the one that ends the thread.
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
        """Answer one conversation; the pieces joined are the first choice's text."""
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
        """How long the step has taken that is under way, 0 while there is none. Any thread may ask."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def stats(self) -> Stats:
        """How busy the engine is, and what it has done. Any thread may ask."""
        return self.engine.stats()

    async def pieces(
        self,
        messages: Sequence[Message] | Prepared,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Answer one conversation; every token of every choice as it comes.

        Closing the generator cancels the request before the engine's next step.

        Args:
            messages: a conversation, or what :meth:`prepare` or :meth:`prepare_text` made of one.
            params: how to choose tokens.
            priority: lower runs first.
            adapter: the name of the one that answers; None: the model without any.

        Raises:
            ValueError: a message that is not well-formed, a prompt that leaves no room for an answer, parameters that
                do not fit the model, or no such adapter; all of them before the first piece.
            RuntimeError: the engine was closed, or the model failed at this conversation.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        params = params or SamplingParams()
        prepared = messages if isinstance(messages, Prepared) else await self.prepare(messages)
        matchers: Sequence[Matcher] | None = None
        if params.constraint is not None:
            # Kept by this request: others may push the grammar out before the engine's thread would look for it.
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
                self._tell([(caller, error)])

        def stop() -> None:
            if caller.answer is not None:
                self._forget(caller.answer)

        with self._closing:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(start)
        try:
            growing = params.n
            while growing:
                news = await caller.inbox.get()
                if isinstance(news, BaseException):
                    raise news
                growing -= news.finish_reason is not None
                yield news
        finally:
            self._calls.put(stop)

    async def add_adapter(self, name: str, source: str | os.PathLike[str]) -> None:
        """:meth:`Engine.add_adapter` between two steps; its files are read in a worker thread before.

        Raises:
            RuntimeError: the engine was closed.
        """
        stored = await asyncio.to_thread(read_adapter, source, self.engine.model.config)
        await self._between_steps(lambda: self.engine.core.add_adapter(name, stored.weights))

    async def remove_adapter(self, name: str) -> None:
        """:meth:`Engine.remove_adapter` between two steps.

        Raises:
            RuntimeError: the engine was closed.
        """
        await self._between_steps(lambda: self.engine.remove_adapter(name))

    async def _between_steps(self, work: Callable[[], None]) -> None:
        """Let the engine's thread do something."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
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
                loop.call_soon_threadsafe(tell, error)

        with self._closing:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.put(call)
        await done

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
                news: list[tuple[_Caller, News]] = []
                for piece in self.engine.step() if going else ():
                    piece.answer.pieces.clear()
                    caller = self._callers.get(piece.answer)
                    if caller is not None:
                        news.append((caller, piece))
                for answer in self.engine.failed if going else ():
                    caller = self._callers.pop(answer, None)
                    if caller is not None and answer.error is not None:
                        news.append((caller, answer.error))
                self._tell(news)
            except Exception as error:
                logger.error("the engine failed", exc_info=error)
                self._fail(f"the engine failed: {error}", error)
        self._began = None
        self._fail("the engine was closed")
        self.engine.close()

    def _tell(self, news: Sequence[tuple[_Caller, News]]) -> None:
        """Wake each event loop once for all that its callers get. Those whose loop is closed listen no more."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Caller, News]]] = {}
        for caller, one in news:
            loops.setdefault(caller.loop, []).append((caller, one))
        for loop, batch in loops.items():
            try:
                loop.call_soon_threadsafe(_hand_out, batch)
            except RuntimeError:
                for caller, _ in batch:
                    if caller.answer is not None:
                        self._forget(caller.answer)

    def _forget(self, answer: Answer) -> None:
        self.engine.cancel(answer)
        self._callers.pop(answer, None)

    def _take_calls(self) -> bool:
        """Do what callers ask for, asleep while there is nothing else to do. False once the engine is closed."""
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
        """Tell everybody, and end all requests, so that a later one starts from a clean state."""
        callers, self._callers = self._callers, {}
        news: list[tuple[_Caller, News]] = []
        for answer, caller in callers.items():
            self.engine.cancel(answer)
            # One for each: two tasks must not raise the same exception.
            error = RuntimeError(reason)
            error.__cause__ = cause
            news.append((caller, error))
        self._tell(news)


class _Caller:
    """Where news of an answer goes: to the event loop that asked for it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.inbox: asyncio.Queue[News] = asyncio.Queue()
        self.answer: Answer | None = None


def _hand_out(news: Sequence[tuple[_Caller, News]]) -> None:
    for caller, one in news:
        caller.inbox.put_nowait(one)
