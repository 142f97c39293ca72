"""Experts of a batch whose tokens have adapters of their own: the kernels of training, forward only, and a mask.

T tokens, D hidden, E experts, A experts per token, F expert width, P = T x A rows sorted by expert, R ranks of all
adapters together.
"""

from __future__ import annotations

from torch import Tensor

from aria.ops import operations
from aria.ops.kernels import swiglu
from aria.ops.kernels.lora_train import expand, gather, shrink
from aria.ops.kernels.moe_train import combine, product, sort
from aria.ops.multi_lora import MoEAdapters, mask_other_adapters
from aria.ops.registry import Where
from aria.ops.weights import ExpertWeights

MOST_RANKS = 64
"""Ranks of all adapters that a program of these products can hold; beyond, PyTorch's grouped products run."""


def fits(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, adapters: MoEAdapters
) -> bool:  # fmt: skip
    """Whether these kernels take LoRA weights of so many ranks."""
    return all(lora is None or len(lora.adapter_ids) <= MOST_RANKS for lora in (adapters.fc1, adapters.fc2))


def _graph_safe(x_TD: Tensor, experts: ExpertWeights, *_: object) -> bool:
    return not experts.products_wait(x_TD)


@operations.multi_lora_expert_mlp.register(Where.INFERENCE, fits=fits, graph_safe=_graph_safe)
def multi_lora_expert_mlp_prefill(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, adapters: MoEAdapters
) -> Tensor:
    """One pass sorts the rows and computes their products with ``a``; products with ``b`` are added in place."""
    fc1_EDF, fc2_EFD, *_ = experts
    fc1_lora, fc2_lora = adapters.fc1, adapters.fc2
    order = sort(index_TA, len(fc1_EDF))
    ends, ids_P = order.ends, adapters.adapter_ids.index_select(0, order.source)
    rows_PD, narrow_PR = gather(x_TD, None if fc1_lora is None else fc1_lora.a, ends=ends, source=order.source)
    gate_up = product(rows_PD, fc1_EDF, ends)
    if fc1_lora is not None and narrow_PR is not None:
        expand(gate_up, mask_other_adapters(narrow_PR, fc1_lora, ids_P), fc1_lora.b, ends=ends)
    gate_PF, up_PF = gate_up.chunk(2, dim=1)
    hidden_PF, _ = swiglu.forward(gate_PF, up_PF)
    y_PD = product(hidden_PF, fc2_EFD, ends)
    if fc2_lora is not None:
        narrow_PR = shrink(hidden_PF, fc2_lora.a, ends=ends)
        expand(y_PD, mask_other_adapters(narrow_PR, fc2_lora, ids_P), fc2_lora.b, ends=ends)
    return combine(y_PD, order.place, weights_TA.contiguous(), index_TA.shape[1])
