"""The operations everyone calls. Each picks its implementation by device and dtype.

``with ops.use("reference"):`` forces the plain-PyTorch twins of :mod:`aria.ops.reference`, to check or to debug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from aria.ops import attention as _attention
from aria.ops import moe as _moe
from aria.ops import reference
from aria.ops.reference import rms_norm, rotary, rotary_table, route, swiglu
from aria.ops.segments import Segments

__all__ = [
    "Segments",
    "attention",
    "expert_mlp",
    "rms_norm",
    "rotary",
    "rotary_table",
    "route",
    "swiglu",
    "use",
]

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


def attention(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, *, causal: bool
) -> Tensor:
    """Attention within each segment; see :func:`aria.ops.reference.attention`."""
    chosen = reference if _use_reference() else _attention
    return chosen.attention(q_THK, k_SHK, v_SHK, queries, keys, causal=causal)


def expert_mlp(x_TD: Tensor, fc1_EDF: Tensor, fc2_EFD: Tensor, weights_TA: Tensor, index_TA: Tensor) -> Tensor:
    """Weighted sum of the chosen experts; see :func:`aria.ops.reference.expert_mlp`."""
    chosen = reference if _use_reference() else _moe
    return chosen.expert_mlp(x_TD, fc1_EDF, fc2_EFD, weights_TA, index_TA)
