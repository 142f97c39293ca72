"""`AriaForConditionalGeneration`: the interface of transformers.

B sequences, S their padded length, T tokens without padding, V vocabulary, C crops. The padded ``(B, S)`` is packed on
the way in and unpacked on the way out; the model never sees padding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria.checkpoint import load_model, save_checkpoint
from aria.config import AriaConfig
from aria.engine.core import EngineCore
from aria.engine.engine import reject_unsupported
from aria.engine.failures import StepError
from aria.engine.generation import (
    UNSET,
    Generation,
    Processor,
    read_generation_config,
    read_settings,
    resolve_generation,
    settings_of_config,
)
from aria.engine.lockstep import Lockstep
from aria.engine.outputs import Completion
from aria.engine.request import Request
from aria.model import Aria, Packed, pack_patches
from aria.model.output import AriaOutput, GenerateOutput
from aria.ops import Segments, on_own_device
from aria.processor import AriaTokenizer
from aria.processor.image_inputs import ImageSpan


class Streamer(Protocol):
    """Receives tokens as they are generated; transformers' streamers fit."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class AriaForConditionalGeneration(nn.Module):
    """Aria with loss, `generate`, loading and saving, as in transformers.

    ``model`` is the network (:class:`aria.model.Aria`), with the parameter names of the current Hub layout.
    """

    def __init__(self, model: Aria, generation_config: Mapping[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.generation_config = dict(generation_config or {})

    @property
    def config(self) -> AriaConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike[str] | AriaConfig | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        quantization: None = None,
        attn_implementation: str | None = None,
        low_cpu_mem_usage: bool | None = None,
        trust_remote_code: bool | None = None,
    ) -> AriaForConditionalGeneration:
        """Load a checkpoint in any published layout.

        Args:
            path_or_repo_id: Folder, weights file, Hub repository, None for the packaged nano model, or an `AriaConfig`
                for random weights (normal, standard deviation 0.02, seed 0).
            revision: Branch, tag or commit of a Hub repository.
            dtype: Data type of the weights; None or "auto" means the checkpoint's on CUDA and float32 on CPUs.
            device: None means CUDA if available.
            torch_dtype, device_map: transformers' names of the two above. The map must name a single device.
            quantization: Not supported yet; must be None.
            attn_implementation, low_cpu_mem_usage, trust_remote_code: Accepted for compatibility, without effect:
                kernels are chosen by device, loading always streams, and remote code is never run.

        Raises:
            FileNotFoundError: There is no such model.
            ValueError: The files are not an Aria checkpoint, or keys are missing, unexpected or wrongly shaped.
        """
        reject_unsupported(quantization=quantization)
        dtype = _one_of("dtype", dtype, "torch_dtype", torch_dtype)
        device = _one_of("device", device, "device_map", _single_device(device_map))
        model = load_model(path_or_repo_id, revision=revision, dtype=None if dtype == "auto" else dtype, device=device)
        return cls(model, read_generation_config(path_or_repo_id, revision)).eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in the current Hub layout, which transformers and vLLM load."""
        save_checkpoint(
            self.model.state_dict(), self.config, Path(folder), max_shard_size=max_shard_size,
            generation_config=self.generation_config,
        )  # fmt: skip

    @on_own_device
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> AriaOutput | tuple[Any, ...]:
        """Compute logits at every position of padded sequences.

        Args:
            input_ids: int64 ``(B, S)``, padded on either side.
            attention_mask: ``(B, S)``, 0 on padding; None means no padding.
            pixel_values: ``(C, 3, S', S')``, the crops of all sequences in order.
            pixel_mask: bool ``(C, S', S')``.
            labels: int64 ``(B, S)``. Positions with -100, padding and image tokens do not count in the loss.
            output_router_logits: Also return the routers' logits.
            output_hidden_states: Also return the embeddings and the hidden states after each layer.
            logits_to_keep: Return logits of this many last positions of the padded sequences, or of the positions in an
                int64 tensor ``(n,)``; 0 means all. The loss always covers all positions.
            return_dict: False returns a tuple.
            use_cache: Accepted for compatibility, without effect: a forward pass keeps no cache.

        Raises:
            ValueError: Shapes do not match, or the number of image tokens is not that of the features.
        """
        packed = _Packing(input_ids, attention_mask, self.config.text.vocab_size)
        features = self._encode(input_ids[packed.mask], pixel_values, pixel_mask)
        segments = Segments.of(packed.lengths, self.device)
        states: list[Tensor] = []
        hidden, router_logits = self.model(
            packed.take(input_ids),
            Packed(self.config.text, segments),
            features,
            router_logits=output_router_logits,
            states=states if output_hidden_states else None,
        )
        keep = _positions(logits_to_keep, input_ids.shape[1])
        if keep is None or labels is not None:
            logits = packed.spread(self.model.logits(hidden))
            loss = None if labels is None else self._loss(logits, labels, input_ids, packed.mask)
            logits = logits if keep is None else logits[:, keep]
        else:
            # Selected before the head, because logits of all positions are large.
            kept = packed.spread(hidden)[:, keep]
            logits, loss = self.model.logits(kept.flatten(0, 1)).unflatten(0, kept.shape[:2]), None
        output = AriaOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(map(packed.spread, (*states, hidden))) if output_hidden_states else None,
            router_logits=router_logits if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings ``(V, D)``."""
        return self.model.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The language head ``(V, D)``, which is not tied to the input embeddings."""
        return self.model.language_model.lm_head

    @torch.no_grad()
    @on_own_device
    def generate(
        self,
        /,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        *,
        generation_config: Any = None,
        logits_processor: Iterable[Processor] | None = None,
        stopping_criteria: Iterable[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        tokenizer: AriaTokenizer | None = None,
        streamer: Streamer | None = None,
        eos_token_id: Any = UNSET,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts.

        Args:
            input_ids, attention_mask, pixel_values, pixel_mask: As in :meth:`forward`.
            generation_config: A `GenerationConfig` of transformers, or a mapping of its fields. Arguments override it,
                and it overrides ``generation_config.json``.
            logits_processor: Callables of ids ``(R, S + new)`` and scores ``(R, V)`` that return scores; applied after
                the settings below, before temperature and truncation.
            stopping_criteria: Callables of the same ids and the scores so far (or None) that return which sequences
                end, bool or bool ``(R,)``.
            prefix_allowed_tokens_fn: Callable of a sequence's index and ids ``(S + new,)`` that returns the tokens that
                may follow.
            tokenizer: Required with ``stop_strings``.
            streamer: Receives the prompt and then every token, for a single sequence.
            eos_token_id: One or several token ids, as numbers, arrays or tensors. Unset means that of
                ``generation_config.json``, else 2; None means that sequences do not end.
            settings: By transformers' names; those that change no answer, such as ``use_cache``, have no effect.
                ``max_new_tokens`` (256) or ``max_length``, which includes the padded prompt; at most what fits into the
                context length. ``min_new_tokens`` or ``min_length``: until then no end token is sampled.
                ``do_sample`` (False), ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``,
                ``suppress_tokens``, ``begin_suppress_tokens``, ``no_repeat_ngram_size``, ``bad_words_ids``.
                ``num_return_sequences``: answers per prompt, adjacent in the result.
                ``stop_strings``: texts that end a sequence, matched on the decoded text of generated tokens; the tokens
                that complete one are kept. ``max_time``: seconds. ``pad_token_id``: pads sequences.
                ``return_dict_in_generate``, with ``output_scores``, ``output_logits`` and ``renormalize_logits``.
                ``seed`` (not in transformers) makes sampling reproducible; a sequence's noise does not depend on the
                rest of the batch.

        Callbacks, ``max_time`` and scores make all sequences advance together, one token at a time.

        Returns:
            int64 ``(R, S + new)`` with R = ``B * num_return_sequences``: each prompt as given, then the generated
            tokens; or a `GenerateOutput`.

        Raises:
            ValueError: Inputs do not match, or a setting is out of range or unsupported, such as beams.
            TypeError: A name is unknown to transformers, too.
        """
        packed = _Packing(input_ids, attention_mask, self.config.text.vocab_size)
        given = settings if eos_token_id is UNSET else {**settings, "eos_token_id": eos_token_id}
        generation = resolve_generation(
            [read_settings(given), settings_of_config(generation_config), self.generation_config],
            prompt_tokens=input_ids.shape[1],
            vocab_size=self.config.text.vocab_size,
            pad=self.config.pad_token_id or 0,
            processors=logits_processor,
            criteria=stopping_criteria,
            allowed=prefix_allowed_tokens_fn,
        )
        params, stops = generation.params, generation.stops
        if stops and not isinstance(tokenizer, AriaTokenizer):
            kind = type(tokenizer).__name__
            raise ValueError(f"stop_strings are matched on text: pass tokenizer=processor.tokenizer (got {kind})")
        if streamer is not None and len(input_ids) * params.n > 1:
            raise ValueError(f"a streamer takes one sequence, but {len(input_ids) * params.n} were requested")
        features = self._encode(input_ids[packed.mask], pixel_values, pixel_mask)
        prompts = [ids.tolist() for ids in packed.take(input_ids).split(packed.lengths)]
        core = self._engine(packed.lengths, generation)
        requests = [
            request
            for prompt, images in zip(prompts, _image_spans(prompts, features, self.config), strict=True)
            for request in core.add(
                prompt, params, images=images, end_token_ids=() if generation.in_lockstep else generation.ends
            )
        ]
        completions = [
            Completion(
                request.max_tokens, generation.ends, tokenizer if stops else None, stops, skip_special_tokens=False
            )
            for request in requests
        ]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        input_ids = input_ids.repeat_interleave(params.n, 0)
        try:
            if generation.in_lockstep:
                output = _generate_in_lockstep(core, Lockstep(requests, input_ids, completions, generation), streamer)
            else:
                by_request = dict(zip(requests, completions, strict=True))
                output = _generate(core, input_ids, by_request, generation.pad, streamer)
        except StepError as error:
            # As in transformers, where callers catch torch.OutOfMemoryError to retry with smaller batches.
            raise error.__cause__ or error from None
        core.close()
        if streamer is not None:
            streamer.end()
        return output if generation.as_mapping else output.sequences

    def _engine(self, lengths: Sequence[int], generation: Generation) -> EngineCore:
        """An engine whose KV cache just holds the prompts and their answers."""
        params = generation.params
        longest = min(max(lengths) + params.max_tokens, self.config.text.max_position_embeddings)
        blocks = sum(EngineCore.blocks_for(self.device, min(n + params.max_tokens, longest)) for n in lengths)
        # In lockstep, one step prefills all prompts, so that all sequences start together.
        step = sum(lengths) * params.n if generation.in_lockstep else None
        return EngineCore(
            self.model, max_batch=len(lengths) * params.n, max_model_len=longest, cache_blocks=blocks * params.n,
            step_tokens=step and max(step, 2048),
        )  # fmt: skip

    def _encode(self, ids_T: Tensor, pixel_values: Tensor | None, pixel_mask: Tensor | None) -> Tensor | None:
        """Image tokens ``(Q, D)``, after checking that their number is that of the prompts' image token ids."""
        places = int((ids_T == self.config.image_token_index).sum())
        if pixel_values is None:
            if places:
                raise ValueError(
                    f"the prompts have {places} image tokens, but there are no pixel_values; pass the images too"
                )
            return None
        mask = None if pixel_mask is None else pixel_mask.to(self.device)
        patches = pack_patches(pixel_values.to(self.device), mask, self.config.vision)
        features = sum(self.config.projector.queries_for(n) for n in patches.grid_patches)
        if places != features:
            raise ValueError(
                f"the prompts have {places} image tokens, but {len(pixel_values)} crops make {features} features; "
                "make ids and pixels in one call of the processor"
            )
        return self.model.encode_images(patches)

    def _loss(self, logits: Tensor, labels: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels should be {tuple(input_ids.shape)} as input_ids, but are {tuple(labels.shape)}")
        # Image tokens are not predicted, and a token after padding has nothing to be predicted from.
        targets = labels.masked_fill(input_ids == self.config.image_token_index, -100)[:, 1:]
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=-100
        )


def _generate(
    core: EngineCore,
    input_ids: Tensor,
    completions: Mapping[Request, Completion],
    pad: int,
    streamer: Streamer | None,
) -> GenerateOutput:
    """Generate sequences that end independently, and pad them."""
    while core.unfinished:
        for request, token, _ in core.step():
            completions[request].push(token)
            if completions[request].finish_reason is not None:
                core.finish(request)
            if streamer is not None:
                streamer.put(torch.tensor([token]))
    generated = [completion.token_ids for completion in completions.values()]
    longest = max(map(len, generated))
    rows = [ids + [pad] * (longest - len(ids)) for ids in generated]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return GenerateOutput(sequences=torch.cat([input_ids, new], dim=1))


def _generate_in_lockstep(core: EngineCore, lockstep: Lockstep, streamer: Streamer | None) -> GenerateOutput:
    """Generate all sequences one token at a time, until all have ended."""
    core.logits_processor = lockstep
    streamed = 0
    while core.unfinished:
        core.step()
        lockstep.update()
        if lockstep.done:
            for request in lockstep.requests:
                core.cancel(request)
        if streamer is not None:
            for token in lockstep.ids[0, lockstep.ids.shape[1] - lockstep.new + streamed :].tolist():
                streamer.put(torch.tensor([token]))
        streamed = lockstep.new
    if lockstep.error is not None:
        raise lockstep.error
    return lockstep.output()


class _Packing:
    """Packs the tokens of a padded batch, and unpacks results."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int):
        if not isinstance(input_ids, Tensor):
            raise ValueError(
                f"input_ids should be a tensor, but is {type(input_ids).__name__}; use return_tensors='pt'"
            )
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids should be (batch, tokens), but is {tuple(input_ids.shape)}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids range from {low} to {high}, but the vocabulary from 0 to {vocab_size - 1}")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask should be {tuple(input_ids.shape)} as input_ids, but is {tuple(mask.shape)}"
            )
        self.mask = mask
        self.lengths: list[int] = mask.sum(1).tolist()
        if not all(self.lengths):
            raise ValueError(f"sequence {self.lengths.index(0)} is only padding; every sequence needs a token")

    def take(self, x_BS: Tensor) -> Tensor:
        """``(B, S)`` -> ``(T,)``."""
        x_T: Tensor = x_BS[self.mask]
        return x_T

    def spread(self, x_TV: Tensor) -> Tensor:
        """``(T, V)`` -> ``(B, S, V)``, zeros on padding."""
        if self.mask.all():
            return x_TV.unflatten(0, self.mask.shape)
        out = x_TV.new_zeros(*self.mask.shape, x_TV.shape[-1])
        out[self.mask.to(x_TV.device)] = x_TV
        return out


def _positions(logits_to_keep: int | Tensor, length: int) -> slice | Tensor | None:
    """Positions of the padded sequences; None means all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point():
            raise ValueError(
                f"logits_to_keep should be a number or an 1-D int64 tensor, but is {logits_to_keep.dtype} "
                f"{tuple(logits_to_keep.shape)}"
            )
        return logits_to_keep
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep should be 0 (all), a number of positions or a tensor; got {logits_to_keep!r}")
    return slice(max(length - logits_to_keep, 0), None) if logits_to_keep else None


def _image_spans(
    prompts: Sequence[Sequence[int]], features_QD: Tensor | None, config: AriaConfig
) -> list[list[ImageSpan]]:
    """Runs of image tokens in each prompt, each with its slice of the features."""
    found, first = [], 0
    for prompt in prompts:
        images, start = [], 0
        for is_image, run in groupby(prompt, config.image_token_index.__eq__):
            count = len(list(run))
            if is_image:
                assert features_QD is not None, "image tokens without features are rejected before"
                # A key unique within this call, so that several answers to a prompt share its prefix.
                images.append(ImageSpan(start, count, b"%d" % first, features_QD[first : first + count]))
                first += count
            start += count
        found.append(images)
    return found


def _one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} mean the same; give one of them")
    return value if value is not None else other


def _single_device(device_map: str | torch.device | Mapping[str, Any] | None) -> torch.device | str | None:
    """The single device of transformers' ``device_map``; None for "auto" and the like."""
    if device_map is None or device_map in ("auto", "balanced", "sequential"):
        return None
    if not isinstance(device_map, Mapping):
        return device_map
    devices = set(device_map.values())
    if len(devices) != 1:
        raise ValueError(
            f"device_map distributes the model over {sorted(map(str, devices))}; the model lives on one device"
        )
    device = devices.pop()
    return torch.device("cuda", device) if isinstance(device, int) else device
