"""Routed experts with gradients: products by PyTorch's grouped kernels, one pass through memory between them.

Saved for the backward pass are the tokens, the routing, the first product and the LoRA products with ``a``. What is
cheap is recomputed: rows by expert and SwiGLU's result. The gradient of a routing weight is a row of the output times
the output's gradient; the output is linear in SwiGLU's result, so that product is computed there, and no output is
saved.

T tokens, D hidden, E experts, A experts per token, F expert width, P = T x A rows sorted by expert, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aria.ops import operations
from aria.ops.kernels import lora_train, swiglu
from aria.ops.kernels.lora_train import NONE, Noise, expand, gather
from aria.ops.lora import LoRA
from aria.ops.registry import Where
from aria.ops.weights import ExpertWeights


@triton.jit(do_not_specialize=["P"])
def _combine(
    y_ptr, weights_ptr, place_ptr, out_ptr, P, D: tl.constexpr, A: tl.constexpr, D_BLOCK: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    out = tl.zeros((D_BLOCK,), tl.float32)
    for i in tl.static_range(A):
        row = tl.load(place_ptr + t * A + i).to(tl.int64)
        y = tl.load(y_ptr + row * D + d, mask=(d < D) & (row < P), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + t * A + i).to(tl.float32)
        out += y
    tl.store(out_ptr + t * D + d, out, mask=d < D)


def combine(y_PD: Tensor, place: Tensor, weights_TA: Tensor | None, top_k: int) -> Tensor:
    """Sum of each token's rows, weighted or not: ``(T, D)``, in float32 in the order of the choices.

    Places of P or above have no row.
    """
    (P, D), T = y_PD.shape, len(place) // top_k
    assert y_PD.is_contiguous() and (weights_TA is None or weights_TA.is_contiguous()), "rows must be contiguous"
    out = y_PD.new_empty(T, D)
    if T:
        _combine[(T,)](y_PD, weights_TA, place, out, P, D, top_k, D_BLOCK=triton.next_power_of_2(D), num_warps=4)
    return out


class Order(NamedTuple):
    """Rows sorted by expert, then by token. Choices of experts on other ranks have no row."""

    source: Tensor
    """int32: each row's token."""
    order: Tensor
    """int64: each row's place among ``(T, A)``."""
    place: Tensor
    """int32: the row of each place among ``(T, A)``; P or above where it has none."""
    ends: Tensor
    """int32: where each expert's rows end."""


