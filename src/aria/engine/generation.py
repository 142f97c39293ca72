"""Settings of `generate` by transformers' names, from arguments, a `GenerationConfig` and ``generation_config.json``.

B prompts, S their padded length, R sequences (B times the answers per prompt), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aria.config import AriaConfig
from aria.engine.sampling_params import SamplingParams
from aria.hub import read_json, resolve

GENERATION_CONFIG = "generation_config.json"
DEFAULT_NEW_TOKENS = 256
UNSET: Any = object()
"""An argument that was not given, if None has a meaning of its own."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""``input_ids (R, S + new)`` and scores ``(R, V)`` -> scores. transformers calls processed logits scores."""


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


_BOOL = _is(bool), "true or false"
_NUMBER = _is(int, float), "a number"
_WHOLE = _is(int), "a whole number"
_IDS = _list_of(_is(int)), "a list of token ids"
_SETTINGS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length"), _WHOLE),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "max_time"), _NUMBER),
    **dict.fromkeys(("top_k", "num_return_sequences", "no_repeat_ngram_size", "seed"), _WHOLE),
    **dict.fromkeys(("do_sample", "return_dict_in_generate", "output_scores", "output_logits"), _BOOL),
    **dict.fromkeys(("renormalize_logits", "use_cache"), _BOOL),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _IDS),
    "bad_words_ids": (_list_of(lambda ids: bool(ids) and _IDS[0](ids)), "a list of lists of token ids"),
    "stop_strings": (lambda value: isinstance(value, str) or _list_of(_is(str))(value), "a text or a list of texts"),
    # Checked by :func:`token_ids`.
    "eos_token_id": (lambda _: True, ""),
    "pad_token_id": (lambda _: True, ""),
}
_IGNORED = {
    *("bos_token_id", "decoder_start_token_id", "_from_model_config", "transformers_version", "trust_remote_code"),
    *("cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "disable_compile"),
    *(
        "compile_config",
        "low_memory",
        "prefill_chunk_size",
        "continuous_batching_config",
        "synced_gpus",
        "is_assistant",
    ),
    # Beam search without beams, and ways of being faster with the same answer.
    *("length_penalty", "early_stopping", "prompt_lookup_num_tokens", "max_matching_ngram_size", "target_lookbehind"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "speculation_type"),
    *("assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "assistant_model", "use_mtp"),
}
_BEAMS = "there is no beam search; use num_return_sequences with do_sample"
_WARPER = "pass transformers' {} in logits_processor"
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), _BEAMS),
    "num_beam_groups": ((1,), _BEAMS),
    "diversity_penalty": ((0,), _BEAMS),
    "constraints": ((), _BEAMS),
    "force_words_ids": ((), _BEAMS),
    "penalty_alpha": ((0,), "there is no contrastive search"),
    "dola_layers": ((), "there is no decoding by contrasted layers"),
    "custom_generate": ((), "code from a repository is never run"),
    "guidance_scale": ((1,), "there is no classifier-free guidance"),
    "negative_prompt_ids": ((), "there is no classifier-free guidance"),
    "token_healing": ((False,), "prompts are continued as they are"),
    "watermarking_config": ((), "pass transformers' WatermarkLogitsProcessor in logits_processor"),
    "typical_p": ((1,), _WARPER.format("TypicalLogitsWarper")),
    "epsilon_cutoff": ((0,), _WARPER.format("EpsilonLogitsWarper")),
    "eta_cutoff": ((0,), _WARPER.format("EtaLogitsWarper")),
    "top_h": ((), _WARPER.format("TopHLogitsWarper")),
    "sequence_bias": (({},), _WARPER.format("SequenceBiasLogitsProcessor")),
    "encoder_repetition_penalty": ((1,), _WARPER.format("EncoderRepetitionPenaltyLogitsProcessor")),
    "encoder_no_repeat_ngram_size": ((0,), _WARPER.format("EncoderNoRepeatNGramLogitsProcessor")),
    "exponential_decay_length_penalty": ((), _WARPER.format("ExponentialDecayLengthPenalty")),
    "forced_bos_token_id": ((), _WARPER.format("ForcedBOSTokenLogitsProcessor")),
    "forced_eos_token_id": ((), _WARPER.format("ForcedEOSTokenLogitsProcessor")),
    "remove_invalid_values": ((False,), _WARPER.format("InfNanRemoveLogitsProcessor")),
    "output_attentions": ((False,), "attention weights are not materialised"),
    "output_hidden_states": ((False,), "call forward on the result, with output_hidden_states=True"),
    "inputs_embeds": ((), "pass input_ids, with pixel_values for images"),
    "past_key_values": ((), "the KV cache belongs to the engine; pass the whole prompt"),
}


