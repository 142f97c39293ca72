"""LoRA weights (arXiv 2106.09685) beside the weights of linear layers and of grouped experts.

R rank, E experts. A module with LoRA weights keeps its name, weight and place; the LoRA weights are a submodule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aria import ops
from aria.ops import LoRA
from aria.ops.lora import lora_shapes


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Rank, scaling and dropout of LoRA weights; the defaults are those of the authors of Aria."""

    rank: int = 8
    """R."""
    alpha: float = 32.0
    """The LoRA term is scaled by ``alpha / rank``."""
    dropout: float = 0.05
    """Dropout probability on the input of the LoRA term, in training."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732), so that larger ranks do not learn more slowly."""

    @property
    def scaling(self) -> float:
        """Factor of the LoRA term."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAModule(nn.Module):
    """LoRA weights of one weight; they change nothing until they are trained.

    ``a`` starts uniform within ``1 / sqrt(in)`` and ``b`` at zero, as in PEFT. Each expert's matrix has that bound too:
    the authors' code uses all of ``(in, R)`` as the fan-in, which makes it ``sqrt(R)`` times smaller.
    """

    def __init__(self, weight: Tensor, settings: LoRASettings, dtype: torch.dtype | None = None):
        """Make LoRA weights for a weight ``(out, in)``, or ``(E, in, out)`` of grouped experts.

        ``dtype`` None is the weight's.
        """
        super().__init__()
        self.settings, self.scaling, self.dropout = settings, settings.scaling, settings.dropout
        bound = 1 / math.sqrt(weight.shape[1])
        shapes = lora_shapes(weight.shape, settings.rank)
        a, b = (weight.new_zeros(shape, dtype=dtype, requires_grad=False) for shape in shapes)
        self.a, self.b = nn.Parameter(a.uniform_(-bound, bound)), nn.Parameter(b)

    def lora(self) -> LoRA:
        """The weights as operations take them; without dropout outside training."""
        return LoRA(self.a, self.b, self.scaling, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def change(self) -> Tensor:
        """The difference that merging adds to the weight, float32, in the weight's shape."""
        a, b = self.a.float(), self.b.float()
        return (b @ a if a.ndim == 2 else a @ b) * self.scaling


class LoRALinear(nn.Linear):
    """A linear layer with LoRA weights; shares weight and bias with the layer that it replaces."""

    adapter: LoRAModule

    @classmethod
    def of(cls, linear: nn.Linear, adapter: LoRAModule) -> LoRALinear:
        """Make the replacement of ``linear``."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        made.adapter = adapter
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, self.weight, self.bias, self.adapter.lora())


def apply_linears(x_TD: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Apply linear layers to one input; if all have LoRA weights, these read it once, perhaps with the same dropout."""
    adapted = [linear for linear in linears if isinstance(linear, LoRALinear)]
    if len(adapted) < len(linears):
        return tuple(linear(x_TD) for linear in linears)
    layers = [(linear.weight, linear.bias) for linear in adapted]
    return ops.lora_linears(x_TD, layers, [linear.adapter.lora() for linear in adapted])


def attach_lora(model: nn.Module, name: str, settings: LoRASettings, dtype: torch.dtype | None = None) -> LoRAModule:
    """Add fresh LoRA weights to a module of ``model``: a linear layer, or ``fc1`` or ``fc2`` of the grouped experts.

    All modules that contain it get ``has_lora``: kernels that read weights alone do not apply to them.

    Raises:
        ValueError: The module cannot have LoRA weights, or already has some.
    """
    *path, last = name.split(".")
    parent = model.get_submodule(".".join(path))
    module = getattr(parent, last)
    if getattr(module, "adapter", None) is not None:
        raise ValueError(f"{name} has an adapter already")
    if not _able(parent, module):
        raise ValueError(f"{name} is a {type(module).__name__}; only linear layers and grouped experts take adapters")
    adapter = LoRAModule(module.weight, settings, dtype).train(module.training)
    if isinstance(module, nn.Linear):
        setattr(parent, last, LoRALinear.of(module, adapter))
    else:
        module.adapter = adapter
    for depth in range(len(path) + 1):
        model.get_submodule(".".join(path[:depth])).has_lora = True  # type: ignore[assignment]  # a mark, not a module
    return adapter


def lora_targets(model: nn.Module) -> list[str]:
    """Names of modules that can have LoRA weights: linear layers and grouped experts.

    Not those inside an ``nn.MultiheadAttention``: transformers reads their weights without calling them, so that LoRA
    weights would have an effect only here.
    """
    return [
        f"{name}.{child}"
        for name, parent in model.named_modules()
        for child, module in parent.named_children()
        if _able(parent, module)
    ]


def _able(parent: nn.Module, module: nn.Module) -> bool:
    kind = isinstance(module, nn.Linear) or getattr(module, "accepts_lora", False)
    return kind and not isinstance(parent, nn.MultiheadAttention)


def lora_modules(model: nn.Module) -> dict[str, LoRAModule]:
    """LoRA weights of a model, by the names of the modules that have them."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoRAModule))
    return {name.removesuffix(".adapter"): adapter for name, adapter in found}
