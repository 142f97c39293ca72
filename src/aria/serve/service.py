"""`Service`: an engine under a server's settings; prompts prepared off the event loop, answers counted."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import cached_property
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from aria.engine import Answer, AsyncEngine, ContextLengthError, Piece, SamplingParams, TokenLogprob
from aria.engine.generation import default_temperature
from aria.model import Aria
from aria.processor import AriaProcessor
from aria.processor.image_inputs import Prepared
from aria.processor.template import variables_of
from aria.serve import bodies
from aria.serve.bodies import Asked, Defaults
from aria.serve.errors import ApiError, context_length, invalid_request, overloaded
from aria.serve.exchange import Exchange
from aria.serve.metrics import Metrics
from aria.serve.named_media import NamedMedia
from aria.serve.settings import ServerSettings
from aria.serve.traffic import WorkThreads, current_work
from aria.serve.truncation import prepare_latest
from aria.workers import BusyError
from aria.workers.cancellation import run_cancellable

T = TypeVar("T")
logger = logging.getLogger(__name__)

GRAMMAR_THREADS = 16
"""Requests with a schema or another grammar that are checked at a time."""
STEP_SECONDS = 120.0
"""The longest that a step may take by default: first ones compile kernels for up to a minute on a GPU, and large models
are slow on a CPU."""
QUICK_MODEL = 100_000_000
"""Active parameters under which a step takes less than a second on a CPU, where nothing is compiled either."""
QUICK_STEP_SECONDS = 4.0
"""The longest that a step of such a model may take by default."""
LARGE_BODY = 1 << 17
"""Bytes of memory from which on reading a body takes more than a millisecond or two."""
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
"""Errors of the system that are no request's fault."""
PROBE_SECONDS = 4.0
"""For one token, when the model's last step failed; who asks after the server's health waits no longer."""


