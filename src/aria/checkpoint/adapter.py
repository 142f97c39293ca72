"""Adapter folders in PEFT's format, for transformers' Aria or the authors' code.

R rank, E experts. PEFT stores the matrices of all experts in one: ``lora_A (E R, in)`` with the rows of an expert
together, ``lora_B (out, R E)`` with the columns of a rank together; ours are ``(E, in, R)`` and ``(E, R, out)``, as in
the authors' code.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import regex
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aria.checkpoint.layouts import LAYOUTS
from aria.checkpoint.load import parameter_shapes
from aria.checkpoint.save import Spec, replacing, write_safetensors
from aria.checkpoint.stored import read_header
from aria.config import AriaConfig
from aria.hub import ADAPTER_NAME, read_json, resolve, write_json
from aria.model.aria import Aria
from aria.model.lora import LoRASettings, attach_lora, lora_modules, lora_targets
from aria.ops import LoRA
from aria.ops.lora import check_lora

Number = TypeVar("Number", int, float)

WEIGHTS_NAME = "adapter_model.safetensors"
_PARAMETERS = {"fc1": "gate_up_proj", "fc2": "down_proj"}
"""Our expert modules -> transformers' parameters, in the order in which PEFT wraps them."""
_KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    # Other values change the base weights too, so that the matrices are not the whole change.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_EMPTY = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "lora_bias",
    "use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""What PEFT's LoRA may have besides, and is not offered here."""
_MOST_RANK, _MOST_ALPHA = 1 << 16, 1e6
_MOST_PATTERNS, _MOST_PATTERN = 10_000, 1000
"""Maximum number of patterns, and characters of a pattern."""
_MATCH_SECONDS = 10.0
"""Time limit for all patterns of an adapter: some backtrack forever."""


@dataclass(frozen=True)
class StoredAdapter:
    """Contents of an adapter folder."""

    base_model: str | None
    """Name or path of the base model."""
    weights: dict[str, LoRA]
    """LoRA by the names of our modules, in the dtype of the file, on the CPU, without dropout."""
    settings: dict[str, LoRASettings]
    """Settings of each: PEFT's patterns may give modules their own rank or alpha."""


