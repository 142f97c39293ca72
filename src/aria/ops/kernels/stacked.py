"""Experts in a step whose tokens have adapters of their own: the kernels of training, forward only, and a mask.

T tokens, D hidden, E experts, A experts per token, F expert width, P = T x A rows sorted by expert, R ranks of all
adapters together.
"""

from __future__ import annotations

from torch import Tensor

from aria.ops.kernels import swiglu
from aria.ops.kernels.experts import combine, product, sort
from aria.ops.kernels.low_rank import expand, gather, shrink
from aria.ops.stacked import Stack, own_ranks

MOST_RANKS = 64
"""What a program of the thin products holds at a time; with more, PyTorch's grouped products do them."""


def fits(stacks: tuple[Stack | None, Stack | None]) -> bool:
    """Whether :func:`stacked_expert_mlp` takes these adapters."""
    return all(stack is None or len(stack.owners) <= MOST_RANKS for stack in stacks)


def stacked_expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    stacks: tuple[Stack | None, Stack | None],
    owners_T: Tensor,
) -> Tensor:
    """See :func:`aria.ops.stacked.stacked_expert_mlp`: rows are sorted and thinned in one pass, and what adapters add
    goes to the products in their place."""
    fc1_stack, fc2_stack = stacks
    order = sort(index_TA, len(fc1_EDF))
    ends, owners_P = order.ends, owners_T.index_select(0, order.source)
    rows_PD, thin_PR = gather(x_TD, None if fc1_stack is None else fc1_stack.a, ends=ends, source=order.source)
    gate_up = product(rows_PD, fc1_EDF, ends)
    if fc1_stack is not None and thin_PR is not None:
        expand(gate_up, own_ranks(thin_PR, fc1_stack, owners_P), fc1_stack.b, ends=ends)
    gate_PF, up_PF = gate_up.chunk(2, dim=1)
    hidden_PF, _ = swiglu.forward(gate_PF, up_PF)
    y_PD = product(hidden_PF, fc2_EFD, ends)
    if fc2_stack is not None:
        expand(y_PD, own_ranks(shrink(hidden_PF, fc2_stack.a, ends=ends), fc2_stack, owners_P), fc2_stack.b, ends=ends)
    return combine(y_PD, order.place, weights_TA.contiguous(), index_TA.shape[1])
