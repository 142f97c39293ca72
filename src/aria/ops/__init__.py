"""The operations. Each call runs the fastest implementation that fits its device, dtype and sizes.

An operation's parameters and docstring are those of its reference in :mod:`aria.ops.reference`; implementations
register with it (:mod:`aria.ops.registry`). ``with ops.use("reference"):`` forces the references, to check or to debug.
Kernels are in :mod:`aria.ops.kernels`, imported when first needed; they run on CUDA, some for inference, others with
gradients. What PyTorch's compiler traces is plain PyTorch, which it fuses itself.
"""

from __future__ import annotations

import aria.ops.attention
import aria.ops.moe  # noqa: F401  # both register implementations
from aria.ops.device import current, has_kernels, on_own_device
from aria.ops.layout import adjacent, as_one
from aria.ops.lora import LoRA
from aria.ops.multi_lora import MoEAdapters, MultiLoRA, stack_loras
from aria.ops.operations import (
    attention,
    chunks_are_graph_safe,
    chunks_attention,
    decode_attention,
    expert_mlp,
    gated,
    inference_kernels,
    layer_norm,
    linear,
    linear_add,
    linear_gelu,
    lora_linear,
    lora_linears,
    moe_is_graph_safe,
    moe_layer,
    multi_lora_expert_mlp,
    multi_lora_linear_add,
    norm_linear,
    paged_attention,
    paged_kernel,
    plan_chunks,
    resample,
    rms_norm,
    rotary,
    rotate_and_cache,
    route,
    sample,
)
from aria.ops.reference import rope_angles, rotary_table, swiglu
from aria.ops.registry import use
from aria.ops.segments import Segments
from aria.ops.weights import Chunks, ExpertWeights, MoEWeights, PagedKV

__all__ = [
    "Chunks",
    "ExpertWeights",
    "LoRA",
    "MoEAdapters",
    "MoEWeights",
    "MultiLoRA",
    "PagedKV",
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
    "multi_lora_linear_add",
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
    "use",
]
