"""Training losses: chunked cross-entropy over packed tokens, and the router's two auxiliary losses.

T tokens, D hidden, V classes or vocabulary, E experts, N packed sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
Z_COEFFICIENT = 1e-5
BALANCE_COEFFICIENT = 1e-4
"""Coefficients of all the authors' published recipes."""


class CrossEntropy(NamedTuple):
    """Result of :func:`linear_cross_entropy`; both are float32 scalars."""

    loss: Tensor
    accuracy: Tensor
    """Fraction of the labels, by weight, with the largest logit; carries no gradient."""


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    weights_T: Tensor | None = None,
    denominator: float | Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    chunk_elements: int = 2**25,
) -> CrossEntropy:
    """Cross-entropy of a linear head that never holds the logits of all tokens.

    Logits and their gradient are computed chunk by chunk, so memory is that of one chunk for any T x V. Gradients are
    computed only for inputs that require them.

    Args:
        hidden_TD: Inputs of the head, any float dtype; products run in it, the softmax in float32.
        weight_VD, bias_V: The head.
        labels_T: int64; ``IGNORE_INDEX`` leaves a token out.
        weights_T: float32 weight of each label; None means 1.
        denominator: Divisor of the weighted sum of losses; None means the sum of the weights, so that the loss is a
            mean (zero without labels). Parts of one batch with a common denominator add up to the loss of the batch.
        lora: ``(T, R)`` and ``(V, R)``, whose product is added to the logits: the LoRA of the head.
        chunk_elements: Logits held at a time.
    """
    if labels_T.shape != hidden_TD.shape[:1]:
        raise ValueError(f"labels {tuple(labels_T.shape)} do not fit hidden states {tuple(hidden_TD.shape)}")
    weights_T = (labels_T != IGNORE_INDEX).float() if weights_T is None else weights_T.masked_fill(labels_T < 0, 0.0)
    # In practice a sum below one is zero; the clamp keeps the loss of an empty batch at zero.
    weights_T = weights_T / (weights_T.sum().clamp(min=1e-6) if denominator is None else denominator)
    low_TR, low_VR = lora or (None, None)
    chunk = max(1, chunk_elements // weight_VD.shape[0])
    loss, accuracy = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, bias_V, low_TR, low_VR, labels_T.clamp(min=0), weights_T, chunk
    )
    return CrossEntropy(loss, accuracy)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward pass: softmax minus one-hot is available while a chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        low_TR: Tensor | None,
        low_VR: Tensor | None,
        labels_T: Tensor,
        weights_T: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        accuracy = torch.zeros_like(loss)
        inputs: Any = (hidden_TD, weight_VD, bias_V, low_TR, low_VR)
        needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad[:5], strict=True)]
        # Each row is written once, in its own dtype; sums over rows are in float32.
        grad_hidden, grad_low = (torch.empty_like(inputs[i]) if needed[i] else None for i in (0, 3))
        grad_weight, grad_bias, grad_low_weight = (
            torch.zeros_like(inputs[i], dtype=torch.float32) if needed[i] else None for i in (1, 2, 4)
        )
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden, labels, weights = hidden_TD[rows], labels_T[rows, None], weights_T[rows, None]
            # Memory-bound: as few passes over the logits as possible, each in the narrowest sufficient dtype.
            logits = torch.nn.functional.linear(hidden, weight_VD, bias_V)
            if low_TR is not None and low_VR is not None:
                logits.addmm_(low_TR[rows], low_VR.t())
            accuracy += ((logits.argmax(-1, keepdim=True) == labels) * weights).sum()
            log_shares = torch.log_softmax(logits, -1, dtype=torch.float32)
            loss -= (log_shares.gather(1, labels) * weights).sum()
            if not any(needed):
                continue
            excess = log_shares.exp_().scatter_add_(1, labels, -torch.ones_like(weights))
            grad = torch.mul(excess, weights, out=logits)
            if grad_hidden is not None:
                torch.mm(grad, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_low is not None and low_VR is not None:
                torch.mm(grad, low_VR, out=grad_low[rows])
            if grad_low_weight is not None and low_TR is not None:
                _add_product(grad_low_weight, grad.t(), low_TR[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_low, grad_low_weight)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer[0]
        grads = [
            None if grad is None else (grad * scale.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None)


def _add_product(sums: Tensor, x: Tensor, y: Tensor) -> None:
    """``sums += x @ y`` with ``sums`` in float32; on CUDA fused into the product, without rounding it."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.addmm(sums, x, y, out_dtype=torch.float32, out=sums)
    else:
        sums += x @ y


class RouterLosses(NamedTuple):
    """The auxiliary losses of one layer, coefficients included."""

    z: Tensor
    balance: Tensor
    load: Tensor
    """``(E,)``: fraction of the assignments that each expert took; carries no gradient."""


def router_losses(
    logits_TE: Tensor,
    top_k: int,
    *,
    z_coefficient: float = Z_COEFFICIENT,
    balance_coefficient: float = BALANCE_COEFFICIENT,
    balance_group: int = 1,
    counted_T: Tensor | None = None,
) -> RouterLosses:
    """z-loss and load-balance loss of one layer's router, as in the authors' code.

    z = c_z mean(logsumexp(logits)^2); balance = c_a G / (T k) sum_g(mean probability of g x assignments to g), where g
    is one of G groups of consecutive experts and probability is the softmax over all experts. A group is one expert in
    the authors' code and eight in the paper's pre-training (section 2.2). Perfect balance gives exactly c_a.
    Both in float32.

    Args:
        logits_TE: Logits of the router.
        top_k: Experts per token.
        z_coefficient, balance_coefficient: c_z and c_a.
        balance_group: Experts in a group; divides E.
        counted_T: bool, False on filler tokens.
    """
    logits_TE = logits_TE.float()
    T, E = logits_TE.shape
    if E % balance_group:
        raise ValueError(f"{E} experts do not divide into groups of {balance_group}; set balance_group to a divisor")
    counted_T = logits_TE.new_ones(T) if counted_T is None else counted_T.float()
    tokens = counted_T.sum().clamp(min=1.0)
    z = z_coefficient * (logits_TE.logsumexp(-1).square() * counted_T).sum() / tokens
    probability_E = (logits_TE.softmax(-1) * counted_T[:, None]).sum(0) / tokens
    chosen_TA = logits_TE.detach().topk(top_k, dim=-1).indices
    assigned_E = torch.zeros_like(probability_E).index_add_(
        0, chosen_TA.flatten(), counted_T.repeat_interleave(top_k, output_size=T * top_k)
    )
    load = (assigned_E / (tokens * top_k)).detach()
    probability_G, load_G = (x.unflatten(0, (-1, balance_group)).sum(1) for x in (probability_E, load))
    balance = balance_coefficient * (E // balance_group) * (probability_G * load_G).sum()
    return RouterLosses(z, balance, load)
