"""Triton's interpreter, which runs kernels on the CPU. Import before any kernel; where there is no Triton, the
test file that does is skipped.

Triton 3.6 takes the bound of a loop, read from memory, for an array of one element, which NumPy 2.4 no longer turns
into an integer; here it does.
"""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks once, when it is first imported

pytest.importorskip("triton")
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