def read_adapter(folder: str | os.PathLike[str], config: AriaConfig, *, revision: str | None = None) -> StoredAdapter:
    """Read an adapter written by this package, the authors' code, or PEFT on transformers' Aria.

    Args:
        folder: Folder or Hub repository.
        config: Configuration of the base model.
        revision: Branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: There is no such folder, or one of its two files is missing.
        ValueError: It is not LoRA, uses an unsupported feature, or does not fit the model.
    """
    path = resolve(folder, revision=revision, allow_patterns=[ADAPTER_NAME, WEIGHTS_NAME])
    for name in (ADAPTER_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not an adapter folder: it has no {name}")
    found = read_json(path / ADAPTER_NAME)
    common = _settings(found, path)
    read_header(path / WEIGHTS_NAME)  # checks it
    tensors = load_file(path / WEIGHTS_NAME)
    ours, shapes = _our_names(config), _shapes(config)
    ranks, alphas = _Patterns(found, "rank_pattern", _rank, path), _Patterns(found, "alpha_pattern", _alpha, path)
    weights: dict[str, LoRA] = {}
    settings: dict[str, LoRASettings] = {}
    for key, (a, b) in _pairs(tensors, config, path).items():
        name, a, b = _ours(key, a, b, ours, config)
        if name not in shapes:
            if not b.any():  # PEFT adds some where transformers never runs them
                continue
            raise ValueError(f"{path} has LoRA for {name}, which this model lacks; is it for another model?")
        if name in weights:
            raise ValueError(f"{path / WEIGHTS_NAME} has two adapters for {name}")
        # PEFT uses today's names; the authors' folders use those of their layout.
        called = (_theirs(name), name, key)
        settings[name] = replace(
            common,
            rank=ranks.of(called, common.rank),
            alpha=alphas.of(called, common.alpha),
        )
        _check(name, a, b, shapes[name], settings[name].rank, path)
        weights[name] = LoRA(a, b, settings[name].scaling)
    if not weights:
        raise ValueError(f"{path / WEIGHTS_NAME} holds no adapter; it was saved empty")
    return StoredAdapter(found.get("base_model_name_or_path") or None, weights, settings)


def base_of(folder: str | os.PathLike[str], *, revision: str | None = None) -> tuple[str | None, str | None]:
    """The base model that an adapter folder names, and its revision; None where it names none.

    Raises:
        FileNotFoundError: There is no such folder, or it has no ``adapter_config.json``.
    """
    path = resolve(folder, revision=revision, allow_patterns=[ADAPTER_NAME])
    if not (path / ADAPTER_NAME).is_file():
        raise FileNotFoundError(f"{path} is not an adapter folder: it has no {ADAPTER_NAME}")
    found = read_json(path / ADAPTER_NAME)
    return found.get("base_model_name_or_path") or None, found.get("revision") or None


def save_adapter(
    model: Aria,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the LoRA of a model as a PEFT folder for transformers' Aria.

    Args:
        model: Model whose LoRA modules share their settings.
        folder: Created if missing. An adapter in it is replaced once the new one is complete; other files stay.
        base_model: Name or path of the base model, stored in the folder.
        revision: Revision of the base model in a Hub repository.
        state: Values by names of parameters, if the model itself is sharded; None: the model's own.

    Raises:
        ValueError: The model has no LoRA, or modules with different settings.
        OSError: The files cannot be written.
    """
    attached = lora_modules(model)
    if not attached:
        raise ValueError("the model has no LoRA to save; attach some before, or save its weights")
    shapes = {adapter.settings for adapter in attached.values()}
    if len(shapes) > 1:
        raise ValueError(f"the model's LoRA modules differ ({_differing(shapes)}); a folder holds one setting for all")
    tensors: dict[str, Tensor] = {}
    for name, adapter in attached.items():
        a, b = (
            (part if state is None else state[f"{name}.adapter.{which}"]).detach().cpu()
            for which, part in (("a", adapter.a), ("b", adapter.b))
        )
        target = _theirs(name)
        if a.ndim == 3:
            a, b = a.mT.flatten(0, 1), b.permute(2, 1, 0).flatten(1)
            path, last = name.rsplit(".", 1)
            # PEFT nests wrappers if two parameters of a module are adapted; the first is innermost.
            target = _theirs(path) + (".base_layer" if last == "fc1" and f"{path}.fc2" in attached else "")
        tensors |= {f"base_model.model.{target}.lora_{kind}.weight": part for kind, part in (("A", a), ("B", b))}
    config = _config(model, list(attached), shapes.pop(), base_model, revision)
    with replacing(folder, stale=()) as staging:
        specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_safetensors(staging / WEIGHTS_NAME, specs, tensors.__getitem__)
        write_json(staging / ADAPTER_NAME, config)


def load_adapter(model: Aria, stored: StoredAdapter, *, dtype: torch.dtype | None = None) -> None:
    """Attach a stored adapter to a model, for training or inference.

    Args:
        model: Model without LoRA on these modules.
        stored: Result of :func:`read_adapter`.
        dtype: Dtype of the LoRA tensors; None: that of the file.
    """
    for name, lora in stored.weights.items():
        adapter = attach_lora(model, name, stored.settings[name], dtype or lora.a.dtype)
        with torch.no_grad():
            adapter.a.copy_(lora.a)
            adapter.b.copy_(lora.b)


def merged(weight: Tensor, lora: LoRA) -> Tensor:
    """The weight plus its LoRA, computed in float32 and rounded once; a new tensor of the weight's dtype."""
    a, b = (part.to(weight.device, torch.float32) for part in (lora.a, lora.b))
    if weight.ndim == 2:
        return torch.addmm(weight.float(), b, a, alpha=lora.scaling).to(weight.dtype)
    out = torch.empty_like(weight)
    for expert, before in enumerate(weight):  # one by one: all experts of Aria in float32 are 2 GB
        out[expert] = torch.addmm(before.float(), a[expert], b[expert], alpha=lora.scaling)
    return out


def _settings(found: Mapping[str, Any], path: Path) -> LoRASettings:
    if found.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path} is a {found['peft_type']!s:.40} adapter; only LORA is supported")
    strange = [name for name, plain in _PLAIN.items() if found.get(name, plain[0]) not in plain]
    if strange := strange + [name for name in _EMPTY if found.get(name)]:
        came = f"{strange[0]} is {found[strange[0]]!r:.100}"
        raise ValueError(f"{path}: {came}, which is not supported here; merge the adapter with PEFT")
    try:
        return LoRASettings(
            rank=_rank("r", found.get("r")),
            alpha=_alpha("lora_alpha", found.get("lora_alpha")),
            dropout=_number("lora_dropout", found.get("lora_dropout") or 0.0, 0.0, 1.0),
            rslora=found.get("use_rslora") is True,
        )
    except ValueError as error:
        raise ValueError(f"{path / ADAPTER_NAME}: {error}") from None


def _rank(name: str, value: Any) -> int:
    return int(_number(name, value, 1, _MOST_RANK, whole=True))


def _alpha(name: str, value: Any) -> float:
    return _number(name, value, -_MOST_ALPHA, _MOST_ALPHA)


def _number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} is {value!r:.40}; expected a {kind} from {least:,} to {most:,}")
    return float(value)


