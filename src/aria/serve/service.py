"""`Service`: an engine with a server's settings. Prepares prompts off the event loop and counts tokens."""

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
from aria.serve import generation_request
from aria.serve.active_requests import RequestThreadPool, current_request
from aria.serve.errors import ApiError, context_length, invalid_request, overloaded
from aria.serve.generation_request import Defaults, GenerationRequest
from aria.serve.metrics import ServerMetrics
from aria.serve.named_media import NamedMedia
from aria.serve.request_context import RequestContext
from aria.serve.settings import ServerSettings
from aria.serve.truncation import prepare_latest
from aria.workers import BusyError
from aria.workers.cancellation import run_cancellable

T = TypeVar("T")
logger = logging.getLogger(__name__)

GRAMMAR_THREADS = 16
"""Maximum number of requests whose schemas or grammars are checked at a time."""
STEP_SECONDS = 120.0
"""Default time limit of a step: first steps compile kernels for up to a minute on a GPU, and large models are slow on a
CPU."""
QUICK_MODEL = 100_000_000
"""Number of active parameters below which a step takes less than a second on a CPU."""
QUICK_STEP_SECONDS = 4.0
"""Default time limit of a step of such a model on a CPU."""
LARGE_BODY = 1 << 17
"""Size in memory above which parsing a body takes more than a millisecond or two."""
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EAGAIN)
"""System errors that are not the fault of a request."""
PROBE_SECONDS = 4.0
"""Time limit of the health check, which generates one token if the model's last step failed."""


