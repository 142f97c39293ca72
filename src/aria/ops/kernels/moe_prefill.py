"""The mixture of experts for many tokens: one pass through memory before the products and one after.

T tokens, D hidden, E experts, A experts per token, F expert width, W width of the shared experts,
P rows of the routed experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels.grouped_gemm import Tiles, grouped
from aria.ops.kernels.permute import combine, norm_route, permute, place
from aria.ops.kernels.shared_memory import HOPPER, shared_memory
from aria.ops.layout import adjacent, as_one
from aria.ops.multi_lora import MoEAdapters
from aria.ops.registry import Where
from aria.ops.weights import MoEWeights

# Up to 64 rows per expert, reading weights dominates: tiles have as few rows as the tensor cores allow, and go
# expert by expert, so that programs read adjacent weights at the same time. Above, multiplying dominates.
_LOW = Tiles(rows=64, columns=64, inputs=128, warps=4, stages=3, group=1)
_HIGH = Tiles(rows=128, columns=128, inputs=64, warps=8, stages=3, group=6)
# For GPUs with less shared memory per program than Hopper.
_LOW_SMALL = _LOW._replace(inputs=64)
_HIGH_SMALL = _HIGH._replace(columns=64)


def serves(weights: MoEWeights) -> bool:
    """Whether the kernels can use these weights: on Hopper or later, experts laid out ``[E, out, in]``, widths that the
    copy engine can step over."""
    fc1_EDF, fc2_EFD = weights.fc1, weights.fc2
    return (
        fc1_EDF.is_cuda
        and torch.cuda.get_device_capability(fc1_EDF.device) >= (9, 0)
        and _laid_out(fc1_EDF, fc2_EFD)
        and fc1_EDF.shape[1] % 16 == 0
        and fc2_EFD.shape[1] % 8 == 0
    )


def fits(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> bool:
    """Whether the kernels take these tokens: 16-bit numbers, no adapters."""
    return x_TD.dtype in (torch.bfloat16, torch.float16) and adapters is None


def _laid_out(*weights: Tensor) -> bool:
    return all(weight.transpose(1, 2).is_contiguous() for weight in weights)


@operations.moe_layer.register(Where.INFERENCE, serves=serves, fits=fits)
def moe_layer_prefill(x_TD: Tensor, weights: MoEWeights, adapters: MoEAdapters | None = None) -> Tensor:
    """Any number of tokens; nothing waits for the host."""
    assert adapters is None, "these kernels have no adapters"
    fc1_EDF, fc2_EFD, top_k = weights.fc1, weights.fc2, weights.top_k
    assert x_TD.is_contiguous(), "the tokens must be contiguous"
    assert _laid_out(fc1_EDF, fc2_EFD), "the experts' weights must be laid out [E, out, in]"
    low, high = (_LOW, _HIGH) if shared_memory(x_TD.device) >= HOPPER else (_LOW_SMALL, _HIGH_SMALL)
    tiles = low if x_TD.shape[0] * top_k <= 64 * fc1_EDF.shape[0] else high
    normed, weights_TA, index_TA, counts_NE = norm_route(x_TD, weights.norm, weights.eps, weights.router, top_k)
    position_TA, table = place(index_TA, counts_NE, tiles.rows)
    rows_PD = permute(normed, position_TA, (table.numel() - 1) * tiles.rows)
    y_PD = _experts(rows_PD, fc1_EDF, fc2_EFD, table, tiles)
    return combine(x_TD, _shared(normed, *weights.shared, tiles), y_PD, weights_TA, position_TA)


def _experts(rows_PD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, table: Tensor, tiles: Tiles) -> Tensor:
    """SwiGLU MLPs of the rows' experts; the result overwrites the rows."""
    E, D = fc1_EDF.shape[:2]
    gate_up, down = fc1_EDF.transpose(1, 2).view(E, 2, -1, D), fc2_EFD.transpose(1, 2).view(E, 2, D // 2, -1)
    hidden_PF = rows_PD.new_empty(rows_PD.shape[0], fc2_EFD.shape[1])
    grouped(rows_PD, gate_up, hidden_PF, table, swiglu=True, shape=tiles)
    return grouped(hidden_PF, down, rows_PD, table, swiglu=False, shape=tiles)


def _shared(x_TD: Tensor, gate_WD: Tensor, up_WD: Tensor, down_DW: Tensor, tiles: Tiles) -> Tensor:
    """The shared experts, which have all rows."""
    if not adjacent((gate_WD, up_WD)):
        return F.linear(F.silu(F.linear(x_TD, gate_WD)) * F.linear(x_TD, up_WD), down_DW)
    gate_up = as_one((gate_WD, up_WD)).view(1, 2, *gate_WD.shape)
    hidden_TW = x_TD.new_empty(x_TD.shape[0], gate_WD.shape[0])
    return F.linear(grouped(x_TD, gate_up, hidden_TW, None, swiglu=True, shape=tiles), down_DW)
