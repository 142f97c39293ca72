"""Adapter folders as PEFT writes and reads them, on transformers' Aria or on the authors' code.

R rank, E experts. PEFT keeps the matrices of all experts side by side, ``lora_A (E R, in)`` with an expert's rows
together and ``lora_B (out, R E)`` with experts side by side; ours are ``(E, in, R)`` and ``(E, R, out)``, as the
authors' code has them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aria.config import AriaConfig
from aria.hub import read_json, resolve
from aria.model.adapter import LoRA, adaptable, adapters, attach
from aria.model.aria import Aria
from aria.ops import LowRank

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_EXPERTS = {"gate_up_proj": "fc1", "down_proj": "fc2"}
"""Parameters of transformers' experts -> our modules, in the order in which PEFT wraps them."""
_KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
}
_EMPTY = ("modules_to_save", "trainable_token_indices", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter folder holds."""

    settings: LoRA
    base_model: str | None
    """The name or path of the model that it was trained beside."""
    weights: dict[str, LowRank]
    """By the names of our modules, in the dtype of the file, on the CPU."""


def read_adapter(folder: str | os.PathLike[str], config: AriaConfig, *, revision: str | None = None) -> StoredAdapter:
    """Read an adapter that we, the authors' code, or PEFT on transformers' Aria wrote.

    Args:
        folder: or a Hub repository.
        config: of the model that it goes beside.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks one of its two files.
        ValueError: it is not LoRA, uses what is not offered here, or does not fit the model.
    """
    path = resolve(folder, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME])
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is no adapter folder: it has no {name}")
    found = read_json(path / CONFIG_NAME)
    settings = _settings(found, path)
    try:
        tensors = load_file(path / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_NAME} cannot be read: {error}; it may be truncated") from error
    shapes = _shapes(config)
    weights = {}
    for name, (a, b) in _pairs(tensors, path).items():
        name, a, b = _ours(name, a, b, config)
        if name not in shapes:
            if not b.any():  # PEFT puts some where transformers never runs them
                continue
            raise ValueError(f"{path} has an adapter for {name}, which this model has not; is it for another model?")
        rank, alpha = (
            _by_pattern(found.get(f"{kind}_pattern") or {}, name, default)
            for kind, default in (("rank", settings.rank), ("alpha", settings.alpha))
        )
        _check(name, a, b, shapes[name], int(rank), path)
        scaling = LoRA(rank=int(rank), alpha=alpha, rslora=settings.rslora).scaling
        weights[name] = LowRank(a, b, scaling)
    if not weights:
        raise ValueError(f"{path / WEIGHTS_NAME} holds no adapter; it was saved empty")
    return StoredAdapter(settings, found.get("base_model_name_or_path"), weights)


def base_of(folder: str | os.PathLike[str], *, revision: str | None = None) -> str | None:
    """What an adapter folder names as the model that it was trained beside; None where it names nothing.

    Raises:
        FileNotFoundError: there is no such folder, or it has no ``adapter_config.json``.
    """
    path = resolve(folder, revision=revision, allow_patterns=[CONFIG_NAME])
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path} is no adapter folder: it has no {CONFIG_NAME}")
    return read_json(path / CONFIG_NAME).get("base_model_name_or_path") or None


def save_adapter(model: Aria, folder: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Write the adapters of a model as PEFT's folder, for transformers' Aria; what was there goes last.

    Args:
        model: with adapters of one rank and scaling.
        folder: made if it is not there.
        base_model: name or path that the folder is to tell as its base.

    Raises:
        ValueError: the model has no adapters.
    """
    attached = adapters(model)
    if not attached:
        raise ValueError("the model has no adapters to save; attach some before, or save its weights")
    tensors: dict[str, Tensor] = {}
    inner = {name.rsplit(".", 1)[0] for name in attached if name.endswith(".experts.fc1")}
    for name, adapter in attached.items():
        a, b = adapter.a.detach().cpu(), adapter.b.detach().cpu()
        path, last = name.rsplit(".", 1)
        target = _theirs(name)
        if a.ndim == 3:
            a, b = a.mT.flatten(0, 1), b.permute(2, 1, 0).flatten(1)
            # PEFT nests wrappers where two parameters of a module are adapted; the first lies innermost.
            target = _theirs(path) + (".base_layer" if last == "fc1" and _both(path, inner, attached) else "")
        tensors[f"base_model.model.{target}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = b.contiguous()
    settings = next(iter(attached.values())).settings
    config = _config(model, list(attached), settings, base_model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS_NAME}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    described = folder / f"{CONFIG_NAME}.partial"
    described.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / WEIGHTS_NAME)
    described.replace(folder / CONFIG_NAME)


def load_adapter(model: Aria, stored: StoredAdapter, *, dtype: torch.dtype | None = None) -> None:
    """Attach a stored adapter to a model, to train it further or to compute with it.

    Args:
        model: without adapters in those places.
        stored: as :func:`read_adapter` gives it.
        dtype: of its tensors; None: that of the file.
    """
    for name, low_rank in stored.weights.items():
        rank = low_rank.a.shape[0] if low_rank.a.ndim == 2 else low_rank.a.shape[-1]
        alpha = low_rank.scaling * (math.sqrt(rank) if stored.settings.rslora else rank)
        shape = LoRA(rank=rank, alpha=alpha, dropout=stored.settings.dropout, rslora=stored.settings.rslora)
        adapter = attach(model, name, shape, dtype or low_rank.a.dtype)
        with torch.no_grad():
            adapter.a.copy_(low_rank.a)
            adapter.b.copy_(low_rank.b)


def merged(weight: Tensor, low_rank: LowRank) -> Tensor:
    """A weight with its adapter added, in float32 and rounded once."""
    a, b = (part.to(weight.device, torch.float32) for part in (low_rank.a, low_rank.b))
    change = (b @ a if a.ndim == 2 else a @ b) * low_rank.scaling
    return change.add_(weight.float()).to(weight.dtype)


def _settings(found: Mapping[str, Any], path: Path) -> LoRA:
    if found.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path} is a {found['peft_type']} adapter; only LORA is offered")
    for name, plain in _PLAIN.items():
        if found.get(name) not in plain:
            raise ValueError(f"{path}: {name} is {found[name]!r}, which is not offered here; merge it with PEFT first")
    if extra := [name for name in _EMPTY if found.get(name)]:
        raise ValueError(f"{path} uses {extra[0]}, which is not offered here; merge it with PEFT first")
    try:
        return LoRA(
            rank=int(found["r"]),
            alpha=float(found["lora_alpha"]),
            dropout=float(found.get("lora_dropout") or 0.0),
            rslora=bool(found.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME} does not say r and lora_alpha as numbers ({error!r})") from error


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        matched = _KEY.fullmatch(key)
        if matched is None:
            if key.endswith(".base_layer.weight") or key.endswith("embed_tokens.weight"):
                continue  # PEFT copies whole weights of heads and embeddings that it leaves as they are
            raise ValueError(f"{path / WEIGHTS_NAME}: {key} is no tensor of a LoRA adapter")
        halves.setdefault(matched[1], {})[matched[2]] = tensor
    for name, half in halves.items():
        if len(half) < 2:
            raise ValueError(f"{path / WEIGHTS_NAME}: {name} has lora_{next(iter(half))} and not the other")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _ours(name: str, a: Tensor, b: Tensor, config: AriaConfig) -> tuple[str, Tensor, Tensor]:
    """A pair under our name and in our shapes, from transformers' names (``model.language_model.layers``) or ours."""
    if name.startswith("model."):
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = f"language_model.model.{name.removeprefix('language_model.')}"
    elif name == "lm_head":
        name = "language_model.lm_head"
    path = name.removesuffix(".base_layer")
    if path.endswith(".experts") and a.ndim == 2:
        text, E = config.text, config.text.moe_num_experts
        # Which of the two it is, sizes tell: PEFT's names do so only where there are both.
        kind = "fc1" if (a.shape[1], b.shape[0]) == (text.hidden_size, 2 * text.intermediate_size) else "fc2"
        if a.shape[0] % E or b.shape[1] % E:
            raise ValueError(f"{path}: {a.shape[0]} rows of lora_A are no whole number for each of {E} experts")
        return f"{path}.{kind}", a.unflatten(0, (E, -1)).mT.contiguous(), b.unflatten(1, (-1, E)).permute(2, 1, 0)
    return name, a, b


def _theirs(name: str) -> str:
    """Our module's name in transformers' Aria."""
    if name == "language_model.lm_head":
        return "lm_head"
    return f"model.{name.replace('language_model.model.', 'language_model.', 1)}"


def _both(path: str, inner: set[str], attached: Mapping[str, object]) -> bool:
    return path in inner and f"{path}.fc2" in attached


def _config(model: Aria, names: list[str], settings: LoRA, base_model: str | None) -> dict[str, Any]:
    experts = [name for name in names if name.endswith((".experts.fc1", ".experts.fc2"))]
    back = {ours: theirs for theirs, ours in _EXPERTS.items()}
    parameters = [f"{_theirs(path)}.{back[last]}" for path, last in (name.rsplit(".", 1) for name in experts)]
    linears = [name for name in names if name not in experts]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # PEFT refuses dropout beside experts, also where nothing is trained.
        "lora_dropout": 0.0 if experts else settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _short(model, linears),
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }


