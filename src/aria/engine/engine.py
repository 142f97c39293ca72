"""`Engine`: answers conversations in batches, with images, adapters and structured output."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from aria.checkpoint import load_model
from aria.checkpoint.adapter import read_adapter
from aria.config import AriaConfig
from aria.engine.core import EngineCore, Token
from aria.engine.decoded_logprobs import decoded_logprob, decoded_prompt_logprobs
from aria.engine.failures import StepError, failure
from aria.engine.generation import read_generation_config
from aria.engine.grammar import Grammars
from aria.engine.matcher import Matcher
from aria.engine.outputs import Choice, Completion, FinishReason, Result, Stats, TokenLogprob, Usage
from aria.engine.request import Request, block_digests
from aria.engine.sampler import EndText
from aria.engine.sampling_params import SamplingParams
from aria.engine.warm_up import WarmUp
from aria.processor import AriaImageProcessor, AriaProcessor, AriaTokenizer
from aria.processor.chat import END_OF_TURN, Prompt
from aria.processor.image_inputs import ImageSpan, Prepared

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


def reject_unsupported(**settings: object) -> None:
    """Reject values of arguments that are reserved and not implemented yet, which would otherwise be ignored."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is not supported yet; leave it out")


class _RepeatedVocabulary(AriaTokenizer):
    """nano's vocabulary repeated, so that every token id of a model with random weights has some text."""

    def token_bytes(self, index: int, *, skip_special_tokens: bool = False) -> bytes:
        return super().token_bytes(index % self.vocab_size, skip_special_tokens=skip_special_tokens)


def _processor(path_or_repo_id: str | os.PathLike[str] | AriaConfig | None, revision: str | None) -> AriaProcessor:
    if not isinstance(path_or_repo_id, AriaConfig):
        return AriaProcessor.from_pretrained(path_or_repo_id, revision=revision)
    sizes = path_or_repo_id.image_sizes()
    image_processor = AriaImageProcessor(
        sizes=tuple(sizes), max_image_size=max(sizes), min_image_size=min(336, min(sizes))
    )
    return AriaProcessor(image_processor, _RepeatedVocabulary.from_pretrained(), size_conversion=sizes)


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer."""

    answer: Answer
    choice: int
    """Index of the choice, below ``n``."""
    text: str
    """May be empty: incomplete characters, and possible beginnings of stop texts, are held back."""
    token_id: int | None
    """None if ``max_tokens`` is 0: only the prompt was read."""
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    """Set in a choice's last piece."""


class Answer:
    """The answer to one conversation while it is generated: ``n`` choices."""

    def __init__(self, tokenizer: AriaTokenizer, completions: Sequence[Completion], requests: Sequence[Request]):
        self._tokenizer = tokenizer
        self.prompt_tokens = len(requests[0].prompt)
        self.completions = completions
        self.requests = requests
        self.pieces: deque[Piece] = deque()
        """Pieces that were not consumed yet."""
        self.error: Exception | None = None
        """Why it failed, if it did."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache. Known from the first piece on.

        What later choices share with the first one does not count.
        """
        return self.requests[0].cached_tokens

    @property
    def done(self) -> bool:
        """Whether all choices have ended or the answer has failed."""
        return self.error is not None or all(completion.finish_reason is not None for completion in self.completions)

    def result(self) -> Result:
        """The complete result, once it is :attr:`done`.

        Raises:
            RuntimeError: The answer failed.
        """
        if self.error is not None:
            raise self.error
        choices = []
        for completion in self.completions:
            assert completion.finish_reason is not None, "the answer is not complete"
            logprobs = tuple(completion.logprobs) or None
            choices.append(Choice(completion.text, tuple(completion.token_ids), completion.finish_reason, logprobs))
        usage = Usage(self.prompt_tokens, sum(len(choice.token_ids) for choice in choices))
        return Result(tuple(choices), usage, self.prompt_logprobs())

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt were requested and are not complete yet. They are complete once the
        first choice has a piece."""
        logprobs = self.requests[0].prompt_logprobs
        return logprobs is not None and not logprobs.complete

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Log-probabilities of the prompt's tokens, if requested, once it is no longer :attr:`scoring`.

        Any thread may call this. It takes a while for a long prompt.
        """
        logprobs = self.requests[0].prompt_logprobs
        if logprobs is None:
            return None
        assert logprobs.complete, "the prompt's log-probabilities are not complete"
        return decoded_prompt_logprobs(self._tokenizer, self.requests[0].prompt, logprobs)


