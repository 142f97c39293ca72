"""Each operation by itself: ``python -m bench.kernels.operations``.

Reports the error against the reference in float32, the time, the time of PyTorch's libraries for the same work, and the
share of the machine's ceilings. Calls use changing buffers and are launched as a CUDA graph.

T tokens, N sequences, D hidden, H heads, KV key/value heads, K head width, E experts, F expert width, W shared experts'
width, S tokens of a block of the cache, P patches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from aria import AriaConfig, SamplingParams, ops
from aria.config import TextConfig
from aria.engine.sampler import SamplerState
from aria.ops import Chunks, MoEWeights, PagedKV, Segments, reference
from aria.ops.moe import expert_mlp_sorted
from bench import measure
from bench.floors import Work
from bench.measure import Ceilings
from bench.shapes import SHAPES

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """An operation on one shape."""

    name: str
    calls: Sequence[tuple[Any, ...]]
    """Arguments of similar calls."""
    run: Callable[..., Any]
    reference: Callable[..., Any]
    library: Callable[..., Any] | None
    """The same work with PyTorch's libraries; with other arguments if ``prepared`` is set."""
    work: Work
    prepared: Sequence[tuple[Any, ...]] | None = None
    """Arguments for ``library``, if they differ."""


class Maker:
    """Makes random normal tensors of one device and dtype; weights have a standard deviation of 0.02."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def x(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype, generator=self._generator)

    def weight(self, *shape: int) -> Tensor:
        return self.x(*shape) * 0.02

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)

    def copies(self, nbytes: int) -> int:
        """Return how many buffers of ``nbytes`` exceed the chip's cache (50 MB on an H100)."""
        return max(2, min(32, 250_000_000 // nbytes)) if self.device.type == "cuda" else 2


def few_tokens(make: Maker, text: TextConfig, tokens: Sequence[int]) -> Iterator[Case]:
    """Yield norm with projections, and the projection back into the residual stream."""
    D, size = text.hidden_size, make.dtype.itemsize
    parts = [heads * text.head_dim for heads in (text.num_attention_heads, *[text.num_key_value_heads] * 2)]
    O = sum(parts)
    for T in tokens:
        norm = make.ones(D)
        calls: list[tuple[Any, ...]] = []
        fused = [(make.x(T, D), norm, EPS, make.weight(O, D)) for _ in range(make.copies(D * O * size))]
        for x, _, _, weight in fused:
            # The engine stores q, k and v next to each other.
            calls.append((x, norm, EPS, *weight.split(parts)))
        work = Work((T * D + O * D + T * O) * size, 2.0 * T * D * O)
        name = f"norm_linear {T} x {D} -> {O}"
        yield Case(name, calls, ops.norm_linear, reference.norm_linear, _norm_linear, work, fused)
        calls = [(make.x(T, D), make.weight(D, D), make.x(T, D)) for _ in range(make.copies(D * D * size))]
        work = Work((3 * T * D + D * D) * size, 2.0 * T * D * D)
        yield Case(f"linear_add {T} x {D} -> {D}", calls, ops.linear_add, reference.linear_add, _linear_add, work)


def experts(make: Maker, text: TextConfig, tokens: Sequence[int]) -> Iterator[Case]:
    """Yield the MoE half of a layer, with experts laid out as in the engine."""
    D, E, A, width, W = (
        text.hidden_size,
        text.moe_num_experts,
        text.moe_topk,
        text.intermediate_size,
        text.shared_size,
    )
    fc1, fc2 = make.weight(E, 2 * width, D).mT, make.weight(E, D, width).mT
    gate, up = make.weight(2 * W, D).split(W)
    shared = (gate, up, make.weight(D, W))
    weights = MoEWeights(make.ones(D), EPS, make.weight(E, D), fc1, fc2, shared, A)
    for T in tokens:
        calls = [(make.x(T, D), weights) for _ in range(8 if T < 1024 else 2)]
        touched = sum(_touched(*call) for call in calls) / len(calls)
        read = E * D + 3 * D * (touched * width + W)
        work = Work((read + 2 * T * D) * make.dtype.itemsize, 2.0 * T * (E * D + 3 * D * (A * width + W)))
        yield Case(f"moe_layer {T} x {D}", calls, ops.moe_layer, reference.moe_layer, _moe_layer, work)


def norms(make: Maker, text: TextConfig, tokens: Sequence[int]) -> Iterator[Case]:
    """Yield the norm alone."""
    D, size = text.hidden_size, make.dtype.itemsize
    for T in tokens:
        calls = [(make.x(T, D), make.ones(D), EPS) for _ in range(make.copies(T * D * size))]
        yield Case(f"rms_norm {T} x {D}", calls, ops.rms_norm, reference.rms_norm, _rms_norm, Work(2 * T * D * size, 0))


def cached_attention(make: Maker, text: TextConfig, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Yield decode attention: one new token of each of N sequences over the paged KV cache."""
    H, KV, K = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    for N, context in shapes:
        S = 64 if make.device.type == "cuda" else 16
        M = context // S + 1
        blocks = N * M + 1
        angles = ops.rope_angles(context + 1, K, text.rope_theta, make.device)
        position = torch.full((N,), context - 1, dtype=torch.int32, device=make.device)
        nbytes = 2 * blocks * KV * S * K * make.dtype.itemsize
        calls, dense = [], []
        for _ in range(make.copies(nbytes)):
            table = (torch.randperm(blocks - 1, device=make.device) + 1).view(N, M).int()
            qkv = make.x(N, H + 2 * KV, K)
            q, k, v = qkv.split((H, KV, KV), dim=1)
            cache = PagedKV(make.x(blocks, KV, S, K), make.x(blocks, KV, S, K), angles)
            calls.append((q, k, v, position, table, cache))
            dense.append((make.x(N, H, 1, K), make.x(N, KV, context, K), make.x(N, KV, context, K)))
        work = Work(2 * N * context * KV * K * make.dtype.itemsize, 4.0 * N * context * H * K)
        name = f"decode_attention {N} x {context}"
        yield Case(name, calls, ops.decode_attention, reference.decode_attention, _dense_attention, work, dense)


def prompt_attention(make: Maker, text: TextConfig, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Yield chunked prefill attention: a chunk of a prompt over itself and its past."""
    H, KV, K = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    S = 64 if make.device.type == "cuda" else 16
    for T, past in shapes:
        M = -(-(T + past) // S)
        table = (torch.randperm(M, device=make.device) + 1).int()
        angles = ops.rope_angles(1, K, text.rope_theta, make.device)  # queries are rotated already
        calls, dense = [], []
        for _ in range(2):
            q, k, v = make.x(T, H, K), make.x(T, KV, K), make.x(T, KV, K)
            cache = PagedKV(make.x(M + 1, KV, S, K), make.x(M + 1, KV, S, K), angles)
            calls.append((q, k, v, cache, Chunks(table[None], (T,), (past,))))
            dense.append((make.x(1, H, T, K), make.x(1, KV, T, K), make.x(1, KV, T, K), make.x(1, KV, past, K)))
        pairs = T * past + T * T / 2
        work = Work((2 * T * H + 2 * (T + past) * KV) * K * make.dtype.itemsize, 4.0 * H * K * pairs)
        name = f"chunk_attention {T} after {past}"
        yield Case(name, calls, ops.chunks_attention, _head_by_head, _dense_chunk, work, dense)


def image_attention(make: Maker, config: AriaConfig, crops: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Yield the vision encoder's bidirectional attention within C crops of P patches."""
    H, K = config.vision.num_attention_heads, config.vision.head_dim
    for C, P in crops:
        segments = Segments.of([P] * C, make.device)
        calls = [(*(make.x(C * P, H, K) for _ in range(3)), segments, segments) for _ in range(2)]
        dense = [tuple(make.x(C, P, H, K).transpose(1, 2) for _ in range(3)) for _ in range(2)]
        work = Work(4 * C * P * H * K * make.dtype.itemsize, 4.0 * C * P * P * H * K)
        name = f"attention {C} x {P} patches, heads of {K}"
        yield Case(
            name, calls, _both_ways(ops.attention), _both_ways(reference.attention), _dense_attention, work, dense
        )


def sampling(make: Maker, text: TextConfig, batches: Sequence[int]) -> Iterator[Case]:
    """A token from the scores of each of N sequences; its error is none where all tokens are the reference's."""
    V = text.vocab_size
    for name, params in (
        ("greedy", SamplingParams()),
        ("temperature", SamplingParams(temperature=1.0)),
        ("top_k, top_p", SamplingParams(temperature=1.0, top_k=50, top_p=0.9)),
    ):
        for N in batches:
            state = SamplerState(N, V, make.device)
            for row in range(N):
                state.set_row(row, params, row, ())
            index = torch.arange(N, dtype=torch.int32, device=make.device)
            calls = [(state, params, make.x(N, V), index) for _ in range(make.copies(N * V * make.dtype.itemsize))]
            work = Work(N * V * make.dtype.itemsize)
            yield Case(f"sample {N} x {V}, {name}", calls, _sample, _sample_reference, _sample_library, work)


def cases(config: AriaConfig, make: Maker) -> Iterator[Case]:
    """Yield all cases; the tensors of a case live until the next one."""
    text = config.text
    full = make.device.type == "cuda" and text.hidden_size >= 1024
    patches = list(config.projector.patch_to_query)
    yield from few_tokens(make, text, (1, 8, 64, 256, 8192) if full else (1, 5))
    yield from experts(make, text, (1, 8, 64, 256, 8192) if full else (1, 5))
    yield from norms(make, text, (8192, 32768) if full else (1, 33))
    shapes = [(1, 128), (8, 128), (64, 128), (256, 128), (64, 1024), (1, 32768)]
    yield from cached_attention(make, text, shapes if full else [(1, 20), (3, 33)])
    yield from prompt_attention(make, text, [(8192, 0), (8192, 8192), (16384, 16384)] if full else [(24, 0), (24, 16)])
    yield from sampling(make, text, (1, 256) if full else (1, 3))
    yield from image_attention(make, config, [(1, patches[-1]), (16, patches[0])] if full else [(2, patches[0])])


def _norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, norm.shape, norm, eps), weight)


def _rms_norm(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, norm.shape, norm, eps)


def _linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.addmm(residual, x, weight.t())


def _moe_layer(x: Tensor, weights: MoEWeights) -> Tensor:
    """The same with cuBLAS and PyTorch's grouped matrix products."""
    gate, up, down = weights.shared
    normed = F.rms_norm(x, weights.norm.shape, weights.norm, weights.eps)
    chosen = reference.route(F.linear(normed, weights.router), weights.top_k)
    routed = expert_mlp_sorted(normed, weights.experts, *chosen)
    return x + routed + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def _sample(state: SamplerState, params: SamplingParams, logits: Tensor, index: Tensor) -> Tensor:
    return state.sample(logits, index, index)


def _sample_reference(state: SamplerState, params: SamplingParams, logits: Tensor, index: Tensor) -> Tensor:
    with ops.use("reference"):
        return state.sample(logits, index, index).float()


def _sample_library(state: SamplerState, params: SamplingParams, logits: Tensor, index: Tensor) -> Tensor:
    """The same with topk, sort and multinomial, as in common generation loops."""
    if params.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / params.temperature
    if not params.top_k:
        return logits.softmax(-1).multinomial(1)
    values, ids = logits.topk(params.top_k)
    probabilities = values.softmax(-1)
    dropped = probabilities.cumsum(-1) - probabilities >= params.top_p
    return ids.gather(1, probabilities.masked_fill(dropped, 0.0).multinomial(1))


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over contiguous keys and values, without paging."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _dense_chunk(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """Attention over a contiguous past, without paging."""
    gqa = q.shape[1] != k.shape[1]
    if not past.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    keys, values = torch.cat((past, k), dim=2), torch.cat((past, v), dim=2)
    mask = causal_lower_right(q.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=gqa)


def _head_by_head(q: Tensor, k: Tensor, v: Tensor, cache: PagedKV, chunks: Chunks) -> Tensor:
    """The reference, one head at a time: the scores of all heads would not fit into memory."""
    group = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        own = slice(head // group, head // group + 1)
        part = cache._replace(keys=cache.keys[:, own], values=cache.values[:, own])
        outs.append(reference.chunks_attention(q[:, head : head + 1], k[:, own], v[:, own], part, chunks))
    return torch.cat(outs, dim=1)


def _both_ways(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, queries, keys: attention(q, k, v, queries, keys, causal=False)


def _touched(x: Tensor, weights: MoEWeights) -> int:
    normed = reference.rms_norm(x, weights.norm, weights.eps)
    return F.linear(normed, weights.router).topk(weights.top_k).indices.unique().numel()


def _wide(value: Any) -> Any:
    """Copy in float32."""
    if isinstance(value, MoEWeights):
        return MoEWeights(*(_wide(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, tuple):
        parts = map(_wide, value)
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value.float().clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def error(case: Case) -> float:
    """Return the relative error: norm of the difference to the float32 reference over the reference's norm."""
    arguments = case.calls[0]
    wide = _wide(arguments)
    out = case.run(*arguments)
    expected = case.reference(*wide)
    return ((out.float() - expected).norm() / expected.norm().clamp(min=1e-20)).item()


def measure_case(case: Case, limits: Ceilings, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure one row of the table."""
    wrong = error(case)
    ours = measure.clock_graph([_bind(case.run, call) for call in case.calls], device, repeats=repeats)
    library = None
    if case.library is not None:
        calls = case.prepared or case.calls
        try:
            library = measure.clock_graph([_bind(case.library, call) for call in calls], device, repeats=repeats)
        except RuntimeError as problem:
            print(f"{case.name}: the library fails: {problem}")
    return {
        "name": case.name, "error": wrong, "us": ours * 1e6, "library_us": None if library is None else library * 1e6,
        "floor_us": limits.floor(case.work) * 1e6, "bytes_per_s": case.work.nbytes / ours.median,
        "flops_per_s": case.work.flops / ours.median,
    }  # fmt: skip


def _bind(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*arguments)


@torch.inference_mode()
def run(config: AriaConfig, device: torch.device, limits: Ceilings, repeats: int, only: str = "") -> dict[str, Any]:
    """Measure all cases whose names contain ``only``."""
    rows = []
    for case in cases(config, Maker(device, measure.dtype_of(device))):
        if only not in case.name:
            continue
        try:
            rows.append(measure_case(case, limits, device, repeats))
        except RuntimeError as problem:
            print(f"{case.name} fails: {problem}")
    print(show(rows, limits))
    return {"kernels": rows}


def show(rows: Sequence[dict[str, Any]], limits: Ceilings) -> str:
    """Format the rows as a table."""
    cells = []
    for row in rows:
        library = row["library_us"]
        cells.append(
            (
                row["name"],
                f"{row['error']:.1e}",
                f"{row['us'].median:.1f}",
                "-" if library is None else f"{library.median:.1f}",
                f"{row['floor_us']:.1f}",
                f"{row['bytes_per_s'] / limits.read:.0%}",
                f"{row['flops_per_s'] / limits.product:.0%}",
            )
        )
    return measure.table(cells, ("operation", "error", "us", "library us", "floor us", "of memory", "of products"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--model", choices=SHAPES, default="aria" if on_cuda else "small", help="whose shapes to use")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_cuda else "cpu"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", default="", help="only operations whose names contain this")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    device = arguments.device
    limits = measure.ceilings(device, measure.dtype_of(device))
    print(measure.describe(limits))
    results = run(SHAPES[arguments.model](), device, limits, arguments.repeats, arguments.only)
    measure.report({"machine": measure.machine(device), "ceilings": limits, **results}, arguments.json)


if __name__ == "__main__":
    main()
