"""`Engine`: conversations in, answers out. T tokens of all prompts end to end, Q picture tokens, D hidden."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from aria.checkpoint import load_model
from aria.config import AriaConfig
from aria.engine.generation import Generation, TokenLogprobs
from aria.engine.outputs import Choice, Completion, Result, TokenLogprob, Usage
from aria.engine.sampler import Draw, noise_stream
from aria.engine.sampling_params import SamplingParams
from aria.model import Aria, pack_patches
from aria.ops import Segments
from aria.processor import AriaImageProcessor, AriaProcessor, AriaTokenizer

Message = Mapping[str, Any]
END_OF_TURN = "<|im_end|>"
"""Ends a message in Aria's chat format; ordinary text of several tokens, so it is matched as text."""


def answer_draws(params: SamplingParams, device: torch.device) -> list[Draw]:
    """How each of the ``n`` answers of one request is drawn."""
    if params.temperature == 0:
        return [Draw()] * params.n
    seed = params.seed if params.seed is not None else int(torch.randint(2**62, ()))
    noise = (noise_stream(seed, copy, device) for copy in range(params.n))
    return [Draw(params.temperature, params.top_k, params.top_p, stream) for stream in noise]


def answer_room(prompt_lengths: Sequence[int], max_model_len: int, max_tokens: int) -> list[int]:
    """How many tokens each prompt's answers may get; what the others of a batch need makes no difference.

    Raises:
        ValueError: a prompt leaves no room.
    """
    if max(prompt_lengths) >= max_model_len:
        raise ValueError(
            f"a prompt of {max(prompt_lengths)} tokens leaves no room for an answer in the model's {max_model_len}; "
            "use fewer or smaller pictures, or less text"
        )
    return [min(max_tokens, max_model_len - length) for length in prompt_lengths]


def refuse_unbuilt(**settings: object) -> None:
    """Settings of the contract that have no code behind them yet: a value would be ignored, so it is an error."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is not offered yet; leave it out")


def _processor(path_or_repo_id: str | os.PathLike[str] | AriaConfig | None, revision: str | None) -> AriaProcessor:
    if not isinstance(path_or_repo_id, AriaConfig):
        return AriaProcessor.from_pretrained(path_or_repo_id, revision=revision)
    sizes = path_or_repo_id.image_sizes()
    pictures = AriaImageProcessor(sizes=tuple(sizes), max_image_size=max(sizes), min_image_size=min(336, min(sizes)))
    return AriaProcessor(pictures, AriaTokenizer.from_pretrained(), size_conversion=sizes)


class Engine:
    """Answers conversations with one model.

    Args:
        path_or_repo_id: folder, Hub repository, or None for the packaged nano model.
        revision: branch, tag or commit of a Hub repository.
        dtype: of the weights; None means the checkpoint's on CUDA and float32 on CPU.
        device: None means CUDA where there is one.
        max_model_len: the most tokens of prompt and answer together; None means what the model was made for.
        max_batch: the most conversations that are decoded together.
        quantization, memory_utilization, cache_tokens, adapters: not offered yet; anything but the default is refused.

    An `AriaConfig` in place of a path means random weights, to measure with; nano's vocabulary then stands in.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the files are not a model of Aria, or a setting is out of its limits.
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
        max_batch: int = 16,
        memory_utilization: float = 0.9,
        cache_tokens: None = None,
        adapters: Mapping[str, str] | None = None,
    ):
        refuse_unbuilt(quantization=quantization, cache_tokens=cache_tokens, adapters=adapters or None)
        refuse_unbuilt(memory_utilization=None if memory_utilization == 0.9 else memory_utilization)
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; expected at least 1")
        self.processor = _processor(path_or_repo_id, revision)
        self.model = load_model(path_or_repo_id, revision=revision, dtype=dtype, device=device)
        longest = self.model.config.text.max_position_embeddings
        self.max_model_len = longest if max_model_len is None else max_model_len
        if not 1 <= self.max_model_len <= longest:
            raise ValueError(f"max_model_len is {max_model_len}; expected 1 to {longest}, which the model was made for")
        self.max_batch = max_batch

    @property
    def device(self) -> torch.device:
        return self.model.language_model.lm_head.weight.device

    def chat(self, conversations: Sequence[Sequence[Message]], params: SamplingParams | None = None) -> list[Result]:
        """Answer conversations.

        Args:
            conversations: a list of message lists; a message is ``{"role": ..., "content": text or parts}``.
            params: one set for all of them.

        Returns:
            One result for each conversation, in order.

        Raises:
            ValueError: a message that is not well-formed, or a prompt that leaves no room for an answer.
        """
        params = params or SamplingParams()
        if conversations and isinstance(conversations[0], Mapping):
            raise ValueError("chat takes a list of conversations, each a list of messages; wrap this one in a list")
        results: list[Result] = []
        for start in range(0, len(conversations), self.max_batch):
            run = _Run(self, conversations[start : start + self.max_batch], params)
            for _ in run:
                pass
            results += run.results()
        return results

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """Answer one conversation, piece by piece; the pieces joined are the first choice's text."""
        for answer, piece in _Run(self, [messages], params or SamplingParams()):
            if answer == 0 and piece:
                yield piece


