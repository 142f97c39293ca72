"""The operations everyone calls. Each picks its implementation by device and dtype.

``with ops.use("reference"):`` forces the plain-PyTorch twins of :mod:`aria.ops.reference`, to check or to debug. Triton
kernels are in :mod:`aria.ops.kernels`; they are imported when first needed, and run on CUDA: some for inference, others
with gradients. What PyTorch's compiler traces is plain PyTorch, which it fuses itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aria import private_api
from aria.ops import attention as _attention
from aria.ops import moe as _moe
from aria.ops import multi_lora as _multi_lora
from aria.ops import reference
from aria.ops import resize as _resize
from aria.ops import sampling as _sampling
from aria.ops.device import current, has_kernels, on_own_device
from aria.ops.layout import adjacent, as_one
from aria.ops.lora import LoRA
from aria.ops.multi_lora import MoEMultiLoRA, MultiLoRA, multi_lora_is_graph_safe, stack_loras
from aria.ops.reference import rope_angles, rotary_table, swiglu
from aria.ops.segments import Segments

__all__ = [
    "LoRA",
    "MoEMultiLoRA",
    "MultiLoRA",
    "Segments",
    "adjacent",
    "as_one",
    "attention",
    "chunks_are_graph_safe",
    "chunks_attention",
    "current",
    "decode_attention",
    "expert_mlp",
    "gated",
    "has_kernels",
    "inference_kernels",
    "layer_norm",
    "linear",
    "linear_add",
    "linear_gelu",
    "lora_linear",
    "lora_linears",
    "moe_is_graph_safe",
    "moe_layer",
    "multi_lora_expert_mlp",
    "multi_lora_is_graph_safe",
    "multi_lora_linear_add",
    "multi_lora_moe_layer",
    "norm_linear",
    "on_own_device",
    "paged_attention",
    "paged_kernel",
    "plan_chunks",
    "resample",
    "rms_norm",
    "rope_angles",
    "rotary",
    "rotary_table",
    "rotate_and_cache",
    "route",
    "sample",
    "stack_loras",
    "swiglu",
    "training_kernels",
    "use",
]

_FEW_EXPERTS = 256
"""Tokens up to which experts are better read as weights than multiplied as tiles (docs/kernels.md)."""

_FEW_ADAPTED = 64
"""Tokens up to which adapters beside a linear have kernels of their own (docs/kernels.md)."""

_IMPLEMENTATIONS = ("fast", "reference")
_implementation: ContextVar[str] = ContextVar("implementation", default="fast")


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run the block on one implementation: ``"fast"`` (the default everywhere) or ``"reference"``."""
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {', '.join(_IMPLEMENTATIONS)}")
    token = _implementation.set(implementation)
    try:
        yield
    finally:
        _implementation.reset(token)


def _use_reference() -> bool:
    # The compiler cannot trace a context variable, and what it compiles is meant to be fast.
    return not torch.compiler.is_compiling() and _implementation.get() == "reference"


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"aria.ops.kernels.{name}")


def inference_kernels(x: Tensor) -> bool:
    """Whether ``x`` is worked on by the kernels of inference: on a GPU that runs them, and no gradients."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not torch.is_grad_enabled()
        and not _use_reference()
        and has_kernels(x.device)
    )


def training_kernels(x: Tensor) -> bool:
    """Whether ``x`` is worked on by the kernels with gradients: on a GPU that runs them, and not compiled."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not _use_reference()
        and has_kernels(x.device)
    )


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """Attention within each segment; see :func:`aria.ops.reference.attention`."""
    chosen = reference if _use_reference() else _attention
    return chosen.attention(q_THK, k_SHK, v_SHK, queries, keys, causal=causal)


def expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    *,
    fc1_lora: LoRA | None = None,
    fc2_lora: LoRA | None = None,
    present: int | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts; see :func:`aria.ops.reference.expert_mlp`."""
    plain = reference if _use_reference() else _moe
    fast = training_kernels(x_TD) and _kernels("moe_train").fits(x_TD, fc1_lora, fc2_lora)
    chosen = _kernels("moe_train") if fast else plain
    return chosen.expert_mlp(
        x_TD, fc1_EDF, fc2_EFD, weights_TA, index_TA, fc1_lora=fc1_lora, fc2_lora=fc2_lora, present=present
    )


def lora_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, adapter: LoRA) -> Tensor:
    """A linear layer and its low-rank adapter; see :func:`aria.ops.reference.lora_linear`."""
    fast = training_kernels(x_TI) and x_TI.ndim == 2 and _kernels("lora_train").fits_linears(x_TI, [adapter])
    chosen = _kernels("lora_train") if fast else reference
    return chosen.lora_linear(x_TI, weight_OI, bias_O, adapter)


def lora_linears(
    x_TI: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], adapters: Sequence[LoRA]
) -> tuple[Tensor, ...]:
    """Linear layers of one input and their adapters; see :func:`aria.ops.reference.lora_linears`."""
    fast = training_kernels(x_TI) and x_TI.ndim == 2 and _kernels("lora_train").fits_linears(x_TI, adapters)
    chosen = _kernels("lora_train") if fast else reference
    return chosen.lora_linears(x_TI, layers, adapters)


def gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """SwiGLU's middle; see :func:`aria.ops.reference.gated`."""
    return (_kernels("swiglu") if training_kernels(gate_TF) else reference).gated(gate_TF, up_TF)


def rotary(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn heads by their token's angles; see :func:`aria.ops.reference.rotary`."""
    return (_kernels("pointwise") if training_kernels(x_THK) else reference).rotary(x_THK, cos_TK, sin_TK)


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choice and weights of experts; see :func:`aria.ops.reference.route`."""
    if training_kernels(logits_TE):
        return _kernels("pointwise").route(logits_TE, top_k)
    return (_kernels("permute") if inference_kernels(logits_TE) else reference).route(logits_TE, top_k)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm; see :func:`aria.ops.reference.rms_norm`."""
    if training_kernels(x_TD):
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)  # PyTorch's own, one pass each way
    return (_kernels("norm") if inference_kernels(x_TD) else reference).rms_norm(x_TD, weight_D, eps)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, shift_D: Tensor | None = None) -> Tensor:
    """LayerNorm; see :func:`aria.ops.reference.layer_norm`."""
    chosen = _kernels("norm_vision") if inference_kernels(x_TD) else reference
    return chosen.layer_norm(x_TD, weight_D, bias_D, eps, shift_D)


