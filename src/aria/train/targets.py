"""What trains: the weights or LoRA, and which parts are frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from rich.table import Table

from aria.model import Aria
from aria.model.lora import LoRAModule, LoRASettings, attach_lora, lora_targets
from aria.wording import similar_names

PARTS = {
    "vision_tower.": "vision tower",
    "multi_modal_projector.": "projector",
    "language_model.model.embed_tokens.": "embeddings",
    "language_model.lm_head.": "head",
    "language_model.": "decoder",
}
"""Prefix of parameter names -> name of the part; the first match counts."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "model": None}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """``[targets]`` of a recipe. The freeze settings have the authors' names."""

    method: Literal["lora", "full"] = "lora"
    """``lora``: LoRA on frozen weights; ``full``: the weights."""
    modules: tuple[str, ...] | None = None
    """With ``lora``: modules that get LoRA, by the end of a name (``q_proj``, ``experts.fc1``) or a pattern for the
    whole name (``*.layers.1?.mlp.*``). None: every linear layer and all experts that are not frozen."""
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` in place of ``alpha / rank``."""
    dtype: Literal["float32", "bfloat16", "model"] = "float32"
    """Dtype of LoRA; ``model``: the dtype of the weights."""
    freeze_vit: bool = True
    freeze_projector: bool = True
    freeze_llm: bool = False
    freeze_llm_layers: tuple[int, ...] = ()
    """Frozen decoder layers; with ``full`` too, where the authors' code trains them anyway."""
    freeze: tuple[str, ...] = ()
    """Further frozen parameters, by patterns of names (``*.router.weight``)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank should be 1 or above, but is {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha should be above 0, but is {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout should be at least 0 and below 1, but is {self.dropout}")
        if self.modules is not None and not self.modules:
            raise ValueError("modules is empty; leave it out for all, or name some")
        if self.method == "full" and self.modules is not None:
            raise ValueError(
                'modules says where adapters go, and method = "full" has none; use freeze to leave parts out'
            )

    @property
    def lora(self) -> LoRASettings:
        """Settings of the LoRA modules."""
        return LoRASettings(rank=self.rank, alpha=self.alpha, dropout=self.dropout, rslora=self.rslora)


class Part(NamedTuple):
    """Trained tensors of one part of the model and one dtype."""

    name: str
    dtype: torch.dtype
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Trainable:
    """What trains, shown before it starts."""

    parts: list[Part]
    whole: int
    """Parameters of the model without LoRA."""
    adapters: list[str] = field(default_factory=list)
    """Modules with LoRA."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    def table(self) -> Table:
        """One row per part."""
        table = Table("part", "dtype", "tensors", "parameters", title="What trains")
        for column in table.columns[2:]:
            column.justify = "right"
        for part in self.parts:
            dtype = str(part.dtype).removeprefix("torch.")
            table.add_row(part.name, dtype, f"{part.tensors:,}", f"{part.parameters:,}")
        share = self.parameters / self.whole
        table.caption = f"{self.parameters:,} parameters, {share:.2%} of the model's {self.whole:,}"
        return table


def apply(model: Aria, targets: Targets) -> Trainable:
    """Freeze what does not train, and attach new LoRA modules.

    Works on the meta device too. LoRA is initialized with PyTorch's global generator.

    Raises:
        ValueError: A name or pattern matches nothing, a layer does not exist, or nothing is left to train.
    """
    whole = sum(p.numel() for p in model.parameters())
    last = model.config.text.num_hidden_layers - 1
    if beyond := [layer for layer in targets.freeze_llm_layers if not 0 <= layer <= last]:
        raise ValueError(f"freeze_llm_layers names {beyond[0]}, but the decoder's layers are 0 to {last}")
    names = [name for name, _ in model.named_parameters()]
    for pattern in targets.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"freeze: no parameter is called {pattern!r}{_nearest(pattern, names)}")
    chosen = _modules(model, targets) if targets.method == "lora" else []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(targets.method == "full" and not _frozen(name, targets))
    for name in chosen:
        attach_lora(model, name, targets.lora, _DTYPES[targets.dtype])
    trainable = Trainable(_parts(model), whole, chosen)
    if not trainable.parts:
        raise ValueError("everything is frozen, and nothing is left to train; set one of the freeze settings to false")
    return trainable


def _modules(model: Aria, targets: Targets) -> list[str]:
    able = lora_targets(model)
    free = [name for name in able if not _frozen(f"{name}.weight", targets)]
    if targets.modules is None:
        if not free:
            raise ValueError("everything that could have an adapter is frozen; set one of the freeze settings to false")
        return free
    chosen: set[str] = set()
    for target in targets.modules:
        matched = [name for name in able if _is(name, target)]
        if not matched:
            raise ValueError(f"modules: nothing that can have an adapter is called {target!r}{_nearest(target, able)}")
        left = [name for name in matched if name in free]
        if not left:
            raise ValueError(
                f"modules: all that is called {target!r} is frozen ({matched[0]}, ...); leave it out or unfreeze it"
            )
        chosen.update(left)
    return [name for name in free if name in chosen]


def _is(name: str, target: str) -> bool:
    if any(mark in target for mark in "*?["):
        return fnmatchcase(name, target)
    return f".{name}".endswith(f".{target}")


def _frozen(name: str, targets: Targets) -> bool:
    """Whether a parameter of this name is frozen."""
    by_part = {
        "vision_tower.": targets.freeze_vit,
        "multi_modal_projector.": targets.freeze_projector,
        "language_model.": targets.freeze_llm,
    }
    layers = tuple(f"language_model.model.layers.{layer}." for layer in targets.freeze_llm_layers)
    return (
        any(frozen and name.startswith(prefix) for prefix, frozen in by_part.items())
        or name.startswith(layers)
        or any(fnmatchcase(name, pattern) for pattern in targets.freeze)
    )


def _parts(model: Aria) -> list[Part]:
    found: dict[tuple[str, torch.dtype], list[int]] = {}
    beside = {id(p) for module in model.modules() if isinstance(module, LoRAModule) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(called for prefix, called in PARTS.items() if name.startswith(prefix))
            if ".experts." in name:
                part = "experts"
            key = f"{part}, adapters" if id(parameter) in beside else part, parameter.dtype
            found.setdefault(key, []).append(parameter.numel())
    return [Part(name, dtype, len(sizes), sum(sizes)) for (name, dtype), sizes in found.items()]


def _nearest(name: str, names: list[str]) -> str:
    """Similar names, for errors."""
    tails = sorted({".".join(one.split(".")[-n:]) for one in names for n in (1, 2)} | {*names})
    near = similar_names(name, tails, most=3)
    return f"; similar names are {', '.join(near)}" if near else f"; there are {', '.join(tails[:8])}, ..."