class Service:
    """An engine under a server's settings.

    Args:
        engine: answers; the caller closes it.
        settings: limits and names.

    Raises:
        ValueError: an adapter has a name of the model.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings):
        if both := [name for name in engine.adapters if name in settings.model_names]:
            raise ValueError(f"{both[0]!r} is the name of the model and of an adapter; give one of them another")
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine, lambda: not (engine.failing or self.hanging))
        self.created = int(time.time())
        self.fingerprint = _fingerprint(engine.model)
        # Text never waits behind somebody's slow download.
        self._texts = WorkThreads(2, "aria-text")
        # Most of them wait for a process that tries a schema, which may take seconds.
        self._grammars = WorkThreads(GRAMMAR_THREADS, "aria-grammar")
        self._media = WorkThreads(settings.media_threads, "aria-media")
        self._named_media = NamedMedia(settings.named_media_bytes)
        self.adapters_lock = asyncio.Lock()
        """Held while adapters are loaded or unloaded."""
        self._probe: asyncio.Task[None] | None = None

    @property
    def processor(self) -> AriaProcessor:
        return self.engine.processor

    @cached_property
    def defaults(self) -> Defaults:
        """What bodies leave open."""
        temperature = self.settings.temperature
        if temperature is None:
            temperature = default_temperature(self.engine.generation_config)
        return Defaults(
            sizes=tuple(self.processor.image_processor.sizes),
            max_model_len=self.engine.max_model_len,
            temperature=1.0 if temperature is None else temperature,
            variables=variables_of(self.processor.chat_template, self.processor.workers),
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Names that requests may ask for: those of the model, then its adapters."""
        return (*self.settings.model_names, *self.engine.adapters)

    def adapter(self, model: str) -> str | None:
        """The adapter that answers under a name, None where it is the model itself."""
        return model if model in self.engine.adapters else None

    def model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404, no model has this name.
        """
        names = self.models
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                404,
                f"there is no model {name!r:.200} here; there are {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name

    @cached_property
    def _token_characters(self) -> int:
        """Most characters of one token: a prompt with more of them for each place cannot fit, without tokenizing it."""
        tokenizer = self.processor.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def check_length(self, prompt: Any) -> None:
        """Refuse a prompt that is too long at first sight.

        Raises:
            ContextLengthError: it has more characters than all of its tokens could.
        """
        if (characters := bodies.characters(prompt)) > self._token_characters * self.defaults.max_model_len:
            tokens = f"at least {-(-characters // self._token_characters)} tokens"
            raise ContextLengthError(self.defaults.max_model_len, tokens, "shorten it")

    def check_media(self, count: int, param: str) -> None:
        """Refuse more media than one request may have.

        Raises:
            ApiError: 400.
        """
        if count > self.settings.max_media:
            most = f"{self.settings.max_media} are the most (--max-media)"
            raise ApiError(400, f"there are {count} images, clips and documents, and {most}", param=param)

    def named(self, prompt: Sequence[Any], exchange: Exchange) -> Sequence[Any]:
        """A conversation with the media that it names by uuid. This may take as long as fetching them.

        Raises:
            ApiError: 400, nothing is kept under a uuid.
        """
        return self._named_media.resolve(exchange.client, prompt, self.processor.media)

    def _prepare(self, prompt: Any, asked: Asked, exchange: Exchange) -> Prepared:
        """A conversation as tokens and pictures."""
        messages = self.named(prompt, exchange)

        def prepare(part: Sequence[Any]) -> Prepared:
            self.check_length(part)
            return self.engine.prepare_blocking(part, **asked.template)

        def measure(part: Sequence[Any]) -> int:
            self.check_length(part)
            return len(self.processor.prepare(part, add_generation_prompt=False).ids)

        try:
            return prepare(messages)
        except ContextLengthError:
            if not asked.truncate:
                raise
        most = self.defaults.max_model_len
        return prepare_latest(messages, prepare, measure, room=most - min(asked.params.max_tokens, most // 4))

    async def off_loop(
        self, work: Callable[[], T], *, media: bool = False, param: str | None = None, grammar: bool = False
    ) -> T:
        """Do what takes time in a thread, which stops when the client leaves; the request counts until it has.

        What is wrong with the request's messages or media becomes a 400.
        """
        pool = self._media if media else self._grammars if grammar else self._texts
        try:
            return await run_cancellable(pool, work)
        except ContextLengthError as error:
            raise context_length(error, param) from error
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _OURS:
                raise overloaded(f"the server has too little of something ({error.strerror}); try again") from error
            raise ApiError(400, str(error), param=param) from error
        except BusyError as error:
            raise overloaded(str(error)) from error

    async def read(self, work: Callable[[], T]) -> T:
        """Make something of a request's body, in a thread where that is large. The work raises nothing but
        :class:`ApiError` for what is wrong with it."""
        request = current_work()
        return await self.off_loop(work) if request is not None and request.nbytes > LARGE_BODY else work()

    async def start(self, asked: Asked, *, id: str, model: str | None, param: str, exchange: Exchange) -> Run:
        """Begin to answer, and wait for the first token: until then whatever is wrong can be told by a status.

        Args:
            asked: what a body asks for.
            id: of the answer.
            model: the name in the body.
            param: the field that prompts come from, for errors.
            exchange: counts the tokens.

        Raises:
            ApiError: 400, 404: the request cannot be answered.
        """
        name = self.model(model)
        wanted = len(asked.prompts) * asked.params.n
        if wanted > self.settings.max_choices:
            raise ApiError(
                400, f"{wanted} answers are asked for, and {self.settings.max_choices} are the most", param="n"
            )
        self.check_media(media := asked.media, param)
        began = time.perf_counter()

        def work() -> list[Prepared]:
            if param != "prompt":
                return [self._prepare(prompt, asked, exchange) for prompt in asked.prompts]
            for prompt in asked.prompts:
                self.check_length(prompt)
            return [self.engine.prepare_text_blocking(prompt) for prompt in asked.prompts]  # type: ignore[arg-type]

        if asked.params.constraint is not None:
            # Otherwise the engine's thread would do it, while everybody's answers wait.
            await self.off_loop(lambda: self._compile(asked), grammar=True)
        prepared = await self.off_loop(work, media=media > 0, param=param)
        exchange.prompt_tokens = sum(len(one.ids) for one in prepared)
        run = Run(self, asked, prepared, id, name, began, exchange)
        try:
            await run.begin()
        except ContextLengthError as error:
            raise context_length(error, param) from error
        except ValueError as error:
            raise invalid_request(error) from error
        return run

    @property
    def longest_step(self) -> float:
        """Seconds that a step of the model may take."""
        if self.settings.step_seconds is not None:
            return self.settings.step_seconds
        engine = self.engine
        quick = engine.device.type == "cpu" and engine.config.active_parameters() < QUICK_MODEL
        return QUICK_STEP_SECONDS if quick else STEP_SECONDS

    @property
    def hanging(self) -> bool:
        """Whether a step of the model takes longer than it may."""
        return self.engine.step_seconds > self.longest_step

    @property
    def ailment(self) -> str:
        """What is wrong where :meth:`healthy` is false."""
        if self.hanging:
            return (
                f"a step of the model has taken {self.engine.step_seconds:.0f} s, and {self.longest_step:g} s "
                "(--step-seconds) is the most"
            )
        return "the model fails at every step; the server's log tells why"

    def _compile(self, asked: Asked) -> None:
        """Compile what the answer follows.

        Raises:
            ApiError: 400, it cannot be followed; the error names the field at fault.
        """
        grammars = self.engine.grammars
        constraint = asked.params.constraint
        assert constraint is not None, "there is nothing to compile"
        try:
            grammars.compile(constraint)
        except ValueError as error:
            # The whole may be made of several tools and a schema: each alone tells whose fault it is.
            for part in asked.bound:
                try:
                    grammars.check(part.constraint)
                except ValueError as own:
                    _, cannot, why = str(own).partition(" cannot be ")
                    message = f"{part.name}{cannot}{why}" if cannot else f"{part.name}: {own}"
                    raise ApiError(400, message, param=part.param, code="invalid_schema") from own
            raise ApiError(400, str(error), code="invalid_schema") from error

    async def healthy(self) -> bool:
        """Whether the model answers. It is asked for a token only where its last step failed: that may have been the
        fault of one request, and nobody else may come whose answer would show it."""
        if self.engine.failing and not self.hanging:
            # All who ask meanwhile wait for the same token, and one of them that leaves ends nothing.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._ask_for_a_token())
            await asyncio.shield(self._probe)
        return not (self.engine.failing or self.hanging)

    async def _ask_for_a_token(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.engine.chat(await self.engine.prepare_text("Aria"), SamplingParams(max_tokens=1))
        except Exception as error:
            logger.error("the model does not answer: %r", error, exc_info=error)

    def close(self) -> None:
        """End the threads; the engine stays."""
        self._texts.shutdown(wait=False, cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)
        self._media.shutdown(wait=False, cancel_futures=True)


class Run:
    """One request while it is answered.

    Attributes:
        id, created, model, fingerprint: what answers and chunks tell of themselves.
        asked: what was asked for.
        prompt_ids: the tokens of each prompt.
    """

    def __init__(
        self,
        service: Service,
        asked: Asked,
        prepared: Sequence[Prepared],
        id: str,
        model: str,
        began: float,
        exchange: Exchange,
    ):
        self.id = id
        self.created = int(time.time())
        self.model = model
        self.fingerprint = service.fingerprint
        self.asked = asked
        self.tokenizer = service.processor.tokenizer
        self._metrics = service.metrics
        self._began = began
        self.prompt_ids = [list(one.ids) for one in prepared]
        self._exchange = exchange
        self._prompt_tokens = sum(len(one.ids) for one in prepared)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}
        self._first: tuple[int, Piece] | None = None
        self._answers: dict[int, Answer] = {}
        self._off_loop = service.off_loop
        adapter = service.adapter(model)
        self._pieces = _together([service.engine.pieces(one, asked.params, adapter=adapter) for one in prepared])

    async def begin(self) -> None:
        """Wait for the first token."""
        self._first = await anext(self._pieces)
        self._metrics.first_token.observe(time.perf_counter() - self._began)

    async def read(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Each token as it comes, with the number of its prompt. Closing this cancels what is not finished."""
        assert self._first is not None, "a run begins before it is read"
        first_at = time.perf_counter()
        try:
            async with aclosing(self._pieces) as pieces:
                yield self._count(self._first)
                async for one in pieces:
                    yield self._count(one)
        finally:
            now = time.perf_counter()
            choices = len(self._cached) * self.asked.params.n
            per_choice = self._completion_tokens / max(choices, 1)
            self._metrics.finished(
                model=self.model,
                prompt=self._prompt_tokens,
                completion=self._completion_tokens,
                seconds=now - self._began,
                per_token=(now - first_at) / (per_choice - 1) if per_choice > 1 else None,
            )

    async def aclose(self) -> None:
        """Cancel what is not finished, also where nobody began to read."""
        await self._pieces.aclose()

    def _count(self, one: tuple[int, Piece]) -> tuple[int, Piece]:
        if one[1].finish_reason == "error":
            raise ApiError(
                500, "the answer broke off: to follow its schema took more work than is allowed", code="grammar"
            )
        self._completion_tokens += one[1].token_id is not None
        self._exchange.completion_tokens = self._completion_tokens
        self._cached.setdefault(one[0], one[1].answer.cached_tokens)
        self._answers[one[0]] = one[1].answer
        return one

    async def scores(self, prompt: int) -> Sequence[TokenLogprob | None]:
        """Log-probabilities of a prompt's tokens, which were asked for; the first has none. Known once its first choice
        has a piece."""
        told = await self._off_loop(self._answers[prompt].prompt_logprobs)
        assert told is not None, "nobody asked for log-probabilities of prompts"
        return told

    async def prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None] | None:
        """The same as vLLM's ``prompt_logprobs``; None where the body has no such field."""
        k = self.asked.prompt_logprobs
        if k is None:
            return None
        return [
            None if one is None else {str(other.token_id): prompt_logprob(other) for other in (one, *one.top[:k])}
            for one in await self.scores(prompt)
        ]

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def _fingerprint(model: Aria) -> str:
    """Changes with all that answers depend on beside the request: program, weights, dtype and device."""
    weight = model.language_model.lm_head.weight.detach()
    parts = version("aria-moe"), torch.__version__, model.config, weight.dtype, weight.device.type
    sample = weight[0].float().cpu().numpy().tobytes()
    return "fp_" + hashlib.sha256(repr(parts).encode() + sample).hexdigest()[:12]


def prompt_logprob(one: TokenLogprob) -> dict[str, Any]:
    """A token of a prompt, or another that was likely in its place, in vLLM's form."""
    return {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.token}


async def _together(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several answers as they come."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    inbox: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def read(i: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    inbox.put_nowait((i, piece))
            inbox.put_nowait((i, None))
        except Exception as error:
            inbox.put_nowait((i, error))

    readers = [asyncio.create_task(read(i, stream)) for i, stream in enumerate(streams)]
    try:
        growing = len(readers)
        while growing:
            i, one = await inbox.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                growing -= 1
            else:
                yield i, one
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
