"""LoRA weights as operations take them. E experts, R rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """A term that is added to the product with a frozen weight: ``scaling * b(a(dropout(x)))``.

    Source: LoRA (arXiv 2106.09685), with the shapes that PEFT stores.
    """

    a: Tensor
    """``(R, in)`` beside a linear layer's weight, ``(E, in, R)`` beside those of E experts."""
    b: Tensor
    """``(out, R)``, or ``(E, R, out)``."""
    scaling: float
    dropout: float = 0.0
    """Dropout probability of the inputs, drawn separately for each row; 0 outside training."""

    def to(self, like: Tensor) -> LoRA:
        """The same in the dtype of ``like``; gradients have the original dtype."""
        return self._replace(a=self.a.to(like.dtype), b=self.b.to(like.dtype))


def lora_shapes(weight: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``a`` and ``b`` for a weight ``(out, in)``, or ``(E, in, out)`` of grouped experts."""
    if len(weight) == 2:
        out, size = weight
        return (rank, size), (out, rank)
    experts, size, out = weight
    return (experts, size, rank), (experts, rank, out)


def check_lora(name: str, a: Tensor, b: Tensor, weight: Sequence[int], rank: int | None = None) -> None:
    """Check that two matrices are the LoRA of a weight.

    Args:
        name: Name of the adapted module, for errors.
        a, b: The matrices.
        weight: Shape of the weight.
        rank: Expected rank; None accepts any rank that both matrices share.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    shapes = tuple(a.shape), tuple(b.shape)
    shared = 0 if not a.ndim else shapes[0][0] if len(weight) == 2 else shapes[0][-1]
    if shapes != lora_shapes(weight, shared if rank is None else rank):
        needs = [str(shape).replace("-1", "R") for shape in lora_shapes(weight, -1 if rank is None else rank)]
        raise ValueError(
            f"the LoRA of {name} has the shapes {shapes[0]} and {shapes[1]}; expected {needs[0]} and {needs[1]}"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"the LoRA of {name} has the dtypes {a.dtype} and {b.dtype}; expected floating-point numbers")
