"""The operations with more than one implementation, and what can be asked about them without a call.

Parameters and docstrings are those of the functions of :mod:`aria.ops.reference`.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from aria.ops import reference
from aria.ops.registry import Operation, Where, where
from aria.ops.weights import Chunks, MoEWeights, PagedKV

attention = Operation(reference.attention)
chunks_attention = Operation(reference.chunks_attention, waits=True)
decode_attention = Operation(reference.decode_attention)
expert_mlp = Operation(reference.expert_mlp, waits=True)
gated = Operation(reference.gated)
layer_norm = Operation(reference.layer_norm)
linear = Operation(reference.linear)
linear_add = Operation(reference.linear_add)
linear_gelu = Operation(reference.linear_gelu)
lora_linear = Operation(reference.lora_linear)
lora_linears = Operation(reference.lora_linears)
moe_layer = Operation(reference.moe_layer, waits=True)
multi_lora_expert_mlp = Operation(reference.multi_lora_expert_mlp, waits=True)
multi_lora_linear_add = Operation(reference.multi_lora_linear_add)
norm_linear = Operation(reference.norm_linear)
paged_attention = Operation(reference.paged_attention)
resample = Operation(reference.resample)
rms_norm = Operation(reference.rms_norm)
rotary = Operation(reference.rotary)
rotate_and_cache = Operation(reference.rotate_and_cache)
route = Operation(reference.route)
sample = Operation(reference.sample, waits=True)


def inference_kernels(x: Tensor) -> bool:
    """Whether the kernels for inference run on ``x``: a GPU that runs them, and no gradients."""
    return where(x) is Where.INFERENCE


def moe_is_graph_safe(x_TD: Tensor, weights: MoEWeights, *, adapted: bool = False) -> bool:
    """Whether :func:`moe_layer` on as many tokens as ``x`` has can be part of a CUDA graph.

    Args:
        adapted: Whether experts have LoRA weights, of any number of ranks: kernels may not take them.
    """
    return moe_layer.is_graph_safe(x_TD, weights) and not (adapted and weights.experts.products_wait(x_TD))


def chunks_are_graph_safe(q_THK: Tensor, cache: PagedKV) -> bool:
    """Whether :func:`chunks_attention` reads ``spans`` on the device; if no kernel fits, the host must know pasts."""
    chunks = Chunks(cache.keys, (), None)  # which decide nothing
    return chunks_attention.is_graph_safe(q_THK, q_THK, q_THK, cache, chunks)


def paged_kernel(q_NHK: Tensor, cache: PagedKV) -> bool:
    """Whether :func:`paged_attention` and :func:`decode_attention` have a kernel for these sizes, which reads of a
    block table only what each sequence uses."""
    chosen = paged_attention.choose(q_NHK, cache, q_NHK, q_NHK)  # whatever the block table and lengths are
    return q_NHK.is_cuda and chosen is not paged_attention.reference


def plan_chunks(cache: PagedKV, heads: int, chunk: int, longest: int) -> None:
    """See :func:`aria.ops.kernels.chunk_attention.plan`; only where :func:`chunks_are_graph_safe`."""
    importlib.import_module("aria.ops.kernels.chunk_attention").plan(cache.keys, heads, chunk, longest)
