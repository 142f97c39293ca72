"""Products of many rows with their experts' matrices, on Hopper's copy engine and tensor cores.

One kernel computes both products of an expert. A tile takes columns from two halves of the weight, ``(E, 2, O, I)``:
gate and up, whose SwiGLU is stored as one, or the two halves of the down projection's outputs, which are both stored.
So the wide tile that keeps tensor cores busy needs no second pass for SwiGLU, and the copy engine handles edges: past
the end it reads zeros and writes nothing.

P rows, E experts, I inputs, O outputs of each half.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    """Tile sizes.

    Attributes:
        rows, columns, inputs: Of a tile; ``columns`` of each half, ``inputs`` of one step.
        warps, stages: Warps of a program, and steps in flight.
        group: Rows of tiles that are processed together, over all columns.
    """

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int
    group: int


@triton.jit
def _sigmoid(x, NATIVE: tl.constexpr):
    if NATIVE:
        # Two instructions of the special function unit; the general form needs five more for numbers that underflow.
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(x)


@triton.jit(do_not_specialize=["ROWS"])
def _grouped(
    x, w, y, tiles_ptr, ROWS, COLUMNS, STEPS, SWIGLU: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, I_BLOCK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    rows = ROWS if tiles_ptr is None else tl.load(tiles_ptr)
    # Flattened, the loops over tiles and steps load the next tile while this one is finished.
    for tile in tl.range(tl.program_id(0), rows * COLUMNS, PROGRAMS, flatten=True):
        # A few rows of tiles by all columns at a time: what runs at the same time fits into the L2 cache.
        first = tile // (GROUP * COLUMNS) * GROUP
        size = tl.minimum(rows - first, GROUP)
        rest = tile % (GROUP * COLUMNS)
        row, column = first + rest % size, rest // size
        expert = 0 if tiles_ptr is None else tl.load(tiles_ptr + 1 + row)
        sums = tl.zeros((ROWS_BLOCK, 2 * O_BLOCK), tl.float32)
        for step in tl.range(STEPS):
            a = x.load([row * ROWS_BLOCK, step * I_BLOCK])
            b = w.load([expert, 0, column * O_BLOCK, step * I_BLOCK]).reshape(2 * O_BLOCK, I_BLOCK)
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
        out = sums.reshape(ROWS_BLOCK, 2, O_BLOCK)
        if SWIGLU:
            gate, up = out.permute(0, 2, 1).split()
            out = (gate * up * _sigmoid(gate, NATIVE)).reshape(ROWS_BLOCK, 1, O_BLOCK)
        y.store([row * ROWS_BLOCK, 0, column * O_BLOCK], out.to(y.dtype))


@lru_cache
def _programs(device: torch.device) -> int:
    """One for each multiprocessor, whatever the number of tiles: it is a compile-time constant."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def grouped(x_PI: Tensor, w_E2OI: Tensor, out: Tensor, table: Tensor | None, *, swiglu: bool, shape: Tiles) -> Tensor:
    """Rows times their experts' matrices.

    Args:
        x_PI: Rows; those of each expert start at a multiple of ``shape.rows``.
        w_E2OI: ``(E, 2, O, I)`` contiguous: gate and up, or two halves of the outputs.
        out: Written and returned, ``(P, O)`` if ``swiglu``, else ``(P, 2 O)``.
        table: From :func:`aria.ops.kernels.permute.place`; None if all rows belong to one expert.
        swiglu: Whether to store ``silu(gate) * up`` of the two halves.
        shape: Tile sizes.
    """
    outputs, inputs = w_E2OI.shape[2:]
    halves = 1 if swiglu else 2
    columns = triton.cdiv(outputs, shape.columns)
    rows = triton.cdiv(x_PI.shape[0], shape.rows)
    programs = _programs(x_PI.device)
    _grouped[(programs,)](
        TensorDescriptor.from_tensor(x_PI, [shape.rows, shape.inputs]),
        TensorDescriptor.from_tensor(w_E2OI, [1, 2, shape.columns, shape.inputs]),
        TensorDescriptor.from_tensor(out.view(-1, halves, outputs), [shape.rows, halves, shape.columns]),
        table, rows, columns, triton.cdiv(inputs, shape.inputs), swiglu,
        ROWS_BLOCK=shape.rows, O_BLOCK=shape.columns, I_BLOCK=shape.inputs, GROUP=shape.group, PROGRAMS=programs,
        NATIVE=x_PI.is_cuda, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out