def read_generation_config(
    path_or_repo_id: str | os.PathLike[str] | AriaConfig | None, revision: str | None = None
) -> dict[str, Any]:
    """Read a model's ``generation_config.json``; empty if it has none.

    Unknown settings have no effect; a warning lists them.

    Args:
        path_or_repo_id: As for loading the model. An `AriaConfig` has no such file.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: The file is not JSON, or a known setting has the wrong type.
    """
    if isinstance(path_or_repo_id, AriaConfig):
        return {}
    path = resolve(path_or_repo_id, revision=revision, allow_patterns=[GENERATION_CONFIG])
    file = (path if path.is_dir() else path.parent) / GENERATION_CONFIG
    if not file.is_file():
        return {}
    settings = {name: value for name, value in read_json(file).items() if value is not None}
    if unknown := sorted(
        name for name, value in settings.items() if name not in _SETTINGS and not _neutral(name, value)
    ):
        warnings.warn(f"{file}: settings without effect: {', '.join(unknown)}", stacklevel=2)
    for name, value in settings.items():
        _check(name, value, f"{file}: ")
    return settings


def default_temperature(generation_config: Mapping[str, Any]) -> float | None:
    """Temperature of ``generation_config.json``: 0 without sampling, None if it does not set one."""
    if generation_config.get("do_sample") is False:
        return 0.0
    return generation_config.get("temperature")


def _neutral(name: str, value: Any) -> bool:
    """Whether an unimplemented setting has a value that changes nothing."""
    return name in _IGNORED or value is None or any(value == one for one in _UNSUPPORTED.get(name, ((), ""))[0])


def _check(name: str, value: Any, where: str = "") -> None:
    holds, expected = _SETTINGS.get(name, (lambda _: True, ""))
    if not holds(value):
        raise ValueError(f"{where}{name} is {value!r:.80}; expected {expected}")
    if name in ("eos_token_id", "pad_token_id"):
        token_ids(name, value, where=where)


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the implemented settings of arguments or a `GenerationConfig`.

    Raises:
        ValueError: A value has the wrong type, or an unsupported setting of transformers would change the answer.
        TypeError: A name is unknown to transformers, too.
    """
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name in _SETTINGS:
            if value is not None or name == "eos_token_id":
                _check(name, value)
                settings[name] = value
        elif not _neutral(name, value):
            if name not in _UNSUPPORTED:
                raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
            raise ValueError(f"{name}={value!r:.80} is not supported: {_UNSUPPORTED[name][1]}")
    return settings


def settings_of_config(config: Any) -> dict[str, Any]:
    """Settings of a `GenerationConfig` of transformers, or of a mapping.

    Raises:
        ValueError, TypeError: As :func:`read_settings`.
    """
    if config is None:
        return {}
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if not isinstance(fields, Mapping) or not (fields or isinstance(config, Mapping)):
        raise ValueError(f"generation_config is {type(config).__name__}; expected a GenerationConfig or a mapping")
    return read_settings({name: value for name, value in fields.items() if value is not None})


def token_ids(name: str, value: Any, vocab_size: int | None = None, where: str = "") -> list[int]:
    """Token ids from a number, list, array or tensor; None gives none.

    Raises:
        ValueError: One of them is not an integer, or is outside the vocabulary.
    """
    if value is None:
        return []
    ids = list(_flat(value))
    for one in ids:
        if not _is(int)(one):
            raise ValueError(f"{where}{name} is {value!r:.80}; expected a token id or a list of them, whole numbers")
        if vocab_size is not None and not 0 <= one < vocab_size:
            never = ", or None to continue to the full length" if name == "eos_token_id" else ""
            raise ValueError(f"{name} holds {one}; expected ids from 0 to {vocab_size - 1}{never}")
    return ids


def _flat(value: Any) -> Iterator[Any]:
    """Elements of tensors, arrays and nested lists."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, list | tuple | set | frozenset | range):
        for one in plain:
            yield from _flat(one)
    else:
        yield plain


