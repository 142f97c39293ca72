"""Triton's interpreter, which runs kernels on the CPU. Import this before any kernel; without Triton, the importing
test file is skipped.

In Triton 3.6 the bound of a loop that is read from memory is an array of one element, which NumPy 2.4 no longer
converts to an integer; this module adds the conversion.
"""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read once, when Triton is first imported

pytest.importorskip("triton")
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, scope) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
