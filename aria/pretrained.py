"""`AriaForConditionalGeneration`: the face that users of transformers know.

B sequences, S their padded length, T tokens without padding, V vocabulary, C crops. The padded ``(B, S)`` is packed on
the way in and unpacked on the way out; the model inside never sees padding.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria.checkpoint import load_model, save_checkpoint
from aria.config import AriaConfig
from aria.engine.core import EngineCore
from aria.engine.engine import refuse_unbuilt
from aria.engine.outputs import Completion
from aria.engine.request import Picture
from aria.engine.sampling_params import SamplingParams
from aria.hub import read_json, resolve
from aria.model import Aria, Packed, pack_patches
from aria.model.output import AriaOutput
from aria.ops import Segments, on_own_device
from aria.processor import AriaTokenizer

GENERATION_CONFIG = "generation_config.json"
DEFAULT_NEW_TOKENS = 256
_UNSET: Any = object()


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


_GENERATION_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (_is(bool), "true or false"),
    "temperature": (_is(int, float), "a number"),
    "top_p": (_is(int, float), "a number"),
    "top_k": (_is(int), "a whole number"),
    "max_new_tokens": (_is(int), "a whole number"),
    "pad_token_id": (_is(int), "a token id"),
    "eos_token_id": (
        lambda value: all(map(_is(int), value if isinstance(value, list) else [value])),
        "a token id or a list of them",
    ),
}
_WITHOUT_EFFECT = ("bos_token_id", "_from_model_config", "transformers_version", "use_cache")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of a model's folder, or nothing where there is none.

    A setting that is not known here has no effect; it is named in a warning.

    Raises:
        ValueError: not JSON, or a known setting of the wrong type.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return {}
    settings = {name: value for name, value in read_json(file).items() if value is not None}
    for name, value in settings.items():
        holds, expected = _GENERATION_SETTINGS.get(name, (lambda _: True, ""))
        if not holds(value):
            raise ValueError(f"{file}: {name} is {value!r}; expected {expected}")
    if unknown := sorted(settings.keys() - _GENERATION_SETTINGS.keys() - set(_WITHOUT_EFFECT)):
        warnings.warn(f"{file}: without effect here: {', '.join(unknown)}", stacklevel=2)
    return settings


class Streamer(Protocol):
    """Takes tokens as they come: transformers' streamers have this shape."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class AriaForConditionalGeneration(nn.Module):
    """Aria with a loss, a `generate`, and files.

    ``model`` is the network itself (:class:`aria.model.Aria`) under the names of today's Hub layout.
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
        return self.model.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.lm_head.weight.dtype

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
            path_or_repo_id: folder, weights file, Hub repository, None for the packaged nano model, or an `AriaConfig`
                for random weights (normal, standard deviation 0.02, seed 0) made straight on the device.
            revision: branch, tag or commit of a Hub repository.
            dtype: of the weights; None (or "auto") means the checkpoint's on CUDA and float32 on CPU.
            device: None means CUDA where there is one.
            torch_dtype, device_map: transformers' names of the two above; a map that spreads the model is refused.
            quantization: not offered yet; anything but None is refused.
            attn_implementation, low_cpu_mem_usage, trust_remote_code: taken for code written for transformers and
                without effect: kernels are chosen by device, loading always streams, and no remote code is ever run.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: the files are not a checkpoint of Aria, or keys are missing, unexpected or wrongly shaped.
        """
        refuse_unbuilt(quantization=quantization)
        dtype = _one_of("dtype", dtype, "torch_dtype", torch_dtype)
        device = _one_of("device", device, "device_map", _single_device(device_map))
        model = load_model(path_or_repo_id, revision=revision, dtype=None if dtype == "auto" else dtype, device=device)
        generation_config: dict[str, Any] = {}
        if not isinstance(path_or_repo_id, AriaConfig):
            folder = resolve(path_or_repo_id, revision=revision, allow_patterns=[GENERATION_CONFIG])
            generation_config = read_generation_config(folder if folder.is_dir() else folder.parent)
        return cls(model, generation_config).eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write today's Hub layout into ``folder``; transformers and vLLM load it as it is."""
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
        """Score every place of padded sequences.

        Args:
            input_ids: int64 ``(B, S)``, padded on either side.
            attention_mask: ``(B, S)``, 0 on padding; None means there is none.
            pixel_values: ``(C, 3, S', S')``, the crops of all sequences in order.
            pixel_mask: bool ``(C, S', S')``.
            labels: int64 ``(B, S)``; -100 is left out, and so are padding and places of pictures.
            output_router_logits: also return the routers' logits.
            output_hidden_states: also return the embeddings, and the hidden states after each layer.
            logits_to_keep: give logits of the last so many positions of the padded sequences, or of the positions in an
                int64 tensor ``(n,)``; 0 means all. The loss is always of all positions.
            return_dict: False gives a tuple.
            use_cache: taken because callers of transformers pass it; a forward pass here keeps nothing.

        Raises:
            ValueError: shapes that do not fit, or as many picture places as there are not features for.
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
        logits = packed.spread(self.model.logits(hidden)) if keep is None or labels is not None else None
        loss = None if labels is None or logits is None else self._loss(logits, labels, input_ids, packed.mask)
        if keep is not None:
            # Sliced before the head: a row of logits has as many numbers as the vocabulary has tokens.
            kept = packed.spread(hidden)[:, keep] if logits is None else logits[:, keep]
            logits = self.model.logits(kept.flatten(0, 1)).unflatten(0, kept.shape[:2]) if logits is None else kept
        output = AriaOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(map(packed.spread, (*states, hidden))) if output_hidden_states else None,
            router_logits=router_logits if output_router_logits else None,
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings ``(V, D)``."""
        return self.model.language_model.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The language head ``(V, D)``; it shares nothing with the input embeddings."""
        return self.model.language_model.lm_head

    @torch.no_grad()
    @on_own_device
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: AriaTokenizer | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        streamer: Streamer | None = None,
        eos_token_id: int | Sequence[int] | None = _UNSET,
        pad_token_id: int | None = _UNSET,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue prompts.

        Args:
            input_ids, attention_mask, pixel_values, pixel_mask: as in :meth:`forward`.
            max_new_tokens: unset means ``generation_config.json``, else 256; never more than the model has room for.
            stop_strings: texts at which a sequence ends, matched on the decoded text of what was generated. The tokens
                that complete one are kept, as transformers does.
            tokenizer: needed with ``stop_strings``.
            do_sample, temperature, top_p, top_k: unset means ``generation_config.json``, else greedy.
            num_return_sequences: answers to each prompt; they lie next to each other in the result.
            seed: makes sampling repeatable; a sequence's noise does not depend on the rest of the batch.
            streamer: gets the prompt and then every token; for one sequence.
            eos_token_id: unset means ``generation_config.json``, else 2; None never ends.
            pad_token_id: fills up sequences that ended early; unset means ``generation_config.json``, else ``config``.
            use_cache: taken because callers of transformers pass it; there is always a cache.

        Returns:
            int64 ``(B * num_return_sequences, S + new)``: each prompt as it came, then what was generated.
        """
        if not use_cache:
            raise ValueError("use_cache=False is not offered: the answer would be the same, only slower; leave it out")
        stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
        if stops and not isinstance(tokenizer, AriaTokenizer):
            came = type(tokenizer).__name__
            raise ValueError(f"stop_strings are matched on text: pass tokenizer=processor.tokenizer (got {came})")
        if streamer is not None and len(input_ids) * num_return_sequences > 1:
            raise ValueError(
                f"a streamer follows one sequence, but {len(input_ids) * num_return_sequences} were asked for"
            )
        packed = _Packing(input_ids, attention_mask, self.config.text.vocab_size)
        params = self._params(max_new_tokens, do_sample, temperature, top_p, top_k, num_return_sequences, seed)
        features = self._encode(input_ids[packed.mask], pixel_values, pixel_mask)
        prompts = [ids.tolist() for ids in packed.take(input_ids).split(packed.lengths)]
        core = self._engine(packed.lengths, params)
        requests = [
            request
            for prompt, pictures in zip(prompts, _pictures(prompts, features, self.config), strict=True)
            for request in core.add(prompt, params, pictures=pictures)
        ]
        ends = self._end_tokens(eos_token_id)
        completions = {
            request: Completion(
                request.max_tokens, ends, tokenizer if stops else None, stops, skip_special_tokens=False
            )
            for request in requests
        }
        if streamer is not None:
            streamer.put(input_ids.cpu())
        while core.unfinished:
            for request, token, _ in core.step():
                completions[request].push(token)
                if completions[request].finish_reason is not None:
                    core.finish(request)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
        core.close()
        if streamer is not None:
            streamer.end()
        grown = [completions[request].token_ids for request in requests]
        pad = self._setting("pad_token_id", self.config.pad_token_id or 0) if pad_token_id is _UNSET else pad_token_id
        longest = max(map(len, grown))
        rows = [ids + [pad or 0] * (longest - len(ids)) for ids in grown]
        new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids.repeat_interleave(params.n, 0), new], dim=1)

    def _engine(self, lengths: Sequence[int], params: SamplingParams) -> EngineCore:
        """An engine with a cache that just holds the prompts and their answers."""
        longest = min(max(lengths) + params.max_tokens, self.config.text.max_position_embeddings)
        blocks = sum(EngineCore.blocks_for(self.device, min(n + params.max_tokens, longest)) for n in lengths)
        return EngineCore(
            self.model, max_batch=len(lengths) * params.n, max_model_len=longest, cache_blocks=blocks * params.n
        )

    def _encode(self, ids_T: Tensor, pixel_values: Tensor | None, pixel_mask: Tensor | None) -> Tensor | None:
        """Picture tokens ``(Q, D)``, after checking that the prompts have a place for each of them."""
        places = int((ids_T == self.config.image_token_index).sum())
        if pixel_values is None:
            if places:
                raise ValueError(
                    f"the prompts have {places} picture tokens, but there are no pixel_values; pass the pictures too"
                )
            return None
        mask = None if pixel_mask is None else pixel_mask.to(self.device)
        patches = pack_patches(pixel_values.to(self.device), mask, self.config.vision)
        features = sum(self.config.projector.queries_for(n) for n in patches.grid_patches)
        if places != features:
            raise ValueError(
                f"the prompts have {places} picture tokens, but {len(pixel_values)} crops make {features} features; "
                "make ids and pixels in one call of the processor"
            )
        return self.model.encode_images(patches)

    def _loss(self, logits: Tensor, labels: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels should be {tuple(input_ids.shape)} as input_ids, but are {tuple(labels.shape)}")
        # A place of a picture is no word to learn, and a token after padding has nothing to be predicted from.
        targets = labels.masked_fill(input_ids == self.config.image_token_index, -100)[:, 1:]
        targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=-100
        )

    def _setting(self, name: str, default: Any) -> Any:
        value = self.generation_config.get(name)
        return default if value is None else value

    def _params(
        self,
        max_new_tokens: int | None,
        do_sample: bool | None,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        num_return_sequences: int,
        seed: int | None,
    ) -> SamplingParams:
        def choose(value: Any, name: str, default: Any) -> Any:
            return self._setting(name, default) if value is None else value

        new = choose(max_new_tokens, "max_new_tokens", DEFAULT_NEW_TOKENS)
        if not _is(int)(new) or new < 1:
            raise ValueError(f"max_new_tokens is {new!r}; expected a whole number, at least 1")
        params = SamplingParams(
            max_tokens=new,
            temperature=choose(temperature, "temperature", 1.0),
            top_p=choose(top_p, "top_p", 1.0),
            top_k=choose(top_k, "top_k", 0),
            seed=seed,
            n=num_return_sequences,
        )
        return params if choose(do_sample, "do_sample", False) else dataclasses.replace(params, temperature=0.0)

    def _end_tokens(self, eos_token_id: int | Sequence[int] | None) -> set[int]:
        if eos_token_id is _UNSET:
            eos_token_id = self._setting("eos_token_id", 2)
        if eos_token_id is None:
            return set()
        return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)


