"""Experts in a step whose tokens have adapters of their own: the kernels of training, forward only, and a mask.

T tokens, D hidden, E experts, A experts per token, F expert width, P = T x A rows sorted by expert, R ranks of all
adapters together.
"""

from __future__ import annotations

from torch import Tensor

from aria.ops.kernels import swiglu
from aria.ops.kernels.lora_train import expand, gather, shrink
from aria.ops.kernels.moe_train import combine, product, sort
from aria.ops.multi_lora import MultiLoRA, mask_other_adapters

MOST_RANKS = 64
"""What a program of the thin products holds at a time; with more, PyTorch's grouped products do them."""


def fits(loras: tuple[MultiLoRA | None, MultiLoRA | None]) -> bool:
    """Whether :func:`multi_lora_expert_mlp` takes these adapters."""
    return all(lora is None or len(lora.adapter_ids) <= MOST_RANKS for lora in loras)


def multi_lora_expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    loras: tuple[MultiLoRA | None, MultiLoRA | None],
    adapter_ids_T: Tensor,
) -> Tensor:
    """See :func:`aria.ops.multi_lora.multi_lora_expert_mlp`: one pass sorts the rows and computes their products with
    ``a``; products with ``b`` are added in place."""
    fc1_lora, fc2_lora = loras
    order = sort(index_TA, len(fc1_EDF))
    ends, adapter_ids_P = order.ends, adapter_ids_T.index_select(0, order.source)
    rows_PD, thin_PR = gather(x_TD, None if fc1_lora is None else fc1_lora.a, ends=ends, source=order.source)
    gate_up = product(rows_PD, fc1_EDF, ends)
    if fc1_lora is not None and thin_PR is not None:
        expand(gate_up, mask_other_adapters(thin_PR, fc1_lora, adapter_ids_P), fc1_lora.b, ends=ends)
    gate_PF, up_PF = gate_up.chunk(2, dim=1)
    hidden_PF, _ = swiglu.forward(gate_PF, up_PF)
    y_PD = product(hidden_PF, fc2_EFD, ends)
    if fc2_lora is not None:
        expand(
            y_PD,
            mask_other_adapters(shrink(hidden_PF, fc2_lora.a, ends=ends), fc2_lora, adapter_ids_P),
            fc2_lora.b,
            ends=ends,
        )
    return combine(y_PD, order.place, weights_TA.contiguous(), index_TA.shape[1])
