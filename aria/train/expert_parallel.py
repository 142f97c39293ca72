"""Experts spread over ranks: each computes some, for the tokens of all.

T tokens of this rank, N rows that arrive here, D hidden, E experts, A experts per token, R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from aria import ops
from aria.model.moe import Experts, GroupedLinear
from aria.ops import LowRank
from aria.train.shards import local


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep E / R of the experts, adapters included, and send tokens to those of others; in place.

    Args:
        experts: all of them, the same on every rank.
        mesh: one axis, the ranks of the group. E has to divide by R.
    """
    here, ranks = mesh.get_local_rank(), mesh.size()
    for module in experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = parameter.data.chunk(ranks)[here].clone()
            spread = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))
    group = mesh.get_group()

    def forward(x_TD: Tensor, weights_TA: Tensor, index_TA: Tensor) -> Tensor:
        return _expert_mlp(experts, group, x_TD, weights_TA, index_TA)

    experts.forward = forward  # type: ignore[method-assign]


def _expert_mlp(
    experts: Experts, group: dist.ProcessGroup, x_TD: Tensor, weights_TA: Tensor, index_TA: Tensor
) -> Tensor:
    """:func:`aria.ops.expert_mlp` over experts of all ranks of a group."""
    T, A = index_TA.shape
    fc1, fc2 = local(experts.fc1.weight), local(experts.fc2.weight)
    owned, ranks = len(fc1), group.size()
    order = index_TA.flatten().argsort(stable=True)
    sent, arrived = _counts(index_TA, ranks, owned, group)
    # One wait for the host: it has to know how much memory arriving rows take.
    sends, receives = torch.stack((sent.sum(1), arrived.sum(1))).tolist()
    rows_ND = _Exchange.apply(x_TD[order // A], sends, receives, group)
    mine = torch.arange(owned, device=x_TD.device).repeat(ranks)
    index_N = mine.repeat_interleave(arrived.flatten(), output_size=sum(receives))
    out_ND = _own_experts(experts, fc1, fc2, rows_ND, index_N)
    back = _Exchange.apply(out_ND, receives, sends, group)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (back[place].view(T, A, -1) * weights_TA[:, :, None].to(back.dtype)).sum(1)


def _counts(index_TA: Tensor, ranks: int, owned: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """int64 ``(R, E / R)`` each: rows that go to every rank's experts, and that arrive from every rank for the own."""
    flat = index_TA.flatten()
    sent = torch.zeros(ranks * owned, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return sent.view(ranks, owned), arrived.view(ranks, owned)


def _own_experts(experts: Experts, fc1: Tensor, fc2: Tensor, rows_ND: Tensor, index_N: Tensor) -> Tensor:
    nothing = not len(rows_ND)
    if nothing:
        # A row of zeros, so that weights have a gradient here too: the other ranks wait for it.
        rows_ND, index_N = torch.cat((rows_ND, rows_ND.new_zeros(1, rows_ND.shape[1]))), index_N.new_zeros(1)
    ones = rows_ND.new_ones(len(rows_ND), 1)
    adapters = {"fc1_adapter": _low_rank(experts.fc1), "fc2_adapter": _low_rank(experts.fc2)}
    out_ND = ops.expert_mlp(rows_ND, fc1, fc2, ones, index_N[:, None], **adapters)
    return out_ND[:0] if nothing else out_ND


def _low_rank(linear: GroupedLinear) -> LowRank | None:
    adapter = linear.low_rank()
    return None if adapter is None else adapter._replace(a=local(adapter.a), b=local(adapter.b))


class _Exchange(torch.autograd.Function):
    """Rows to the ranks of a group, as many to each as ``sends`` says; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _exchange(rows, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.receives, ctx.sends, ctx.group), None, None, None


def _exchange(rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=group)
    return out