def sort(index_TA: Tensor, experts: int, present: int | None = None) -> Order:
    """Sort by expert, without the host. With one-byte keys the radix sort needs a single pass."""
    dtype = torch.uint8 if experts < 256 else torch.int32  # `experts` itself may be among the keys
    keys, order = index_TA.flatten().to(dtype).sort(stable=True)
    rows = torch.arange(len(order), dtype=torch.int32, device=order.device)
    place = torch.empty_like(rows).scatter_(0, order, rows)
    numbers = torch.arange(experts, dtype=dtype, device=order.device)
    ends = torch.searchsorted(keys, numbers, right=True, out_int32=True)
    order = order[:present]
    return Order((order // index_TA.shape[1]).int(), order, place, ends)


def product(x_PI: Tensor, weight_EIO: Tensor, ends: Tensor) -> Tensor:
    """Rows times their experts' matrices, ``(P, O)``."""
    if _grouped(x_PI, *weight_EIO.shape[1:]):
        return F.grouped_mm(x_PI, weight_EIO, offs=ends)
    pieces = [x @ weight for x, weight in zip(_split(x_PI, ends), weight_EIO, strict=True)]
    return torch.cat(pieces)


def outer(x_PI: Tensor, y_PO: Tensor, ends: Tensor) -> Tensor:
    """Sum over each expert's rows of ``x^T y``: ``(E, I, O)``."""
    if _grouped(x_PI, x_PI.shape[1], y_PO.shape[1]):
        return F.grouped_mm(x_PI.t(), y_PO, offs=ends)
    pieces = zip(_split(x_PI, ends), _split(y_PO, ends), strict=True)
    return torch.stack([x.t() @ y for x, y in pieces])


def _grouped(x: Tensor, *sizes: int) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and all(n % 8 == 0 for n in sizes)


def _split(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())


def fits(x_TD: Tensor, experts: ExpertWeights, *_: object, **__: object) -> bool:
    """Whether these kernels take the LoRA weights of the experts: their ranks fit into shared memory."""
    return fits_ranks(x_TD, experts.fc1_lora, experts.fc2_lora)


def fits_ranks(x: Tensor, *loras: LoRA | None) -> bool:
    """Whether the ranks of LoRA weights fit into shared memory."""
    ranks = [(lora.a.shape[-1], lora.a.element_size()) for lora in loras if lora is not None]
    if not ranks:
        return True
    rank, size = (max(values) for values in zip(*ranks, strict=True))
    sizes = rank, x.element_size(), size, x.device
    loops = swiglu.loop_of(*sizes, False), swiglu.loop_of(*sizes, True)
    return all(loop is not None for loop in loops) and lora_train.fits(*sizes)


class _Adapters(NamedTuple):
    """Scalars of both LoRA weights; neutral values where there are none."""

    scaling: tuple[float, float]
    noise: tuple[Noise, Noise]


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        weights: Tensor,
        index: Tensor,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        adapters: _Adapters,
        present: int | None,
    ) -> Tensor:
        order = sort(index, len(fc1), present)
        ends = order.ends
        rows, h1 = gather(x, a1, adapters.scaling[0], adapters.noise[0], ends=ends, source=order.source)
        gate_up = product(rows, fc1, ends)
        del rows
        sides = swiglu.Sides(h1, b1, a2, adapters.scaling, adapters.noise[1])
        gate, up = gate_up.chunk(2, dim=1)
        hidden, h2 = swiglu.forward(gate, up, sides, ends)
        y = product(hidden, fc2, ends)
        if b2 is not None:
            expand(y, h2, b2, ends=ends)
        ctx.save_for_backward(x, fc1, fc2, weights, gate_up, h1, h2, a1, b1, a2, b2, *order)
        ctx.adapters = adapters
        return combine(y, order.place, weights, index.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, fc1, fc2, weights, gate_up, h1, h2, a1, b1, a2, b2, *rest = ctx.saved_tensors
        order, adapters = Order(*rest), ctx.adapters
        needs_x, needs_fc1, needs_fc2, needs_weights, _, needs_a1, needs_b1, needs_a2, needs_b2, *_ = (
            ctx.needs_input_grad
        )
        ends, source, top_k = order.ends, order.source, weights.shape[1]
        weights_P = weights.flatten()[order.order]

        # The second product and its LoRA weights. Routing weights are applied with SwiGLU's gradient.
        narrow = None if b2 is None else b2.mT
        dy, dh2 = gather(grads[0].contiguous(), narrow, adapters.scaling[1], ends=ends, source=source)
        dhidden = product(dy, fc2.mT, ends)
        sides = swiglu.Sides(h1, b1, a2, adapters.scaling, adapters.noise[1])
        gate, up = gate_up.chunk(2, dim=1)
        found = swiglu.backward(
            gate, up, dhidden, sides, ends, grad_thin_PR=dh2, weights_P=weights_P, out=needs_fc2,
            dropped=needs_a2,
        )  # fmt: skip
        del dhidden
        dfc2 = _outer_if(needs_fc2, found.out, dy, ends)
        da2 = _outer_if(needs_a2, found.dropped, dh2, ends)
        db2 = outer(h2 * weights_P[:, None], dy, ends) if needs_b2 else None
        del dy
        assert found.weights is not None, "the gradients of the weights are needed"
        dweights = torch.zeros_like(weights) if needs_weights else None
        if dweights is not None:
            dweights.view(-1).scatter_(0, order.order, found.weights.to(weights.dtype))

        # The first product and its LoRA weights.
        dgate_up, dh1 = found.gate_up, found.thin
        del found
        db1 = _outer_if(needs_b1, h1, dgate_up, ends)
        dfc1 = da1 = dx = None
        if needs_fc1:
            dfc1 = outer(gather(x, source=source, ends=ends)[0], dgate_up, ends)
        if needs_a1:
            dropped, _ = gather(x, noise=adapters.noise[0], source=source, ends=ends, dropped=True)
            da1 = _outer_if(True, dropped, dh1, ends)
            del dropped
        if needs_x:
            drows = product(dgate_up, fc1.mT, ends)
            if dh1 is not None:
                expand(drows, dh1, a1.mT, adapters.noise[0], ends=ends)
            dx = combine(drows, order.place, None, top_k)
        return dx, dfc1, dfc2, dweights, None, da1, db1, da2, db2, None, None


def _outer_if(wanted: bool, x: Tensor | None, y: Tensor | None, ends: Tensor) -> Tensor | None:
    if not wanted:
        return None
    assert x is not None and y is not None, "a gradient needs both of its sides"
    return outer(x, y, ends)


@operations.expert_mlp.register(Where.TRAINING, fits=fits)
def expert_mlp_train(
    x_TD: Tensor, experts: ExpertWeights, weights_TA: Tensor, index_TA: Tensor, *, present: int | None = None
) -> Tensor:
    """With gradients. With PyTorch's grouped products nothing waits for the host."""
    fc1_EDF, fc2_EFD, fc1_lora, fc2_lora = experts
    both = fc1_lora, fc2_lora
    rank = max((lora.a.shape[-1] for lora in both if lora is not None), default=0)
    rank = -(-rank // 8) * 8  # grouped products step over 16 bytes at a time
    a1, b1 = _matrices(fc1_lora, rank)
    a2, b2 = _matrices(fc2_lora, rank)
    scaling_1, scaling_2 = (1.0 if lora is None else lora.scaling for lora in both)
    noise_1, noise_2 = (NONE if lora is None else Noise(lora.dropout) for lora in both)
    adapters = _Adapters((scaling_1, scaling_2), (noise_1, noise_2))
    return _ExpertMLP.apply(
        x_TD, fc1_EDF, fc2_EFD, weights_TA.contiguous(), index_TA, a1, b1, a2, b2, adapters, present
    )  # fmt: skip


def _matrices(lora: LoRA | None, rank: int) -> tuple[Tensor | None, Tensor | None]:
    """The two matrices, contiguous and padded to ``rank`` with zeros."""
    if lora is None:
        return None, None
    a, b = lora.a, lora.b
    if more := rank - a.shape[-1]:
        a, b = F.pad(a, (0, more)), F.pad(b, (0, 0, 0, more))
    return a.contiguous(), b.contiguous()