class _Run:
    """Some conversations decoded together. Iterating gives (answer's number, fresh text)."""

    def __init__(self, engine: Engine, conversations: Sequence[Sequence[Message]], params: SamplingParams):
        self._processor, self._params = engine.processor, params
        tokenizer, model = engine.processor.tokenizer, engine.model
        inputs = [
            engine.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            for messages in conversations
        ]
        prompts = [prompt["input_ids"][0] for prompt in inputs]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        rooms = answer_room(self._prompt_lengths, engine.max_model_len, params.max_tokens)
        ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        self._completions = [
            Completion(room, ends, tokenizer, (END_OF_TURN, *(params.stop or ())))
            for room in rooms
            for _ in range(params.n)
        ]
        features = [_encode(model, prompt) for prompt in inputs if "pixel_values" in prompt]
        self._generation = Generation(
            model,
            torch.cat(prompts).to(engine.device),
            Segments.of(self._prompt_lengths, engine.device),
            torch.cat(features) if features else None,
            [answer_draws(params, engine.device) for _ in prompts],
            rooms,
            params.logprobs,
        )

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while self._generation.growing:
            for answer, token, logprobs in self._generation.step():
                completion = self._completions[answer]
                piece = completion.push(token, self._named(token, logprobs))
                if completion.finish_reason is not None:
                    self._generation.end(answer)
                yield answer, piece

    def _named(self, token: int, logprobs: TokenLogprobs | None) -> TokenLogprob | None:
        if logprobs is None:
            return None
        decode = self._processor.tokenizer.decode
        top = tuple(TokenLogprob(id, decode([id]), value) for id, value in logprobs.likeliest)
        return TokenLogprob(token, decode([token]), logprobs.chosen, top)

    def results(self) -> list[Result]:
        n = self._params.n
        groups = [self._completions[start : start + n] for start in range(0, len(self._completions), n)]
        return [_result(length, group) for length, group in zip(self._prompt_lengths, groups, strict=True)]


@torch.inference_mode()
def _encode(model: Aria, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    device = model.language_model.lm_head.weight.device
    patches = pack_patches(inputs["pixel_values"].to(device), inputs["pixel_mask"].to(device), model.config.vision)
    return model.encode_images(patches)


def _result(prompt_tokens: int, completions: Sequence[Completion]) -> Result:
    choices = []
    for completion in completions:
        assert completion.finish_reason is not None, "a result was asked for before the end"
        logprobs = tuple(completion.logprobs) or None
        choices.append(Choice(completion.text, tuple(completion.token_ids), completion.finish_reason, logprobs))
    return Result(tuple(choices), Usage(prompt_tokens, sum(len(choice.token_ids) for choice in choices)))
