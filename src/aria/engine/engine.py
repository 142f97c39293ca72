"""`Engine`: conversations in, answers out, many together."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from PIL import Image

from aria.checkpoint import load_model
from aria.checkpoint.adapter import read_adapter
from aria.config import AriaConfig
from aria.engine.core import EngineCore, Token
from aria.engine.failures import StepError, failure
from aria.engine.generation import read_generation_config
from aria.engine.grammar import Grammars
from aria.engine.matcher import Matcher
from aria.engine.outputs import Choice, Completion, FinishReason, Result, Stats, TokenLogprob, Usage
from aria.engine.prompt_logprobs import PromptLogprobs
from aria.engine.request import Request, block_digests
from aria.engine.runner import TokenLogprobs
from aria.engine.sampler import EndText
from aria.engine.sampling_params import SamplingParams
from aria.engine.warm_up import WarmUp
from aria.processor import AriaImageProcessor, AriaProcessor, AriaTokenizer
from aria.processor.chat import END_OF_TURN, Prompt
from aria.processor.image_inputs import ImageSpan, Prepared

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


def refuse_unbuilt(**settings: object) -> None:
    """Settings of the contract that have no code behind them yet: a value would be ignored, so it is an error."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is not offered yet; leave it out")


class _StandIn(AriaTokenizer):
    """nano's vocabulary over and over, so that every id of random weights has a text, if a senseless one."""

    def token_bytes(self, index: int, *, skip_special_tokens: bool = False) -> bytes:
        return super().token_bytes(index % self.vocab_size, skip_special_tokens=skip_special_tokens)


def _processor(path_or_repo_id: str | os.PathLike[str] | AriaConfig | None, revision: str | None) -> AriaProcessor:
    if not isinstance(path_or_repo_id, AriaConfig):
        return AriaProcessor.from_pretrained(path_or_repo_id, revision=revision)
    sizes = path_or_repo_id.image_sizes()
    image_processor = AriaImageProcessor(
        sizes=tuple(sizes), max_image_size=max(sizes), min_image_size=min(336, min(sizes))
    )
    return AriaProcessor(image_processor, _StandIn.from_pretrained(), size_conversion=sizes)


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer."""

    answer: Answer
    choice: int
    """Which of the ``n`` choices."""
    text: str
    """May be empty: half a character, or what may yet turn out to be a stop text, is held back."""
    token_id: int | None
    """None where the answer was to have no token: the prompt was read."""
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    """Set with a choice's last piece."""


class Answer:
    """A conversation that is being answered: ``n`` choices as they grow."""

    def __init__(self, tokenizer: AriaTokenizer, completions: Sequence[Completion], requests: Sequence[Request]):
        self._tokenizer = tokenizer
        self.prompt_tokens = len(requests[0].prompt)
        self.completions = completions
        self.requests = requests
        self.pieces: deque[Piece] = deque()
        """What came and was not taken yet."""
        self.error: Exception | None = None
        """Why there will be no more of it, where the model failed."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that did not have to be read, because the cache had them from earlier requests.

        Known from the first piece on. Later choices also find what the first has read, which does not count.
        """
        return self.requests[0].cached_tokens

    @property
    def done(self) -> bool:
        """Whether all choices have ended, or it failed."""
        return self.error is not None or all(completion.finish_reason is not None for completion in self.completions)

    def result(self) -> Result:
        """The whole, once it is :attr:`done`.

        Raises:
            RuntimeError: it failed.
        """
        if self.error is not None:
            raise self.error
        choices = []
        for completion in self.completions:
            assert completion.finish_reason is not None, "a result was asked for before the end"
            logprobs = tuple(completion.logprobs) or None
            choices.append(Choice(completion.text, tuple(completion.token_ids), completion.finish_reason, logprobs))
        usage = Usage(self.prompt_tokens, sum(len(choice.token_ids) for choice in choices))
        return Result(tuple(choices), usage, self.prompt_logprobs())

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt were asked for and are not complete. They are once the first choice
        has a piece."""
        logprobs = self.requests[0].prompt_logprobs
        return logprobs is not None and not logprobs.complete

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Of each token of the prompt, where they were asked for, once it is no longer :attr:`scoring`.

        Any thread may call it; a long prompt takes some time.
        """
        logprobs = self.requests[0].prompt_logprobs
        if logprobs is None:
            return None
        assert logprobs.complete, "log-probabilities of a prompt were asked for before it was read"
        return decoded_prompt_logprobs(self._tokenizer, self.requests[0].prompt, logprobs)