@dataclass(frozen=True)
class Generation:
    """All settings of one call."""

    params: SamplingParams
    ends: frozenset[int]
    """Tokens that end a sequence."""
    pad: int
    """Pads sequences that ended early."""
    stops: tuple[str, ...]
    processors: list[Processor] = field(default_factory=list)
    criteria: list[Callable[..., Any]] = field(default_factory=list)
    """``input_ids (R, S + new)`` and the scores so far, or None -> which sequences end, bool or bool ``(R,)``."""
    max_time: float | None = None
    """Seconds after which no further token is generated."""
    renormalize: bool = False
    as_mapping: bool = False
    """Whether to return a `GenerateOutput`."""
    scores: bool = False
    logits: bool = False

    @property
    def in_lockstep(self) -> bool:
        """Whether all sequences have to advance together, one token at a time."""
        return bool(self.processors or self.criteria or self.max_time is not None or self.scores or self.logits)


def resolve_generation(
    levels: Sequence[Mapping[str, Any]],
    *,
    prompt_tokens: int,
    vocab_size: int,
    pad: int,
    processors: Iterable[Processor] | None,
    criteria: Iterable[Callable[..., Any]] | None,
    allowed: Callable[[int, Tensor], Sequence[int]] | None,
) -> Generation:
    """Resolve the settings of one call.

    Args:
        levels: Settings of the arguments, a `GenerationConfig` and the model's file, in order of precedence.
        prompt_tokens: S.
        vocab_size: V.
        pad: Padding token if no level sets one.
        processors, criteria, allowed: ``logits_processor``, ``stopping_criteria`` and ``prefix_allowed_tokens_fn``.

    Raises:
        ValueError: A value is out of range.
    """
    chosen = ChainMap(*map(dict, levels))
    most, least = _lengths(levels, prompt_tokens)
    params = SamplingParams(
        max_tokens=most,
        min_tokens=least,
        temperature=chosen.get("temperature", 1.0),
        top_p=chosen.get("top_p", 1.0),
        top_k=chosen.get("top_k", 0),
        min_p=chosen.get("min_p", 0.0),
        repetition_penalty=chosen.get("repetition_penalty", 1.0),
        seed=chosen.get("seed"),
        n=chosen.get("num_return_sequences", 1),
    )
    if not chosen.get("do_sample", False):
        params = dataclasses.replace(params, temperature=0.0)
    stops = chosen.get("stop_strings", ())
    as_mapping = chosen.get("return_dict_in_generate", False)
    pads = token_ids("pad_token_id", chosen.get("pad_token_id"), vocab_size)
    return Generation(
        params=params,
        ends=frozenset(token_ids("eos_token_id", chosen.get("eos_token_id", 2), vocab_size)),
        pad=pads[0] if pads else pad,
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        processors=[*_own_processors(chosen, prompt_tokens, vocab_size, allowed), *(processors or ())],
        criteria=list(criteria or ()),
        max_time=chosen.get("max_time"),
        renormalize=chosen.get("renormalize_logits", False),
        as_mapping=as_mapping,
        scores=as_mapping and chosen.get("output_scores", False),
        logits=as_mapping and chosen.get("output_logits", False),
    )