class Engine:
    """Answers conversations with one model.

    Requests are batched continuously over a paged KV cache: chunked prefill runs beside decoding, common prefixes
    (images included) are computed once, and if the cache is full the latest request is preempted and computed again.

    Args:
        path_or_repo_id: Folder, Hub repository, or None for the packaged nano model. An `AriaConfig` makes random
            weights for benchmarks, with nano's vocabulary.
        revision: Branch, tag or commit of a Hub repository.
        dtype: Data type of the weights; None means the checkpoint's on CUDA and float32 on CPUs.
        device: None means CUDA if available.
        max_model_len: Maximum number of tokens of a prompt and its answer together; None means the model's maximum, or
            what fits into memory if that is less.
        memory_utilization: Fraction of the GPU's memory for weights, KV cache and activations together.
        cache_tokens: Capacity of the KV cache in tokens; None means what fits.
        max_batch: Maximum number of concurrent sequences; None means 256 on CUDA and 16 on CPUs.
        adapters: LoRA adapters in PEFT's format, as folders or Hub repositories by the names that requests use.
            Requests of several adapters and of the base model share steps.
        quantization: Not supported yet; must be None.

    Raises:
        FileNotFoundError: There is no such model or adapter.
        ValueError: The files are not an Aria model or an adapter of one, or a setting is out of range.
    """

    def __init__(
        self,
        path_or_repo_id: str | os.PathLike[str] | AriaConfig | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quantization: None = None,
        max_model_len: int | None = None,
        memory_utilization: float = 0.9,
        cache_tokens: int | None = None,
        max_batch: int | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ):
        reject_unsupported(quantization=quantization)
        for name, value, holds, expected in (
            ("max_batch", max_batch, max_batch is None or max_batch >= 1, "at least 1"),
            ("cache_tokens", cache_tokens, cache_tokens is None or cache_tokens >= 1, "at least 1"),
            ("memory_utilization", memory_utilization, 0 < memory_utilization <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; expected {expected}")
        self.processor = _processor(path_or_repo_id, revision)
        config = path_or_repo_id
        if not isinstance(config, AriaConfig):
            config = AriaConfig.from_pretrained(config, revision=revision)
        self.generation_config = read_generation_config(path_or_repo_id, revision)
        """The model's ``generation_config.json``; empty if it has none."""
        stored = {name: read_adapter(folder, config) for name, folder in (adapters or {}).items()}
        self.model = load_model(path_or_repo_id, revision=revision, dtype=dtype, device=device)
        self.core = EngineCore(
            self.model,
            adapters={name: adapter.weights for name, adapter in stored.items()},
            max_batch=max_batch or (256 if self.device.type == "cuda" else 16),
            max_model_len=max_model_len,
            cache_blocks=None if cache_tokens is None else EngineCore.blocks_for(self.device, cache_tokens),
            memory_utilization=memory_utilization,
            image_mean=self.processor.image_processor.image_mean,
            image_std=self.processor.image_processor.image_std,
        )
        tokenizer = self.processor.tokenizer
        self.grammars = Grammars(tokenizer, self.model.config.text.vocab_size, lambda: self.processor.workers)
        """Compiles schemas and grammars, in any thread. :meth:`queue` does it too, if it was not done in advance."""
        self._end_token_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._answers: dict[Request, tuple[Answer, int]] = {}
        self.failed: list[Answer] = []
        """Answers that failed in the last step."""

    @property
    def config(self) -> AriaConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device of the weights and the KV cache."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.model.dtype

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""
        return self.core.max_model_len

    @property
    def max_batch(self) -> int:
        """Maximum number of concurrent sequences."""
        return self.core.max_batch

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache's blocks."""
        return self.core.cache_bytes

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return self.core.adapters.names

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return self.core.busy

    @property
    def failing(self) -> bool:
        """Whether a step failed, and no step has produced tokens since."""
        return self.core.failing

    def add_adapter(self, name: str, source: str | os.PathLike[str]) -> None:
        """Load a LoRA adapter under a name, replacing one of the same name.

        Running requests keep the adapter they have. Like every method that changes the engine, this has to be called in
        the thread that calls :meth:`step`; :meth:`AsyncEngine.add_adapter` may be called at any time.

        Args:
            name: The name for requests to use.
            source: Folder or Hub repository in PEFT's format.

        Raises:
            FileNotFoundError: There is no such adapter.
            ValueError: It does not fit the model or the remaining memory.
        """
        self.core.add_adapter(name, read_adapter(source, self.model.config).weights)

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter. Its memory is freed once the requests that use it are finished.

        Raises:
            ValueError: There is no such adapter.
        """
        self.core.remove_adapter(name)

    @cached_property
    def _end_text(self) -> EndText:
        """Tokens that lead to the end of a turn. Finding them in Aria's vocabulary takes a few tenths of a second."""
        tokenizer, size = self.processor.tokenizer, self.model.config.text.vocab_size
        # Ids beyond the tokenizer's vocabulary have no text.
        tokens = [tokenizer.token_bytes(index) if index < len(tokenizer) else b"" for index in range(size)]
        return EndText.of(END_OF_TURN, tokens, self.device)

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Result]:
        """Answer conversations.

        Args:
            conversations: A list of conversations; a message is ``{"role": ..., "content": text or parts}``.
            params: Sampling parameters for all of them.
            adapter: Name of the adapter that answers; None is the base model.

        Returns:
            One result per conversation, in order.

        Raises:
            ValueError: A malformed message, a prompt that leaves no room for an answer, or an unknown adapter. No
                conversation is computed then.
            RuntimeError: The model failed on one of them.
        """
        if conversations and isinstance(conversations[0], Mapping):
            raise ValueError("chat takes a list of conversations, each a list of messages; wrap this one in a list")
        self.core.adapters.key(adapter)
        prepared = [self.prepare(messages) for messages in conversations]
        answers = [self.queue(one, params, adapter=adapter) for one in prepared]
        try:
            while not all(answer.done for answer in answers) and not any(answer.error for answer in answers):
                self.step()
        finally:
            for answer in answers:
                self.cancel(answer)
        return [answer.result() for answer in answers]

    def stream(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[str]:
        """Answer one conversation and yield the first choice's text in pieces.

        Several streams may be read in turn: each step serves all of them. Closing one cancels its request.
        """
        pieces = self._stream(self.queue(self.prepare(messages), params, adapter=adapter))
        # Only a started generator runs its cleanup when it is closed or garbage-collected.
        next(pieces)
        return pieces

    def _stream(self, answer: Answer) -> Iterator[str]:
        """Yield an empty text to start, then the first choice's text."""
        try:
            yield ""
            while True:
                while answer.pieces:
                    piece = answer.pieces.popleft()
                    if piece.choice == 0 and piece.text:
                        yield piece.text
                if answer.error is not None:
                    raise answer.error
                if answer.done:
                    return
                if not any(request in self._answers for request in answer.requests):
                    raise RuntimeError("the answer was cancelled, or a step of the model failed")
                self.step()
        finally:
            self.cancel(answer)

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Turn messages into token ids and images. Does not touch the engine's state, so any thread may call it.

        Args:
            messages: A conversation.
            add_generation_prompt: End the prompt with the opening of the assistant's turn.
            continue_final_message: Leave the last message open instead, for the answer to continue it.
            variables: Further variables of a chat template other than Aria's.

        Raises:
            ValueError: A malformed message, or a prompt that leaves no room for an answer.
        """
        prepared = self.processor.prepare(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        self.core.check(len(prepared.ids), sum(image.tokens for image in prepared.images))
        return self.digest(prepared)

    def prepare_text(self, text: str | Sequence[int]) -> Prepared:
        """Turn text to complete, or its token ids, into a prompt without template and images.

        The text is the whole prompt: ``<|im_start|>`` and the other markers in a plain string are control tokens.
        Untrusted text belongs in messages (:meth:`prepare`) or in a :class:`~aria.processor.Prompt`.

        Raises:
            ValueError: A token id that is out of range or stands for an image, or no room for an answer.
        """
        tokenizer = self.processor.tokenizer
        if isinstance(text, Prompt) and text.slots:
            raise ValueError(f"the prompt has places for {len(text.slots)} images; send images in messages")
        prompt = Prompt.raw(text) if isinstance(text, str) and not isinstance(text, Prompt) else text
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        vocabulary = self.model.config.text.vocab_size
        for token in ids if not isinstance(text, str) else ():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise ValueError(f"the prompt has {token!r:.40} for a token id; expected 0 to {vocabulary - 1}")
            if token == tokenizer.image_token_id:
                raise ValueError(f"token id {token} of the prompt stands for an image; send images in messages")
        self.core.check(len(ids))
        return self.digest(Prepared(ids, []))

    def digest(self, prepared: Prepared) -> Prepared:
        """Compute the content hashes of the prompt's blocks for the prefix cache, unless they exist.

        Any thread may call this, preferably not the one that runs the model: a long prompt takes as long as a step.
        """
        size = self.core.block_size
        if size not in prepared.digests:
            prepared.digests[size] = block_digests(prepared.ids, self._image_spans(prepared), size)
        return prepared

    def _image_spans(self, prepared: Prepared) -> list[ImageSpan]:
        patches = self.core.runner.encoder.patches
        return [replace(span, patches=patches(span.data)) for span in prepared.images]

    def queue(
        self,
        prepared: Prepared,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        matchers: Sequence[Matcher] | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """Queue a conversation, for :meth:`step` to answer.

        Args:
            prepared: Result of :meth:`prepare` or :meth:`prepare_text`.
            params: How to sample, and when to stop.
            priority: Lower runs first.
            matchers: Matchers of the schema or grammar, one for each choice; None makes them here.
            adapter: Name of the adapter that answers; None is the base model.

        Raises:
            ValueError: The parameters do not fit the model, the schema is not supported, or there is no such adapter.
                Nothing is queued then.
        """
        params = params or SamplingParams()
        constraint = params.constraint
        if matchers is None:
            matchers = () if constraint is None else self.grammars.matchers(constraint, params.n, prepared.stop)
        self.digest(prepared)
        requests = self.core.add(
            prepared.ids,
            params,
            images=self._image_spans(prepared),
            digests=prepared.digests[self.core.block_size],
            end_token_ids=self._end_token_ids,
            end_text=self._end_text if params.min_tokens and prepared.stop else None,
            matchers=matchers,
            priority=priority,
            adapter=adapter,
        )
        # With a schema, the text that ends a turn can only be part of a value, so it ends nothing.
        turn_ends = () if params.ignore_eos or params.json_schema is not None else prepared.stop
        completions = [
            Completion(
                min(params.max_tokens, request.max_tokens),
                request.end_token_ids,
                self.processor.tokenizer,
                params.stop or (),
                turn_ends,
                params.include_stop_str_in_output,
                params.min_tokens,
                params.skip_special_tokens,
            )
            for request in requests
        ]
        answer = Answer(self.processor.tokenizer, completions, requests)
        for choice, request in enumerate(requests):
            self._answers[request] = answer, choice
        return answer

    def step(self) -> list[Piece]:
        """Run one step of the model for all running answers, and return their new pieces.

        Answers that fail have an ``error`` and are listed in :attr:`failed`; the others continue. A keyboard interrupt
        ends all answers, because tokens of any of them may be lost.
        """
        self.failed = []
        try:
            try:
                tokens = self.core.step()
                failed: dict[Request, Exception] = {}
            except StepError as error:
                tokens, failed = error.tokens, error.failed
            pieces = []
            for token in tokens:
                try:
                    pieces.append(self._piece(token))
                except Exception as error:
                    logger.error("an answer could not be continued", exc_info=error)
                    failed[token.request] = failure("the answer could not be continued", error)
            for request, reason in failed.items():
                self._fail(request, reason)
            return pieces
        except BaseException:
            self.core.reset()
            self._answers.clear()
            raise

    def _fail(self, request: Request, error: Exception) -> None:
        """Fail the answer of a failed request."""
        if request in self._answers:
            answer, _ = self._answers[request]
            answer.error = error
            self.cancel(answer)
            self.failed.append(answer)

    def _piece(self, token: Token) -> Piece:
        answer, choice = self._answers[token.request]
        completion = answer.completions[choice]
        logprob = self._logprob(token)
        text = completion.push(token.token_id, logprob, token.request.end)
        kept = token.token_id if completion.max_tokens else None
        piece = Piece(answer, choice, text, kept, logprob, completion.finish_reason)
        answer.pieces.append(piece)
        if completion.finish_reason is not None:
            self.core.finish(token.request)
            self._answers.pop(token.request, None)
        return piece

    def cancel(self, answer: Answer) -> None:
        """Cancel an answer, at any moment. One that is done is left alone."""
        for request in answer.requests:
            self.core.cancel(request)
            self._answers.pop(request, None)

    def encode_images(self, prepared: Prepared) -> None:
        """Encode the images of a prompt ahead of its request, which then finds their image tokens in the cache."""
        self.core.encode_images(self._image_spans(prepared))

    def reset(self) -> None:
        """Cancel all requests, and empty the prefix cache and the cache of image tokens."""
        self.core.reset()
        self.core.clear_image_cache()
        self._answers.clear()

    def close(self) -> None:
        """Cancel all requests and wait for the device."""
        self.core.close()
        self._answers.clear()

    def warm_up(self) -> None:
        """Compile kernels and capture CUDA graphs before serving, and prepare the vocabulary for structured output.

        It takes up to a few minutes on CUDA. Nothing may be queued meanwhile.
        """
        _ = self._end_text
        # Without the package, a request with a schema reports the error.
        with suppress(ModuleNotFoundError):
            self.grammars.load()
        if self.device.type == "cuda":
            images = self._sample_images()
            # One adapter is enough: all adapters use the same kernels.
            for adapter in (None, *self.adapters[:1]):
                WarmUp(self.core, adapter).run(images)

    def _sample_images(self) -> list[list[ImageSpan]]:
        """Images of one prompt each: for every crop size two squares, and one image that is resized in both axes."""
        found = []
        for size, tokens in self.processor.size_conversion.items():
            for color, shape in ("black", (size, size)), ("white", (size, size)), ("black", (size * 2, size + 50)):
                if 2 * tokens < self.max_model_len:
                    image = {"type": "image", "image": Image.new("RGB", shape, color), "max_image_size": size}
                    found.append(self._image_spans(self.prepare([{"role": "user", "content": [image]}])))
        return found

    def stats(self) -> Stats:
        """Current load and counters. Any thread may call this."""
        return self.core.stats()

    def _logprob(self, token: Token) -> TokenLogprob | None:
        if token.logprobs is None:
            return None
        return decoded_logprob(self.processor.tokenizer, token.token_id, token.logprobs)