class Service:
    """An engine with a server's settings.

    Args:
        engine: Runs the model; the caller closes it.
        settings: Names and limits.

    Raises:
        ValueError: An adapter has a name of the model.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings):
        if both := [name for name in engine.adapters if name in settings.model_names]:
            raise ValueError(f"{both[0]!r} is the name of the model and of an adapter; give one of them another")
        self.engine = engine
        self.settings = settings
        self.metrics = ServerMetrics(engine, lambda: not (engine.failing or self.hanging))
        self.created = int(time.time())
        self.fingerprint = _fingerprint(engine.model)
        # Text-only requests never wait for slow downloads.
        self._texts = RequestThreadPool(2, "aria-text")
        # They mostly wait for a worker process that compiles a schema, which may take seconds.
        self._grammars = RequestThreadPool(GRAMMAR_THREADS, "aria-grammar")
        self._media = RequestThreadPool(settings.media_threads, "aria-media")
        self._named_media = NamedMedia(settings.named_media_bytes)
        self.adapters_lock = asyncio.Lock()
        """Held while adapters are loaded or unloaded."""
        self._probe: asyncio.Task[None] | None = None

    @property
    def processor(self) -> AriaProcessor:
        return self.engine.processor

    @cached_property
    def defaults(self) -> Defaults:
        """Values of fields that bodies leave out."""
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
        """Names that requests may use: those of the model, then its adapters."""
        return (*self.settings.model_names, *self.engine.adapters)

    def adapter(self, model: str) -> str | None:
        """The adapter of a model name; None for the model itself."""
        return model if model in self.engine.adapters else None

    def model(self, name: str | None) -> str:
        """Resolve the model name of a request.

        Raises:
            ApiError: 404, no such model.
        """
        names = self.models
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                404,
                f"there is no model {name!r:.200}; available are {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name

    @cached_property
    def _token_characters(self) -> int:
        """Maximum number of characters per token: a bound on a prompt's length without tokenizing it."""
        tokenizer = self.processor.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def check_length(self, prompt: Any) -> None:
        """Refuse a prompt that is obviously too long, without tokenizing it.

        Raises:
            ContextLengthError: It has more characters than fit into the context.
        """
        if (characters := generation_request.characters(prompt)) > self._token_characters * self.defaults.max_model_len:
            tokens = f"at least {-(-characters // self._token_characters)} tokens"
            raise ContextLengthError(self.defaults.max_model_len, tokens, "shorten it")

    def check_media(self, count: int, param: str) -> None:
        """Refuse requests with too many media.

        Raises:
            ApiError: 400.
        """
        if count > self.settings.max_media:
            most = f"at most {self.settings.max_media} are allowed (--max-media)"
            raise ApiError(400, f"there are {count} images, videos and documents; {most}", param=param)

    def named(self, prompt: Sequence[Any], context: RequestContext) -> Sequence[Any]:
        """Insert the media that a conversation references by uuid. Media with a URL are fetched.

        Raises:
            ApiError: 400, no medium is kept under a uuid.
        """
        return self._named_media.resolve(context.client, prompt, self.processor.media)

    def _prepare(self, prompt: Any, request: GenerationRequest, context: RequestContext) -> Prepared:
        """Prepare a conversation: tokens and images."""
        messages = self.named(prompt, context)

        def prepare(part: Sequence[Any]) -> Prepared:
            self.check_length(part)
            return self.engine.prepare_blocking(part, **request.template)

        def measure(part: Sequence[Any]) -> int:
            self.check_length(part)
            return len(self.processor.prepare(part, add_generation_prompt=False).ids)

        try:
            return prepare(messages)
        except ContextLengthError:
            if not request.truncate:
                raise
        most = self.defaults.max_model_len
        return prepare_latest(messages, prepare, measure, room=most - min(request.params.max_tokens, most // 4))

    async def off_loop(
        self, work: Callable[[], T], *, media: bool = False, param: str | None = None, grammar: bool = False
    ) -> T:
        """Run blocking work in a thread, which is cancelled when the client disconnects.

        The request is counted until the thread has stopped. Errors in its messages or media become a 400.
        """
        pool = self._media if media else self._grammars if grammar else self._texts
        try:
            return await run_cancellable(pool, work)
        except ContextLengthError as error:
            raise context_length(error, param) from error
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _OURS:
                raise overloaded(f"the server is short of a resource ({error.strerror}); try again") from error
            raise ApiError(400, str(error), param=param) from error
        except BusyError as error:
            raise overloaded(str(error)) from error

    async def read(self, work: Callable[[], T]) -> T:
        """Process a request body, in a thread if it is large. The work raises only :class:`ApiError` for its faults."""
        request = current_request()
        return await self.off_loop(work) if request is not None and request.nbytes > LARGE_BODY else work()

    async def start(
        self, request: GenerationRequest, *, id: str, model: str | None, param: str, context: RequestContext
    ) -> Run:
        """Start generating and wait for the first token, so that earlier errors can be reported by status.

        Args:
            request: What to generate.
            id: Id of the response.
            model: The model name in the body.
            param: The field that holds the prompt, for errors.
            context: Receives token counts.

        Raises:
            ApiError: 400 or 404, the request cannot be fulfilled.
        """
        name = self.model(model)
        wanted = len(request.prompts) * request.params.n
        if wanted > self.settings.max_choices:
            raise ApiError(
                400, f"{wanted} choices are requested; at most {self.settings.max_choices} are allowed", param="n"
            )
        self.check_media(media := request.media, param)
        began = time.perf_counter()

        def work() -> list[Prepared]:
            if param != "prompt":
                return [self._prepare(prompt, request, context) for prompt in request.prompts]
            for prompt in request.prompts:
                self.check_length(prompt)
            return [self.engine.prepare_text_blocking(prompt) for prompt in request.prompts]  # type: ignore[arg-type]

        if request.params.constraint is not None:
            # Otherwise the engine's thread would compile it, and block all requests.
            await self.off_loop(lambda: self._compile(request), grammar=True)
        prepared = await self.off_loop(work, media=media > 0, param=param)
        context.prompt_tokens = sum(len(one.ids) for one in prepared)
        run = Run(self, request, prepared, id, name, began, context)
        try:
            await run.begin()
        except ContextLengthError as error:
            raise context_length(error, param) from error
        except ValueError as error:
            raise invalid_request(error) from error
        return run

    @property
    def max_step_seconds(self) -> float:
        """Time limit of a step of the model, in seconds."""
        if self.settings.step_seconds is not None:
            return self.settings.step_seconds
        engine = self.engine
        quick = engine.device.type == "cpu" and engine.config.active_parameters() < QUICK_MODEL
        return QUICK_STEP_SECONDS if quick else STEP_SECONDS

    @property
    def hanging(self) -> bool:
        """Whether the current step exceeds its time limit."""
        return self.engine.step_seconds > self.max_step_seconds

    @property
    def unhealthy_reason(self) -> str:
        """Why :meth:`healthy` is false."""
        if self.hanging:
            return (
                f"a step of the model has taken {self.engine.step_seconds:.0f} s; at most {self.max_step_seconds:g} s "
                "are allowed (--step-seconds)"
            )
        return "the model fails at every step; see the server's log"

    def _compile(self, request: GenerationRequest) -> None:
        """Compile the request's grammar.

        Raises:
            ApiError: 400, it cannot be compiled; the error names the field at fault.
        """
        grammars = self.engine.grammars
        constraint = request.params.constraint
        assert constraint is not None, "there is nothing to compile"
        try:
            grammars.compile(constraint)
        except ValueError as error:
            # The grammar may combine several tools and a schema: check each alone to find the fault.
            for part in request.bound:
                try:
                    grammars.check(part.constraint)
                except ValueError as own:
                    _, cannot, why = str(own).partition(" cannot be ")
                    message = f"{part.name}{cannot}{why}" if cannot else f"{part.name}: {own}"
                    raise ApiError(400, message, param=part.param, code="invalid_schema") from own
            raise ApiError(400, str(error), code="invalid_schema") from error

    async def healthy(self) -> bool:
        """Whether the model responds. If its last step failed, which may have been the fault of one request, this
        generates a token to find out."""
        if self.engine.failing and not self.hanging:
            # Concurrent checks share one probe, and cancelling one of them does not cancel it.
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._ask_for_a_token())
            await asyncio.shield(self._probe)
        return not (self.engine.failing or self.hanging)

    async def _ask_for_a_token(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.engine.chat(await self.engine.prepare_text("Aria"), SamplingParams(max_tokens=1))
        except Exception as error:
            logger.error("the model does not respond: %r", error, exc_info=error)

    def close(self) -> None:
        """Shut down the threads; the engine stays open."""
        self._texts.shutdown(wait=False, cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)
        self._media.shutdown(wait=False, cancel_futures=True)


class Run:
    """A generation in progress.

    Attributes:
        id, created, model, fingerprint: Fields of responses and chunks.
        request: What is generated.
        prompt_ids: Token ids of each prompt.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        prepared: Sequence[Prepared],
        id: str,
        model: str,
        began: float,
        context: RequestContext,
    ):
        self.id = id
        self.created = int(time.time())
        self.model = model
        self.fingerprint = service.fingerprint
        self.request = request
        self.tokenizer = service.processor.tokenizer
        self._metrics = service.metrics
        self._began = began
        self.prompt_ids = [list(one.ids) for one in prepared]
        self._context = context
        self._prompt_tokens = sum(len(one.ids) for one in prepared)
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}
        self._first: tuple[int, Piece] | None = None
        self._answers: dict[int, Answer] = {}
        self._off_loop = service.off_loop
        adapter = service.adapter(model)
        self._pieces = _merge([service.engine.pieces(one, request.params, adapter=adapter) for one in prepared])

    async def begin(self) -> None:
        """Wait for the first token."""
        self._first = await anext(self._pieces)
        self._metrics.first_token.observe(time.perf_counter() - self._began)

    async def read(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield tokens as they come, each with the index of its prompt. Closing this cancels what is unfinished."""
        assert self._first is not None, "call begin() before read()"
        first_at = time.perf_counter()
        try:
            async with aclosing(self._pieces) as pieces:
                yield self._count(self._first)
                async for one in pieces:
                    yield self._count(one)
        finally:
            now = time.perf_counter()
            choices = len(self._cached) * self.request.params.n
            per_choice = self._completion_tokens / max(choices, 1)
            self._metrics.finished(
                model=self.model,
                prompt=self._prompt_tokens,
                completion=self._completion_tokens,
                seconds=now - self._began,
                per_token=(now - first_at) / (per_choice - 1) if per_choice > 1 else None,
            )

    async def aclose(self) -> None:
        """Cancel what is unfinished, even if nothing was read."""
        await self._pieces.aclose()

    def _count(self, one: tuple[int, Piece]) -> tuple[int, Piece]:
        if one[1].finish_reason == "error":
            raise ApiError(500, "generation stopped: following the schema exceeded its limits", code="grammar")
        self._completion_tokens += one[1].token_id is not None
        self._context.completion_tokens = self._completion_tokens
        self._cached.setdefault(one[0], one[1].answer.cached_tokens)
        self._answers[one[0]] = one[1].answer
        return one

    async def token_logprobs(self, prompt: int) -> Sequence[TokenLogprob | None]:
        """Log-probabilities of a prompt's tokens; the first has none. Available after the first token of a choice."""
        logprobs = await self._off_loop(self._answers[prompt].prompt_logprobs)
        assert logprobs is not None, "log-probabilities of prompts were not requested"
        return logprobs

    async def prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None] | None:
        """The same in vLLM's format, for ``prompt_logprobs``; None if it was not requested."""
        k = self.request.prompt_logprobs
        if k is None:
            return None
        return [
            None if one is None else {str(other.token_id): prompt_logprob(other) for other in (one, *one.top[:k])}
            for one in await self.token_logprobs(prompt)
        ]

    def usage(self) -> dict[str, Any]:
        """Token counts so far, in OpenAI's format."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def _fingerprint(model: Aria) -> str:
    """A hash of everything besides the request that determines its response: program, weights, dtype and device."""
    weight = model.language_model.lm_head.weight.detach()
    parts = version("aria-moe"), torch.__version__, model.config, weight.dtype, weight.device.type
    sample = weight[0].float().cpu().numpy().tobytes()
    return "fp_" + hashlib.sha256(repr(parts).encode() + sample).hexdigest()[:12]


def prompt_logprob(one: TokenLogprob) -> dict[str, Any]:
    """A prompt token, or a likely alternative to it, in vLLM's format."""
    return {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.token}


async def _merge(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Merge several streams, in order of arrival."""
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
        unfinished = len(readers)
        while unfinished:
            i, one = await inbox.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                unfinished -= 1
            else:
                yield i, one
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