def _pairs(tensors: Mapping[str, Tensor], config: AriaConfig, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    table = config.text.vocab_size, config.text.hidden_size
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        matched = _KEY.fullmatch(key)
        if matched is not None:
            halves.setdefault(matched[1], {})[matched[2]] = tensor
        elif not key.endswith(("lm_head.base_layer.weight", "lm_head.weight", "embed_tokens.weight")):
            raise ValueError(f"{path / WEIGHTS_NAME}: {key} is not a LoRA tensor")
        elif tensor.shape != table:  # PEFT may add head and embeddings of the base
            raise ValueError(
                f"{path / WEIGHTS_NAME}: {key} is {list(tensor.shape)}, for another vocabulary than {table}"
            )
    for name, half in halves.items():
        if len(half) < 2:
            raise ValueError(f"{path / WEIGHTS_NAME}: {name} has lora_{next(iter(half))} and not the other")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _our_names(config: AriaConfig) -> dict[str, str]:
    """Names of modules in layouts with our orientation and experts -> our names."""
    layouts = [layout for layout in LAYOUTS if not layout.linear_in_out and layout.expert_prefix is None]
    return {
        piece.key.removesuffix(".weight"): name.removesuffix(".weight")
        for name, shape in parameter_shapes(config).items()
        for layout in layouts
        for piece in layout.pieces(name, shape)
    }


def _ours(key: str, a: Tensor, b: Tensor, ours: Mapping[str, str], config: AriaConfig) -> tuple[str, Tensor, Tensor]:
    """A pair of matrices under our name and in our shapes."""
    path = key.removesuffix(".base_layer")
    if not path.endswith(".experts"):
        return ours.get(path, path), a, b
    text, E = config.text, config.text.moe_num_experts
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] % E or b.shape[1] % E:
        raise ValueError(f"{key} has {tuple(a.shape)} and {tuple(b.shape)}, not the same rank for each of {E} experts")
    # Distinguished by size: PEFT's names differ only if both parameters are adapted.
    parameter = (
        "gate_up_proj" if (a.shape[1], b.shape[0]) == (text.hidden_size, 2 * text.intermediate_size) else "down_proj"
    )
    name = ours.get(f"{path}.{parameter}", f"{path}.{parameter}")
    return name, a.unflatten(0, (E, -1)).mT.contiguous(), b.unflatten(1, (-1, E)).permute(2, 1, 0).contiguous()


def _theirs(name: str) -> str:
    """Name of our module in transformers' Aria; for experts, of the parameter."""
    path, _, last = name.rpartition(".")
    if path.endswith(".experts"):
        return f"{_theirs(path)}.{_PARAMETERS[last]}"
    if name == "language_model.lm_head":
        return "lm_head"
    return f"model.{name.replace('language_model.model.', 'language_model.', 1)}"


