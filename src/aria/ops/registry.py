"""Operations and their implementations: what each implementation fits, and which one runs.

An :class:`Operation` is declared by its reference, a function of :mod:`aria.ops.reference`, whose parameters and
docstring it has. Implementations register themselves with it. The first that fits runs; the reference runs where none
does, and everywhere within ``with use("reference"):``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from aria.ops.device import has_kernels

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = ("fast", "reference")
_chosen: ContextVar[str] = ContextVar("chosen", default="fast")


class Where(IntEnum):
    """Where an implementation runs; also, what a call finds: each member but TRAINING includes those above it."""

    REFERENCE = 0
    """Nowhere but within ``use("reference")``."""
    ANYWHERE = 1
    """On every device, with or without gradients, also in code that PyTorch's compiler traces."""
    GPU = 2
    """On GPUs that run our kernels, whatever the dtype, with or without gradients."""
    INFERENCE = 3
    """The same with floating-point numbers of 16 or 32 bits, without gradients."""
    TRAINING = 4
    """The same with gradients."""


_INCLUDED = {
    Where.REFERENCE: (),
    Where.ANYWHERE: (Where.ANYWHERE,),
    Where.GPU: (Where.GPU, Where.ANYWHERE),
    Where.INFERENCE: (Where.INFERENCE, Where.GPU, Where.ANYWHERE),
    Where.TRAINING: (Where.TRAINING, Where.GPU, Where.ANYWHERE),
}
KERNELS = (
    "gemv",
    "moe_decode",
    "moe_prefill",
    "moe_train",
    "multi_lora_decode",
    "multi_lora_prefill",
    "lora_train",
    "swiglu",
    "pointwise",
    "permute",
    "norm",
    "norm_vision",
    "rotary",
    "paged_attention",
    "chunk_attention",
    "vision_attention",
    "sample",
    "resize",
    "library",
)
"""Modules of :mod:`aria.ops.kernels` that register implementations. Of two that fit alike, the first one's runs."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run the block on one kind of implementation: ``"fast"`` (the default) or ``"reference"``."""
    if implementation not in _NAMES:
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {', '.join(_NAMES)}")
    token = _chosen.set(implementation)
    try:
        yield
    finally:
        _chosen.reset(token)


def where(x: Tensor) -> Where:
    """Which implementations a call on ``x`` may use."""
    # The compiler cannot trace a context variable, and fuses plain PyTorch itself.
    if torch.compiler.is_compiling():
        return Where.ANYWHERE
    if _chosen.get() == "reference":
        return Where.REFERENCE
    if not x.is_cuda or not has_kernels(x.device):
        return Where.ANYWHERE
    if x.dtype not in _FLOATS:
        return Where.GPU
    return Where.TRAINING if torch.is_grad_enabled() else Where.INFERENCE


def _always(*_: object, **__: object) -> bool:
    return True


def _never(*_: object, **__: object) -> bool:
    return False


class Weights:
    """Base of weights that remember which implementations can serve them, so that calls need not ask again."""

    _answers: dict[Callable[[Any], bool], bool]

    def served(self, serves: Callable[[Any], bool]) -> bool:
        """``serves(self)``, computed once."""
        answers = self.__dict__.setdefault("_answers", {})
        known: bool | None = answers.get(serves)
        if known is None:
            known = answers[serves] = serves(self)
        return known


@dataclass(frozen=True, slots=True)
class Implementation(Generic[P, R]):
    """One way to compute an operation."""

    run: Callable[P, R]
    fits: Callable[..., bool] = _always
    """Whether it takes the arguments of a call: what may differ from call to call, such as the number of tokens."""
    serves: Callable[[Any], bool] | None = None
    """Whether it can use a set of :class:`Weights`, the second argument of a call: asked once of each."""
    graph_safe: Callable[..., bool] = _always
    """Whether such a call never waits for the host, so that a CUDA graph can contain it."""


class Operation(Generic[P, R]):
    """A public operation.

    Args:
        reference: Declares parameters, and computes wherever nothing else fits. Its first argument is a tensor, passed
            by position, that decides where a call runs.
        waits: Whether the reference waits for the host.
    """

    def __init__(self, reference: Callable[P, R], *, waits: bool = False):
        functools.update_wrapper(self, reference)
        self.reference: Implementation[P, R] = Implementation(reference, graph_safe=_never if waits else _always)
        self._registered: dict[Where, list[Implementation[P, R]]] = {each: [] for each in Where}
        self._candidates: list[tuple[Implementation[P, R], ...] | None] = [None] * len(Where)

    def register(
        self,
        on: Where,
        *,
        fits: Callable[..., bool] = _always,
        serves: Callable[[Any], bool] | None = None,
        graph_safe: Callable[..., bool] = _always,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate an implementation. Of those that fit, the one with the narrowest ``on`` runs, then the first."""

        def add(run: Callable[P, R]) -> Callable[P, R]:
            self._registered[on].append(Implementation(run, fits, serves, graph_safe))
            self._candidates = [None] * len(Where)
            return run

        return add

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.choose(*args, **kwargs).run(*args, **kwargs)

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Implementation[P, R]:
        """The implementation that a call with these arguments runs."""
        at = where(cast(Tensor, args[0]))
        candidates = self._candidates[at]
        if candidates is None:
            candidates = self._gather(at)
        for one in candidates:
            if (one.serves is None or cast(Weights, args[1]).served(one.serves)) and one.fits(*args, **kwargs):
                return one
        return self.reference

    def is_graph_safe(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether a call with these arguments can be part of a CUDA graph."""
        return self.choose(*args, **kwargs).graph_safe(*args, **kwargs)

    def resolve(self, x: Tensor, weights: Weights) -> None:
        """Let weights find out now which implementations serve them in calls on the likes of ``x``."""
        for one in self._gather(where(x)):
            if one.serves is not None:
                weights.served(one.serves)

    def _gather(self, at: Where) -> tuple[Implementation[P, R], ...]:
        if at >= Where.GPU:
            _load_kernels()
        found = tuple(one for each in _INCLUDED[at] for one in self._registered[each])
        self._candidates[at] = found
        return found


@functools.cache
def _load_kernels() -> None:
    """Import all kernels, which register themselves."""
    for name in KERNELS:
        # One is written in a language that not every Triton has.
        if name != "vision_attention" or importlib.util.find_spec("triton.experimental.gluon") is not None:
            importlib.import_module(f"aria.ops.kernels.{name}")
