"""Low-rank adapters (LoRA) as the operations take them. E experts, R rank."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """What is added to a product with a frozen weight: ``scaling * b(a(dropout(x)))``.

    Source: LoRA (arXiv 2106.09685), with the shapes that PEFT stores.
    """

    a: Tensor
    """``(R, in)`` beside a linear layer's weight, ``(E, in, R)`` beside those of E experts."""
    b: Tensor
    """``(out, R)``, or ``(E, R, out)``."""
    scaling: float
    dropout: float = 0.0
    """Share of the inputs that do not count, drawn anew for each row; 0 outside training."""

    def to(self, like: Tensor) -> LoRA:
        """The same in the dtype of ``like``; gradients come back in the adapter's own."""
        return self._replace(a=self.a.to(like.dtype), b=self.b.to(like.dtype))