class _Packing:
    """Where the tokens of a padded batch lie, to take them out and to put results back."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int):
        if not isinstance(input_ids, Tensor):
            raise ValueError(
                f"input_ids should be a tensor, but is {type(input_ids).__name__}; use return_tensors='pt'"
            )
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids should be (batch, tokens), but is {tuple(input_ids.shape)}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids go from {low} to {high}, but the vocabulary from 0 to {vocab_size - 1}")
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
        return x_BS[self.mask]

    def spread(self, x_TV: Tensor) -> Tensor:
        """``(T, V)`` -> ``(B, S, V)``, zeros on padding."""
        if self.mask.all():
            return x_TV.unflatten(0, self.mask.shape)
        out = x_TV.new_zeros(*self.mask.shape, x_TV.shape[-1])
        out[self.mask.to(x_TV.device)] = x_TV
        return out


def _positions(logits_to_keep: int | Tensor, length: int) -> slice | Tensor | None:
    """Which positions of the padded sequences; None means all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point():
            raise ValueError(
                f"logits_to_keep should be a number or an int64 tensor of one axis, but is {logits_to_keep.dtype} "
                f"{tuple(logits_to_keep.shape)}"
            )
        return logits_to_keep
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep should be 0 (all), a number of positions or a tensor; got {logits_to_keep!r}")
    return slice(max(length - logits_to_keep, 0), None) if logits_to_keep else None


