"""LoRA weights of several adapters beside one base model, for batches in which each token has its own adapter, or none.

T tokens, D hidden, E experts, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from aria import ops
from aria.ops import LoRA, MoEAdapters, MultiLoRA
from aria.ops.lora import check_lora

LAYERS = "language_model.model.layers"
HEAD = "language_model.lm_head"

# Modules that read the same input are one product: a part of the layer.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "fc1": ("mlp.experts.fc1",),
    "fc2": ("mlp.experts.fc2",),
    "gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "down": ("mlp.shared_experts.down_proj",),
}
EXPERT_PARTS = MoEAdapters._fields[1:]
"""Parts of the mixture of experts."""


class MultiLoRAWeights:
    """LoRA weights of several adapters for a decoder and its head, stacked by part; the base model is not changed.

    Args:
        model: An :class:`~aria.model.Aria`, whose dtype and device the LoRA weights get.
        adapters: LoRA weights of each adapter by names of modules; the first adapter has the id 1.

    Raises:
        ValueError: A name is not a linear layer or grouped expert of the decoder, or a shape does not fit its weight.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Mapping[str, LoRA]]):
        places = _places(model)
        modules = dict(model.named_modules())
        parts: dict[tuple[int, str], list[tuple[int, int, LoRA]]] = {}
        for adapter_id, changes in enumerate(adapters, 1):
            for name, lora in changes.items():
                if name not in places:
                    raise ValueError(f"an adapter changes {name!r:.200}, which is no linear or expert of the decoder")
                check_lora(name, lora.a, lora.b, modules[name].weight.shape)
                layer, part, first = places[name]
                parts.setdefault((layer, part), []).append((adapter_id, first, lora))
        self._loras: dict[tuple[int, str], MultiLoRA] = {}
        for (layer, part), found in parts.items():
            weights = [modules[name].weight for name, place in places.items() if place[:2] == (layer, part)]
            outputs = sum(_sizes(weight)[1] for weight in weights)
            self._loras[layer, part] = ops.stack_loras(found, outputs, weights[0])

    def __len__(self) -> int:
        return len(self._loras)

    @property
    def nbytes(self) -> int:
        """Memory of all LoRA weights."""
        return sum(tensor.nbytes for lora in self._loras.values() for tensor in lora)

    @property
    def on_experts(self) -> bool:
        """Whether any layer's experts have LoRA weights, which fused kernels take up to some ranks and tokens."""
        return any(part in EXPERT_PARTS for _, part in self._loras)

    def of(self, layer: int, part: str) -> MultiLoRA | None:
        """LoRA weights of a part of a layer, or of the head, ``(-1, "head")``; None if no adapter has any."""
        return self._loras.get((layer, part))


@dataclass(frozen=True)
class AdapterBatch:
    """LoRA weights of all adapters, and the adapter of each token of a step."""

    loras: MultiLoRAWeights
    adapter_ids: Tensor
    """int32 ``(T,)``: each token's adapter id; 0 is the base model."""

    def at(self, places: Tensor) -> AdapterBatch:
        """The batch of some of the tokens."""
        return replace(self, adapter_ids=self.adapter_ids.index_select(0, places))

    def add(self, layer: int, part: str, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        """``y`` plus each token's LoRA term of this part for the input ``x``; ``y`` itself if there is none."""
        lora = self.loras.of(layer, part)
        return y_TO if lora is None else ops.multi_lora_linear_add(y_TO, x_TI, lora, self.adapter_ids)

    def of_experts(self, layer: int) -> MoEAdapters | None:
        """LoRA weights of a layer's mixture of experts; None if it has none."""
        loras = {part: self.loras.of(layer, part) for part in EXPERT_PARTS}
        return MoEAdapters(self.adapter_ids, **loras) if any(loras.values()) else None

    def head(self, logits_TV: Tensor, hidden_TD: Tensor) -> Tensor:
        """Logits plus each token's LoRA term of the head."""
        return self.add(-1, "head", logits_TV, hidden_TD)


def _places(model: nn.Module) -> dict[str, tuple[int, str, int]]:
    """Layer, part and first output of each module that may have LoRA weights, in the order of their outputs."""
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
    """Inputs and outputs of a linear layer's weight ``(out, in)`` or of grouped experts' ``(E, in, out)``."""
    return (weight.shape[1], weight.shape[0]) if weight.ndim == 2 else (weight.shape[1], weight.shape[2])