class Engine:
    """Answers conversations with one model.

    Requests run together over a paged cache: prompts are read in chunks beside answers that grow, equal beginnings
    (images included) are computed once, and when the cache is full the latest request waits and is computed again.

    Args:
        path_or_repo_id: folder, Hub repository, or None for the packaged nano model.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the weights; None means the checkpoint's on CUDA and float32 on CPU.
        device: None means CUDA where there is one.
        max_model_len: the most tokens of prompt and answer together; None means what the model was made for, or what
            fits into memory if that is less.
        memory_utilization: share of the GPU's memory that weights, cache and work may take together.
        cache_tokens: tokens that the cache of keys and values holds; None means what fits.
        max_batch: the most answers that grow together; None means 256 on CUDA and 16 on the CPU.
        adapters: folders or Hub repositories of LoRA adapters in PEFT's format, by the names that requests use.
            Requests of any of them, and of none, run in the same steps.
        quantization: not offered yet; anything but the default is refused.

    An `AriaConfig` in place of a path means random weights, to measure with; nano's vocabulary then stands in.

    Raises:
        FileNotFoundError: there is no such model or adapter.
        ValueError: the files are not a model of Aria or an adapter of it, or a setting is out of its limits.
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
        refuse_unbuilt(quantization=quantization)
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
        """The model's ``generation_config.json``; empty where it has none."""
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
        """Compiles schemas; :meth:`queue` does it too, but any thread may do so in advance."""
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
        return self.model.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.model.language_model.lm_head.weight.dtype

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
        """Load a LoRA adapter under a name, in place of the one of this name if there is one.

        Requests that are being answered keep theirs. As every method that changes the engine, this belongs to the
        thread that calls :meth:`step`; :meth:`AsyncEngine.add_adapter` may be called at any moment.

        Args:
            name: by which requests ask for it.
            source: a folder or Hub repository in PEFT's format.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it does not fit the model, or the memory that is left.
        """
        self.core.add_adapter(name, read_adapter(source, self.model.config).weights)

    def remove_adapter(self, name: str) -> None:
        """Let no more requests ask for an adapter; its memory is freed once those that have it are answered.

        Raises:
            ValueError: there is no such adapter.
        """
        self.core.remove_adapter(name)

    @cached_property
    def _end_text(self) -> EndText:
        """Tokens that lead to the end of a turn; finding them in Aria's vocabulary takes some tenths of a second."""
        tokenizer, size = self.processor.tokenizer, self.model.config.text.vocab_size
        # Ids past the tokenizer's have no text.
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
            conversations: a list of message lists; a message is ``{"role": ..., "content": text or parts}``.
            params: one set for all of them.
            adapter: the name of the one that answers; None: the model without any.

        Returns:
            One result for each conversation, in order.

        Raises:
            ValueError: a message that is not well-formed, a prompt that leaves no room for an answer, or no such
                adapter. Nothing is computed then, for any of the conversations.
            RuntimeError: the model failed at one of them.
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
        """Answer one conversation, piece by piece; the pieces joined are the first choice's text.

        Streams may be read in turn: each step serves all of them. Closing one cancels its request.
        """
        pieces = self._read(self.queue(self.prepare(messages), params, adapter=adapter))
        # Only a generator that has begun gets to its end when it is closed or forgotten.
        next(pieces)
        return pieces

    def _read(self, answer: Answer) -> Iterator[str]:
        """Nothing first, then the first choice's text."""
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
                    raise RuntimeError("the answer was given up: it was cancelled, or a step of the model failed")
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
        """Messages -> token ids and images. Touches nothing of the engine's state, so any thread may call it.

        Args:
            messages: a conversation.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open in place of that; the answer continues it.
            variables: what else a chat template other than Aria's reads.

        Raises:
            ValueError: a message that is not well-formed, or a prompt that leaves no room for an answer.
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
        """Text to be continued, or its token ids. No template is put around it, and no image is in it.

        The text is the whole prompt, as the caller wrote it: ``<|im_start|>`` and the other markers in a plain string
        are control tokens. Untrusted text belongs in messages (:meth:`prepare`) or a :class:`~aria.processor.Prompt`.

        Raises:
            ValueError: an id that is not in the vocabulary or stands for an image, or no room for an answer.
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
        """Make what the prefix cache knows the prompt's blocks by, unless it is there. Any thread may do it, and not
        the one that runs the model: for a long prompt it takes as long as a step."""
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
        """Take a conversation in; :meth:`step` answers it. A lower ``priority`` runs first; ``adapter`` names the one
        that answers.

        ``matchers`` are those of the schema or grammar, one for each answer; None: they are made here.

        Raises:
            ValueError: the parameters do not fit the model, the schema cannot be followed, or there is no such adapter.
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
        # With a schema, the text that ends a turn is text like any other: it can only stand inside of a value.
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
        """One step of the model for all answers that grow. Returns what was added to any of them.

        Answers that the model fails to compute have an ``error`` and stand in :attr:`failed`; the others go on. An
        interrupt from the keyboard ends all of them, because tokens of any may be lost.
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
        """A request failed, and its answer with it."""
        if request in self._answers:
            answer, _ = self._answers[request]
            answer.error = error
            self.cancel(answer)
            self.failed.append(answer)

    def _piece(self, token: Token) -> Piece:
        answer, choice = self._answers[token.request]
        completion = answer.completions[choice]
        logprob = self._named(token)
        text = completion.push(token.token_id, logprob, token.request.end)
        kept = token.token_id if completion.max_tokens else None
        piece = Piece(answer, choice, text, kept, logprob, completion.finish_reason)
        answer.pieces.append(piece)
        if completion.finish_reason is not None:
            self.core.finish(token.request)
            self._answers.pop(token.request, None)
        return piece

    def cancel(self, answer: Answer) -> None:
        """Stop working on an answer, at any moment; one that is done is left alone."""
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
        """Do now what first requests would wait for: lay out the vocabulary for schemas, where they are installed, and
        on CUDA compile kernels and capture graphs, which takes up to some minutes. Nothing may be queued meanwhile."""
        _ = self._end_text
        # Who asks for a schema without the package is told so then.
        with suppress(ModuleNotFoundError):
            self.grammars.load()
        if self.device.type == "cuda":
            images = self._sample_images()
            # Which adapter makes no difference, but that image tokens may be another's.
            for adapter in (None, *self.adapters[:1]):
                WarmUp(self.core, adapter).run(images)

    def _sample_images(self) -> list[list[ImageSpan]]:
        """Of prompts with an image each: of every crop size two squares and one that has to be resized both ways."""
        found = []
        for size, tokens in self.processor.size_conversion.items():
            for color, shape in ("black", (size, size)), ("white", (size, size)), ("black", (size * 2, size + 50)):
                if 2 * tokens < self.max_model_len:
                    image = {"type": "image", "image": Image.new("RGB", shape, color), "max_image_size": size}
                    found.append(self._image_spans(self.prepare([{"role": "user", "content": [image]}])))
        return found

    def stats(self) -> Stats:
        """How busy it is, and what it has done. Any thread may ask."""
        return self.core.stats()

    def _named(self, token: Token) -> TokenLogprob | None:
        if token.logprobs is None:
            return None
        return decoded_logprob(self.processor.tokenizer, token.token_id, token.logprobs)


def decoded_logprob(tokenizer: AriaTokenizer, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
    """Log-probabilities with the tokens' text."""
    top = tuple(TokenLogprob(id, tokenizer.decode([id]), value) for id, value in logprobs.likeliest)
    return TokenLogprob(token_id, tokenizer.decode([token_id]), logprobs.chosen, top)


def decoded_prompt_logprobs(
    tokenizer: AriaTokenizer, prompt: Sequence[int], logprobs: PromptLogprobs
) -> tuple[TokenLogprob | None, ...]:
    """Log-probabilities of a prompt with the tokens' text."""

    @cache
    def text(token: int) -> str:
        return tokenizer.decode([token])

    told: list[TokenLogprob | None] = []
    columns = logprobs.logprobs, logprobs.ranks, logprobs.top_ids, logprobs.top_logprobs
    for token, logprob, rank, ids, values in zip(prompt, *(column.tolist() for column in columns), strict=True):
        likeliest = enumerate(zip(ids, values, strict=True), 1)
        top = tuple(TokenLogprob(other, text(other), value, rank=place) for place, (other, value) in likeliest)
        told.append(TokenLogprob(token, text(token), logprob, top, rank))
    return (None, *told[1:])
