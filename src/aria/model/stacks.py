"""Several adapters beside one model's weights, for steps in which every token may have another one, or none.

T tokens, D hidden, E experts, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aria import ops
from aria.ops import LowRank, MoEStacks, Stack

LAYERS = "language_model.model.layers"
HEAD = "language_model.lm_head"

# What reads the same input is one product: the parts of a layer, and the modules that each stands for.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "fc1": ("mlp.experts.fc1",),
    "fc2": ("mlp.experts.fc2",),
    "gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "down": ("mlp.shared_experts.down_proj",),
}


class AdapterStacks:
    """What several adapters change in a decoder and its head, stacked by weight; the weights stay as they are.

    Args:
        model: an :class:`~aria.model.Aria`, whose dtype and device the stacks take.
        adapters: of each adapter the low-rank changes by names of modules; the first is number 1.

    Raises:
        ValueError: a name is no linear or grouped expert of the decoder, or a shape is not that of its weight.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Mapping[str, LowRank]]):
        places = _places(model)
        modules = dict(model.named_modules())
        parts: dict[tuple[int, str], list[tuple[int, int, LowRank]]] = {}
        for owner, changes in enumerate(adapters, 1):
            for name, low_rank in changes.items():
                if name not in places:
                    raise ValueError(f"an adapter changes {name!r:.200}, which is no linear or expert of the decoder")
                _check(name, modules[name].weight, low_rank)
                layer, part, first = places[name]
                parts.setdefault((layer, part), []).append((owner, first, low_rank))
        self._stacks: dict[tuple[int, str], Stack] = {}
        for (layer, part), found in parts.items():
            weights = [modules[name].weight for name, place in places.items() if place[:2] == (layer, part)]
            outputs = sum(_sizes(weight)[1] for weight in weights)
            self._stacks[layer, part] = ops.stack_adapters(found, outputs, weights[0])

    def __len__(self) -> int:
        return len(self._stacks)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for stack in self._stacks.values() for tensor in stack)

    @property
    def on_experts(self) -> bool:
        """Whether any layer's mixture of experts is changed; fused kernels take that up to so many ranks and tokens."""
        return any(part in MoEStacks._fields for _, part in self._stacks)

    def of(self, layer: int, part: str) -> Stack | None:
        """The stack of a layer's part, or of the head, ``(-1, "head")``; None where no adapter changes it."""
        return self._stacks.get((layer, part))


@dataclass(frozen=True)
class StepAdapters:
    """The adapters of one step: whose each token is."""

    stacks: AdapterStacks
    owners: Tensor
    """int32 ``(T,)``: the number of each token's adapter, 0 for none."""

    def at(self, places: Tensor) -> StepAdapters:
        """The same for some of the tokens."""
        return replace(self, owners=self.owners.index_select(0, places))

    def add(self, layer: int, part: str, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """``y`` and what each token's adapter makes of ``x`` in this part; ``y`` itself where none changes it."""
        stack = self.stacks.of(layer, part)
        return y_TO if stack is None else ops.stacked_linear_add(y_TO, x_TI, stack, self.owners)

    def of_experts(self, layer: int) -> MoEStacks:
        """What changes a layer's mixture of experts."""
        return MoEStacks(**{part: self.stacks.of(layer, part) for part in MoEStacks._fields})

    def head(self, logits_TV: Tensor, hidden_TD: Tensor) -> Tensor:
        """Scores with what each token's adapter adds to the head."""
        return self.add(-1, "head", logits_TV, hidden_TD)


def _places(model: nn.Module) -> dict[str, tuple[int, str, int]]:
    """Layer, part and first output of each module that may have an adapter, in the order of their outputs."""
    places = {HEAD: (-1, "head", 0)}
    for layer in range(len(model.get_submodule(LAYERS))):  # type: ignore[arg-type]
        for part, names in PARTS.items():
            first = 0
            for name in names:
                full = f"{LAYERS}.{layer}.{name}"
                places[full] = layer, part, first
                first += _sizes(model.get_submodule(full).weight)[1]  # type: ignore[arg-type]
    return places


def _sizes(weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of a linear's weight ``(out, in)`` or of grouped experts' ``(E, in, out)``."""
    return (weight.shape[1], weight.shape[0]) if weight.ndim == 2 else (weight.shape[1], weight.shape[2])


def _check(name: str, weight: Tensor, low_rank: LowRank) -> None:
    """A low-rank change fits a weight."""
    size, out = _sizes(weight)
    a, b = tuple(low_rank.a.shape), tuple(low_rank.b.shape)
    if weight.ndim == 2:
        fits = len(a) == len(b) == 2 and a[0] == b[1] and (a[1], b[0]) == (size, out)
        expected = f"(R, {size}) and ({out}, R)"
    else:
        E = weight.shape[0]
        fits = len(a) == len(b) == 3 and a[2] == b[1] and (a[0], a[1], b[0], b[2]) == (E, size, E, out)
        expected = f"({E}, {size}, R) and ({E}, R, {out})"
    if not fits or not all(torch.is_floating_point(x) for x in (low_rank.a, low_rank.b)):
        raise ValueError(f"the adapter of {name} has the shapes {a} and {b}; expected {expected}, as its weight is")