def _short(model: nn.Module, names: list[str]) -> list[str]:
    """The ends of names where all modules of such an end are meant, else whole names."""
    everyone = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = {name.rsplit(".", 1)[-1] for name in names}
    chosen = set(names)
    whole = {end for end in ends if all(name in chosen for name in everyone if name.rsplit(".", 1)[-1] == end)}
    return sorted(whole) + [_theirs(name) for name in names if name.rsplit(".", 1)[-1] not in whole]


def _shapes(config: AriaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Aria(config)
    return {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in adaptable(model)}


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's way: a pattern is the end of a name, as a regular expression."""
    theirs = _theirs(name)
    return next((v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", theirs)), default)


def _check(name: str, a: Tensor, b: Tensor, weight: tuple[int, ...], rank: int, path: Path) -> None:
    if len(weight) == 2:
        expected = (rank, weight[1]), (weight[0], rank)
    else:
        expected = (weight[0], weight[1], rank), (weight[0], rank, weight[2])  # type: ignore[assignment]
    came = tuple(a.shape), tuple(b.shape)
    if came != expected:
        raise ValueError(
            f"{path} does not fit this model: {name} has tensors of {came[0]} and {came[1]}, and rank {rank} beside "
            f"its weight asks for {expected[0]} and {expected[1]}; it is for another model or rank"
        )
