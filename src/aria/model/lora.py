"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the weights of linear layers and of grouped experts.

R rank, E experts. What is adapted keeps its name, its weight and its place; the adapter is a module under it.
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
    """The shape of adapters; the defaults are the authors'."""

    rank: int = 8
    """R."""
    alpha: float = 32.0
    """The adapter counts ``alpha / rank`` times."""
    dropout: float = 0.05
    """Share of the adapter's inputs that do not count, in training."""
    rslora: bool = False
    """Let it count ``alpha / sqrt(rank)`` times (arXiv 2312.03732), so that larger ranks do not learn more slowly."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAModule(nn.Module):
    """A low-rank change of one weight; it changes nothing until it is trained.

    ``a`` starts uniform within ``1 / sqrt(in)`` and ``b`` at zero, as in PEFT. Beside experts each matrix has that
    bound too: the authors' code takes all of ``(in, R)`` for one fan-in, which makes it ``sqrt(R)`` times smaller.
    """

    def __init__(self, weight: Tensor, settings: LoRASettings, dtype: torch.dtype | None = None):
        """Beside a weight ``(out, in)``, or ``(E, in, out)`` of grouped experts; ``dtype`` None: the weight's."""
        super().__init__()
        self.settings, self.scaling, self.dropout = settings, settings.scaling, settings.dropout
        bound = 1 / math.sqrt(weight.shape[1])
        shapes = lora_shapes(weight.shape, settings.rank)
        a, b = (weight.new_zeros(shape, dtype=dtype, requires_grad=False) for shape in shapes)
        self.a, self.b = nn.Parameter(a.uniform_(-bound, bound)), nn.Parameter(b)

    def lora(self) -> LoRA:
        """As the operations take it; without dropout outside of training."""
        return LoRA(self.a, self.b, self.scaling, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def change(self) -> Tensor:
        """What it adds to the weight, float32, in the weight's shape."""
        a, b = self.a.float(), self.b.float()
        return (b @ a if a.ndim == 2 else a @ b) * self.scaling


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; shares weight and bias with the layer whose place it takes."""

    adapter: LoRAModule

    @classmethod
    def of(cls, linear: nn.Linear, adapter: LoRAModule) -> LoRALinear:
        """To be put in the place of ``linear``."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        made.weight, made.bias = linear.weight, linear.bias
        made.adapter = adapter
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.lora_linear(x, self.weight, self.bias, self.adapter.lora())


def apply_linears(x_TD: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Linear layers of one input; if all have adapters, these read it once, and may drop the same of it."""
    adapted = [linear for linear in linears if isinstance(linear, LoRALinear)]
    if len(adapted) < len(linears):
        return tuple(linear(x_TD) for linear in linears)
    layers = [(linear.weight, linear.bias) for linear in adapted]
    return ops.lora_linears(x_TD, layers, [linear.adapter.lora() for linear in adapted])


def attach_lora(model: nn.Module, name: str, settings: LoRASettings, dtype: torch.dtype | None = None) -> LoRAModule:
    """Put a fresh adapter beside the weight of a module of ``model``, a linear layer or the grouped experts' ``fc1`` or
    ``fc2``. All modules around it get ``has_lora``: kernels that read weights alone do not apply to them.

    Raises:
        ValueError: the module can have none, or has one.
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
    """Names of modules that can have an adapter: linear layers and grouped experts.

    Not what lies inside an ``nn.MultiheadAttention``: where transformers computes, its weights are read past the
    module, and an adapter there would count here alone.
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
    """All adapters of a model, by the names of the modules they are beside."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, LoRAModule))
    return {name.removesuffix(".adapter"): adapter for name, adapter in found}