def _lengths(levels: Sequence[Mapping[str, Any]], prompt_tokens: int) -> tuple[int, int]:
    """Maximum and minimum number of new tokens."""
    most = DEFAULT_NEW_TOKENS
    for level in levels:
        if "max_new_tokens" in level:
            most = level["max_new_tokens"]
            if most < 1:
                raise ValueError(f"max_new_tokens is {most}; expected a whole number, at least 1")
            break
        if "max_length" in level:
            most = level["max_length"] - prompt_tokens
            if most < 1:
                raise ValueError(
                    f"max_length is {level['max_length']}, but the prompt alone has {prompt_tokens} tokens; raise it "
                    "or use max_new_tokens"
                )
            break
    chosen = ChainMap(*map(dict, levels))
    least = max(chosen.get("min_new_tokens", 0), chosen.get("min_length", 0) - prompt_tokens, 0)
    if chosen.get("min_new_tokens", 0) < 0:
        raise ValueError(f"min_new_tokens is {chosen['min_new_tokens']}; expected a whole number, 0 or more")
    if least > most:
        conflict = f"at least {least} new tokens are requested (min_new_tokens, min_length), but at most {most}"
        warnings.warn(f"{conflict}; sequences end there", stacklevel=5)
    return most, min(least, most)


def _own_processors(
    chosen: Mapping[str, Any],
    prompt_tokens: int,
    vocab_size: int,
    allowed: Callable[[int, Tensor], Sequence[int]] | None,
) -> list[Processor]:
    """Processors for settings that forbid tokens, in transformers' order."""
    made: list[Processor] = []
    if size := chosen.get("no_repeat_ngram_size", 0):
        if size < 0:
            raise ValueError(f"no_repeat_ngram_size is {size}; expected a whole number, 0 or more")
        made.append(lambda ids, scores: _forbid(scores, [_repeats(row, size) for row in ids.tolist()]))
    if words := chosen.get("bad_words_ids"):
        for word in words:
            token_ids("bad_words_ids", word, vocab_size)
        made.append(lambda ids, scores: _forbid(scores, [_completed(row, words) for row in ids.tolist()]))
    if allowed is not None:
        made.append(lambda ids, scores: _keep(scores, [list(allowed(row, one)) for row, one in enumerate(ids)]))
    if banned := token_ids("suppress_tokens", chosen.get("suppress_tokens"), vocab_size):
        made.append(lambda ids, scores: _forbid(scores, [banned] * len(scores)))
    if first := token_ids("begin_suppress_tokens", chosen.get("begin_suppress_tokens"), vocab_size):
        made.append(lambda ids, scores: _forbid(scores, [first if ids.shape[1] == prompt_tokens else []] * len(scores)))
    return made


def _forbid(scores_RV: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    rows = [row for row, some in enumerate(tokens) for _ in some]
    scores_RV = scores_RV.clone()
    scores_RV[rows, [token for some in tokens for token in some]] = float("-inf")
    return scores_RV


def _keep(scores_RV: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    kept = torch.full_like(scores_RV, float("-inf"))
    for row, some in enumerate(tokens):
        if not some:
            raise ValueError(f"prefix_allowed_tokens_fn allows no token for sequence {row}; return one at least")
        kept[row, list(some)] = scores_RV[row, list(some)]
    return kept


def _repeats(ids: list[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of ``size`` tokens."""
    last = ids[len(ids) - size + 1 :]
    return [ids[at + size - 1] for at in range(len(ids) - size + 1) if ids[at : at + size - 1] == last]


def _completed(ids: list[int], words: Sequence[Sequence[int]]) -> list[int]:
    """Last tokens of the words that would be completed."""
    return [
        word[-1] for word in words if len(word) <= len(ids) + 1 and ids[len(ids) - len(word) + 1 :] == list(word[:-1])
    ]