def _pictures(prompts: Sequence[Sequence[int]], features_QD: Tensor | None, config: AriaConfig) -> list[list[Picture]]:
    """The runs of picture tokens in each prompt, each with its part of the features."""
    found, first = [], 0
    for prompt in prompts:
        pictures, start = [], 0
        for is_picture, run in groupby(prompt, config.image_token_index.__eq__):
            count = len(list(run))
            if is_picture:
                assert features_QD is not None, "picture tokens without features were refused before"
                # A name of its own within this call, so that several answers share what the prompt computed.
                pictures.append(Picture(start, count, b"%d" % first, features_QD[first : first + count]))
                first += count
            start += count
        found.append(pictures)
    return found


def _one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} mean the same; give one of them")
    return value if value is not None else other


def _single_device(device_map: str | torch.device | Mapping[str, Any] | None) -> torch.device | str | None:
    """The one device of transformers' ``device_map``; "auto" leaves the choice to us."""
    if device_map is None or device_map in ("auto", "balanced", "sequential"):
        return None
    if not isinstance(device_map, Mapping):
        return device_map
    devices = set(device_map.values())
    if len(devices) != 1:
        raise ValueError(
            f"device_map spreads the model over {sorted(map(str, devices))}; the model lives on one device"
        )
    device = devices.pop()
    return torch.device("cuda", device) if isinstance(device, int) else device
