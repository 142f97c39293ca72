"""Expert parallelism: each rank computes some experts, for the tokens of all ranks.

A token is sent once to each rank that has any of its experts. That rank sums their weighted outputs and sends one row
back.

T tokens of this rank, S rows that it sends, N rows that arrive here, D hidden, E experts, A experts per token, R ranks
of the group.
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
from aria.ops import ExpertWeights, LoRA
from aria.ops.moe import copy_rows, sum_rows
from aria.train.shards import local


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep E / R of the experts, LoRA included, and send tokens to those on other ranks; in place.

    Args:
        experts: All experts, the same on every rank.
        mesh: One axis, the ranks of the group. R must divide E.
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
    fc1, fc2 = local(experts.fc1.weight), local(experts.fc2.weight)
    owned, ranks = len(fc1), group.size()
    chosen_TAR = (index_TA // owned)[:, :, None] == torch.arange(ranks, device=index_TA.device)
    wanted_TR = chosen_TAR.any(1)
    sent_R2 = torch.stack((wanted_TR.sum(0), chosen_TAR.sum((0, 1))), 1)
    arrived_R2 = _exchange(sent_R2, [1] * ranks, [1] * ranks, group)
    # One wait for the host, which must know how many rows arrive.
    (sends, _), (receives, present) = torch.stack((sent_R2.t(), arrived_R2.t())).tolist()

    source_S, place_TR = _rank_by_rank(wanted_TR, sum(sends))
    rows_ND = _Exchange.apply(copy_rows(x_TD, source_S, place_TR), sends, receives, group)
    weights_NA = _Exchange.apply(copy_rows(weights_TA, source_S, place_TR), sends, receives, group)
    index_NA = _exchange(index_TA[source_S], sends, receives, group) - group.rank() * owned
    index_NA = index_NA.where((index_NA >= 0) & (index_NA < owned), owned)
    out_ND = _own_experts(experts, fc1, fc2, rows_ND, weights_NA, index_NA, sum(present))
    return sum_rows(_Exchange.apply(out_ND, receives, sends, group), source_S, place_TR)


def _rank_by_rank(wanted_TR: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Order rows by the rank that they are sent to.

    Returns:
        int64 ``(S,)``: the token of each row that is sent; int64 ``(T, R)``: the places of each token's rows, S where
        a rank does not need the token.
    """
    T, R = wanted_TR.shape
    wanted = wanted_TR.t().flatten()
    place = (wanted.cumsum(0) - 1).where(wanted, rows)
    tokens = torch.arange(T, device=place.device).repeat(R)
    return place.new_empty(rows + 1).scatter_(0, place, tokens)[:rows], place.view(R, T).t()


def _own_experts(
    experts: Experts, fc1: Tensor, fc2: Tensor, rows_ND: Tensor, weights_NA: Tensor, index_NA: Tensor, present: int
) -> Tensor:
    nothing = not len(rows_ND)
    if nothing:
        # A row of zeros, so that weights get a gradient on this rank too: the other ranks wait for it.
        rows_ND, weights_NA, index_NA = (
            torch.cat((x, x.new_zeros(1, x.shape[1]))) for x in (rows_ND, weights_NA, index_NA)
        )
        present = index_NA.numel()
    own = ExpertWeights(fc1, fc2, _lora(experts.fc1), _lora(experts.fc2))
    out_ND = ops.expert_mlp(rows_ND, own, weights_NA, index_NA, present=present)
    return out_ND[:0] if nothing else out_ND


def _lora(linear: GroupedLinear) -> LoRA | None:
    adapter = linear.lora()
    return None if adapter is None else adapter._replace(a=local(adapter.a), b=local(adapter.b))


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, ``sends`` rows to each rank; gradients go back the same way."""

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