def linear_gelu(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """Linear and GELU; see :func:`aria.ops.reference.linear_gelu`."""
    if inference_kernels(x_TI):
        return private_api.addmm_activation(bias_O, x_TI, weight_OI.t(), use_gelu=True)
    return reference.linear_gelu(x_TI, weight_OI, bias_O)


def norm_linear(x_TD: Tensor, norm_D: Tensor, eps: float, *weights_OD: Tensor) -> Tensor:
    """RMSNorm, then linears side by side; see :func:`aria.ops.reference.norm_linear`."""
    if inference_kernels(x_TD):
        gemv = _kernels("gemv")
        if gemv.fits_linear(x_TD, *weights_OD):
            return gemv.norm_linear(x_TD, norm_D, eps, *weights_OD)
        if adjacent(weights_OD):
            return F.linear(rms_norm(x_TD, norm_D, eps), as_one(weights_OD))
    return reference.norm_linear(x_TD, norm_D, eps, *weights_OD)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Linear without bias; see :func:`aria.ops.reference.linear`."""
    if inference_kernels(x_TI) and _kernels("gemv").fits_linear(x_TI, weight_OI):
        return _kernels("gemv").linear(x_TI, weight_OI)
    return reference.linear(x_TI, weight_OI)


def linear_add(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor) -> Tensor:
    """Residual + linear; see :func:`aria.ops.reference.linear_add`."""
    if inference_kernels(x_TI):
        gemv = _kernels("gemv")
        if gemv.fits_linear(x_TI, weight_OI):
            return gemv.linear_add(x_TI, weight_OI, residual_TO)
        return torch.addmm(residual_TO, x_TI, weight_OI.t())
    return reference.linear_add(x_TI, weight_OI, residual_TO)


def moe_layer(
    x_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    router_ED: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    top_k: int,
) -> Tensor:
    """The second half of a decoder layer; see :func:`aria.ops.reference.moe_layer`."""
    chosen = _moe_module(x_TD, fc1_EDF, fc2_EFD, shared)
    return chosen.moe_layer(x_TD, norm_D, eps, router_ED, fc1_EDF, fc2_EFD, shared, top_k)


def _moe_module(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, shared: tuple[Tensor, Tensor, Tensor]) -> Any:
    if inference_kernels(x_TD):
        few, many = _kernels("moe_decode"), _kernels("moe_prefill")
        if len(x_TD) <= _FEW_EXPERTS and few.fits_moe(x_TD, fc1_EDF, fc2_EFD, shared):
            return few
        if many.fits(x_TD, fc1_EDF, fc2_EFD):
            return many
    return reference if _use_reference() else _moe


def multi_lora_linear_add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA, adapter_ids_T: Tensor) -> Tensor:
    """What each token's adapter adds to a linear; see :func:`aria.ops.multi_lora.multi_lora_linear_add`."""
    few = inference_kernels(x_TI) and len(x_TI) <= _FEW_ADAPTED and x_TI.is_contiguous() and y_TO.is_contiguous()
    if few and _kernels("multi_lora_decode").fits(lora):
        return _kernels("multi_lora_decode").linear_add(y_TO, x_TI, lora, adapter_ids_T)
    return _multi_lora.multi_lora_linear_add(y_TO, x_TI, lora, adapter_ids_T)


def multi_lora_expert_mlp(
    x_TD: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    weights_TA: Tensor,
    index_TA: Tensor,
    loras: tuple[MultiLoRA | None, MultiLoRA | None],
    adapter_ids_T: Tensor,
) -> Tensor:
    """Experts in which each token has its own adapters; see :func:`aria.ops.multi_lora.multi_lora_expert_mlp`."""
    fast = inference_kernels(x_TD) and _kernels("multi_lora_prefill").fits(loras)
    chosen = _kernels("multi_lora_prefill") if fast else _multi_lora
    return chosen.multi_lora_expert_mlp(x_TD, fc1_EDF, fc2_EFD, weights_TA, index_TA, loras, adapter_ids_T)


def multi_lora_moe_layer(
    x_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    router_ED: Tensor,
    fc1_EDF: Tensor,
    fc2_EFD: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    top_k: int,
    loras: MoEMultiLoRA,
    adapter_ids_T: Tensor,
) -> Tensor:
    """:func:`moe_layer` in which each token has its own adapters.

    Args:
        loras: the adapters of the layer's experts.
        adapter_ids_T: int32, whose token this is; 0 is nobody's.
    """
    if inference_kernels(x_TD) and len(x_TD) <= _FEW_EXPERTS:
        few = _kernels("moe_decode")
        if few.fits_moe(x_TD, fc1_EDF, fc2_EFD, shared) and _kernels("multi_lora_decode").fits(*loras):
            return few.moe_layer(x_TD, norm_D, eps, router_ED, fc1_EDF, fc2_EFD, shared, top_k, loras, adapter_ids_T)

    def add(y_TO: Tensor, x_TI: Tensor, lora: MultiLoRA | None) -> Tensor:
        return y_TO if lora is None else multi_lora_linear_add(y_TO, x_TI, lora, adapter_ids_T)

    gate, up, down = shared
    normed = rms_norm(x_TD, norm_D, eps)
    weights, index = route(F.linear(normed, router_ED), top_k)
    routed = multi_lora_expert_mlp(normed, fc1_EDF, fc2_EFD, weights, index, (loras.fc1, loras.fc2), adapter_ids_T)
    gate_up = torch.cat((F.linear(normed, gate), F.linear(normed, up)), dim=-1)
    hidden = swiglu(add(gate_up, normed, loras.gate_up))
    return x_TD + add(routed + F.linear(hidden, down), hidden, loras.down)


def moe_is_graph_safe(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, shared: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether :func:`moe_layer` of so many tokens can be part of a CUDA graph: where no kernel fits, it may wait."""
    return _moe_module(x_TD, fc1_EDF, fc2_EFD, shared) is not _moe or not _moe.waits(x_TD, fc1_EDF, fc2_EFD)


def chunks_are_graph_safe(q_THK: Tensor, keys_BHSK: Tensor) -> bool:
    """Whether :func:`chunks_attention` heeds ``spans_N3``: where its kernel does not fit, pasts are the host's."""
    return inference_kernels(q_THK) and _kernels("chunk_attention").fits(q_THK, keys_BHSK)


def plan_chunks(keys_BHSK: Tensor, heads: int, chunk: int, longest: int) -> None:
    """See :func:`aria.ops.kernels.chunk_attention.plan`; where its kernel fits."""
    _kernels("chunk_attention").plan(keys_BHSK, heads, chunk, longest)


def rotate_and_cache(q_THK: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions and the write to the paged cache; see :func:`aria.ops.reference.rotate_and_cache`."""
    fast = inference_kernels(q_THK) and _kernels("rotary").fits(q_THK)
    return (_kernels("rotary") if fast else reference).rotate_and_cache(q_THK, *arguments)


def paged_attention(
    q_NHK: Tensor,
    keys_BHSK: Tensor,
    values_BHSK: Tensor,
    blocks_NM: Tensor,
    lengths_N: Tensor,
    arrivals: Tensor | None = None,
) -> Tensor:
    """One query of each sequence over a paged cache; see :func:`aria.ops.reference.paged_attention`.

    ``arrivals`` are the counters of the kernel, see :func:`aria.ops.kernels.paged_attention.decode_attention`.
    """
    arguments = q_NHK, keys_BHSK, values_BHSK, blocks_NM, lengths_N
    if paged_kernel(q_NHK, keys_BHSK):
        return _kernels("paged_attention").paged_attention(*arguments, arrivals)
    return _plain_paged(q_NHK).paged_attention(*arguments)


def decode_attention(
    q_NHK: Tensor,
    k_NHK: Tensor,
    v_NHK: Tensor,
    positions_N: Tensor,
    blocks_NM: Tensor,
    angles_PK: Tensor,
    keys_BHSK: Tensor,
    values_BHSK: Tensor,
    arrivals: Tensor | None = None,
) -> Tensor:
    """One new token of each sequence over a paged cache; see :func:`aria.ops.reference.decode_attention`.

    ``arrivals`` are the counters of the kernel, see :func:`aria.ops.kernels.paged_attention.decode_attention`.
    """
    arguments = q_NHK, k_NHK, v_NHK, positions_N, blocks_NM, angles_PK, keys_BHSK, values_BHSK
    if paged_kernel(q_NHK, keys_BHSK):
        return _kernels("paged_attention").decode_attention(*arguments, arrivals)
    return _plain_paged(q_NHK).decode_attention(*arguments)


def paged_kernel(q_NHK: Tensor, keys_BHSK: Tensor) -> bool:
    """Whether :func:`paged_attention` and :func:`decode_attention` have a kernel for these widths."""
    return inference_kernels(q_NHK) and _kernels("paged_attention").fits(q_NHK, keys_BHSK)


def _plain_paged(q_NHK: Tensor) -> ModuleType:
    # A GPU would have to wait for lengths to be read; the plain way does not, and so can be part of a graph.
    return reference if q_NHK.is_cuda or _use_reference() else _attention


def chunks_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    keys_BHSK: Tensor,
    values_BHSK: Tensor,
    blocks_NM: Tensor,
    lengths: Sequence[int],
    pasts: Sequence[int] | None,
    spans_N3: Tensor | None = None,
) -> Tensor:
    """Chunks of prompts over their pasts in a paged cache; see :func:`aria.ops.reference.chunks_attention`.

    The device may be told by ``spans_N3``, and in graphs is by them alone; see
    :func:`aria.ops.kernels.chunk_attention.chunks_attention`.
    """
    arguments = q_THK, k_THK, v_THK, keys_BHSK, values_BHSK, blocks_NM, lengths
    if chunks_are_graph_safe(q_THK, keys_BHSK):
        return _kernels("chunk_attention").chunks_attention(*arguments, pasts, spans_N3)
    assert pasts is not None, "no kernel reads the spans of these chunks"
    return reference.chunks_attention(*arguments, pasts)


def sample(
    logits_NV: Tensor,
    rows_N: Tensor,
    positions_N: Tensor,
    table_RC: Tensor,
    banned: Tensor,
    arrivals: Tensor | None = None,
) -> Tensor:
    """A token of each sequence, drawn as its row of the table says; see :func:`aria.ops.sampling.sample`.

    ``arrivals`` are the counters of the kernel, see :func:`aria.ops.kernels.sample.sample`.
    """
    # Scores of any precision: on CUDA all of them go through the kernel, which nothing waits for.
    if has_kernels(logits_NV.device) and not _use_reference():
        return _kernels("sample").sample(logits_NV, rows_N, positions_N, table_RC, banned, arrivals)
    return _sampling.sample(logits_NV, rows_N, positions_N, table_RC, banned)


def resample(pictures_YXH: Tensor, dim: int, target: int) -> Tensor:
    """One axis of 8-bit pictures in another length, as Pillow does it; see :func:`aria.ops.resize.resample`."""
    fast = has_kernels(pictures_YXH.device) and not _use_reference()
    chosen = _kernels("resize") if fast else _resize
    return chosen.resample(pictures_YXH, dim, target)