def _config(
    model: Aria, names: list[str], settings: LoRASettings, base_model: str | None, revision: str | None
) -> dict[str, Any]:
    experts = [name for name in names if name.endswith((".experts.fc1", ".experts.fc2"))]
    linears = [name for name in names if name not in experts]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "revision": revision,  # of the base, as in PEFT
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # PEFT refuses dropout on experts, even in inference.
        "lora_dropout": 0.0 if experts else settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _short(model, linears),
        "target_parameters": [_theirs(name) for name in experts] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }


def _short(model: nn.Module, names: list[str]) -> list[str]:
    """Ends of names where all modules with that end are adapted, else whole names."""
    everyone = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = {name.rsplit(".", 1)[-1] for name in names}
    chosen = set(names)
    whole = {end for end in ends if all(name in chosen for name in everyone if name.rsplit(".", 1)[-1] == end)}
    return sorted(whole) + [_theirs(name) for name in names if name.rsplit(".", 1)[-1] not in whole]


def _shapes(config: AriaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Aria(config)
    return {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in lora_targets(model)}


class _Patterns(Generic[Number]):
    """PEFT's ``rank_pattern`` or ``alpha_pattern``: the end of a name, as a regular expression -> value."""

    def __init__(self, found: Mapping[str, Any], kind: str, read: Callable[[str, Any], Number], path: Path):
        patterns = found.get(kind) or {}
        self._kind, self._path, self._left = kind, path, _MATCH_SECONDS
        try:
            if not isinstance(patterns, Mapping) or len(patterns) > _MOST_PATTERNS:
                raise ValueError(f"at most {_MOST_PATTERNS:,} are read")
            self._patterns: dict[regex.Pattern[str], Number] = {
                _compile(pattern): read(f"{kind} of {pattern!r:.100}", value) for pattern, value in patterns.items()
            }
        except ValueError as error:
            raise ValueError(
                f"{path / ADAPTER_NAME}: {kind} should map ends of modules' names to numbers, but is {patterns!r:.200} "
                f"({error})"
            ) from None

    def of(self, names: Sequence[str], default: Number) -> Number:
        """The value of the first pattern that matches one of a module's names.

        Raises:
            ValueError: Matching takes too long.
        """
        for pattern, value in self._patterns.items():
            if any(self._fits(pattern, name) for name in names):
                return value
        return default

    def _fits(self, pattern: regex.Pattern[str], name: str) -> bool:
        start = time.monotonic()
        try:
            return pattern.fullmatch(name, timeout=max(self._left, 1e-3), concurrent=True) is not None
        except TimeoutError:
            raise ValueError(
                f"{self._path / ADAPTER_NAME}: the patterns of {self._kind} take more than {_MATCH_SECONDS:g} s, "
                f"as patterns with excessive backtracking do; write plain names (it was {pattern.pattern!r:.100})"
            ) from None
        finally:
            self._left -= time.monotonic() - start


def _compile(pattern: str) -> regex.Pattern[str]:
    """Compile a pattern as PEFT does, with ``regex``, which has timeouts; it must be valid for Python's ``re`` too.

    Raises:
        ValueError: It is not valid.
    """
    if len(pattern) > _MOST_PATTERN:
        raise ValueError(f"a pattern has {len(pattern):,} characters; at most {_MOST_PATTERN:,} are read")
    whole = rf"(.*\.)?({pattern})"
    try:
        re.compile(whole)
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.100} is not a regular expression: {error}") from None


def _differing(shapes: set[LoRASettings]) -> str:
    """How LoRA settings differ."""
    values = {field.name: sorted({getattr(shape, field.name) for shape in shapes}) for field in fields(LoRASettings)}
    return ", ".join(f"{name} {found}" for name, found in values.items() if len(found) > 1)


def _check(name: str, a: Tensor, b: Tensor, weight: tuple[int, ...], rank: int, path: Path) -> None:
    try:
        check_lora(name, a, b, weight, rank)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this model: {error}; it is for another model or rank") from None
    # In a batch with other adapters, zero times a value that is not finite would corrupt their results too.
    if wrong := [half for half, tensor in (("A", a), ("B", b)) if not tensor.isfinite().all()]:
        raise ValueError(
            f"{path}: lora_{wrong[0]} of {name} holds inf or NaN; its training diverged: delete the newest "
            "of its run's checkpoints and export again, or train with a lower learning rate"
        )
