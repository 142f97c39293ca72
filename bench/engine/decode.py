"""Decoding speed: ``python -m bench.engine.decode --batch 1 8 64 256 --context 128``.

Tokens are drawn at temperature 2 by the engine's own sampler. With random weights that is nearly uniform, whereas
greedy text loops and uses few experts. The floor counts the experts that these very tokens use, determined afterwards.
N sequences, L layers, E experts, T tokens.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from aria import Engine, SamplingParams
from aria.engine.core import EngineCore
from aria.engine.request import Request
from aria.model import Aria, Packed
from aria.ops import Segments
from bench import measure, script
from bench.engine.peer import Peer
from bench.floors import decode_step
from bench.measure import Ceilings, Spread

SETTLE = 8
"""Untimed steps, in which CUDA graphs are captured."""
EXTRA_TOKENS = 256
"""Tokens of an answer beyond the timed ones, for the steps in which other prompts are still prefilled."""
FORWARD_TOKENS = 8192
"""Maximum tokens of a forward pass that counts experts."""


def grow(core: EngineCore, batch: int, context: int, steps: int, generator: torch.Generator) -> list[Request]:
    """Prefill ``batch`` random prompts so that all are decoding, a token per step."""
    max_tokens = min(steps + EXTRA_TOKENS, core.max_model_len - context)
    prompts = [measure.random_prompt(core.model.config, context, generator) for _ in range(batch)]
    requests = []
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=2.0, seed=seed, ignore_eos=True)
        requests += core.add(prompt, params)
    while not all(request.outputs for request in requests):
        core.step()
    for _ in range(SETTLE):
        core.step()
    return requests


def clock_steps(core: EngineCore, requests: Sequence[Request], steps: int) -> tuple[float, Spread]:
    """Return seconds per step, the mean and the spread; every request has to get a token in every step."""
    before = [len(request.outputs) for request in requests]
    marks = [time.perf_counter()]
    for _ in range(steps):
        core.step()
        marks.append(time.perf_counter())
    grown = {len(request.outputs) - n for request, n in zip(requests, before, strict=True)}
    if grown != {steps}:
        raise RuntimeError(
            f"in {steps} steps answers got {sorted(grown)} tokens: the cache is too small for all of them"
        )
    return (marks[-1] - marks[0]) / steps, Spread.of([b - a for a, b in itertools.pairwise(marks)])


@torch.inference_mode()
def experts_touched(model: Aria, sequences: Sequence[Sequence[int]], last: int) -> float:
    """Return the number of experts that a step uses, the mean over layers and over the ``last`` steps.

    Args:
        model: The model that generated the sequences.
        sequences: Token ids; their last tokens were computed in the same steps.
        last: Number of steps to count.
    """
    text = model.config.text
    if len(sequences) == 1:
        return float(text.moe_topk)
    device = model.device
    touched = torch.zeros(text.num_hidden_layers, last, text.moe_num_experts, dtype=torch.bool, device=device)
    group = max(1, FORWARD_TOKENS // max(map(len, sequences)))
    for start in range(0, len(sequences), group):
        some = sequences[start : start + group]
        segments = Segments.of([len(ids) for ids in some], device)
        ids_T = torch.tensor([token for ids in some for token in ids], device=device)
        router_logits = model(ids_T, Packed(text, segments), router_logits=True).router_logits
        # (N, last): rows of the last tokens of each sequence.
        rows = segments.cu_seqlens[1:, None].long() - last + torch.arange(last, device=device)
        for layer, logits_TE in enumerate(router_logits):
            chosen = logits_TE[rows].topk(text.moe_topk).indices.transpose(0, 1).flatten(1)
            touched[layer].scatter_(1, chosen, True)
    return touched.sum(-1).float().mean().item()


def idle_between_launches(kernels: Sequence[tuple[int, int, int]], least: int = 8) -> tuple[float, float]:
    """Return how long the GPU is idle between CUDA graphs.

    Args:
        kernels: (launch, begin, end) of each kernel, in nanoseconds; the kernels of a graph share its launch.
        least: Minimum number of kernels of a launch that counts as a graph.

    Returns:
        Mean nanoseconds between the end of a graph and the start of the next, and their share of the whole time.
    """
    launches: dict[int, list[tuple[int, int]]] = {}
    for launch, begin, end in kernels:
        launches.setdefault(launch, []).append((begin, end))
    graphs = sorted(
        (min(b for b, _ in spans), max(e for _, e in spans)) for spans in launches.values() if len(spans) >= least
    )
    if len(graphs) < 2:
        raise RuntimeError(f"{len(graphs)} graphs among {len(launches)} launches; at least two are needed")
    idle, free = 0, graphs[0][1]
    for begin, end in graphs[1:]:
        idle += max(0, begin - free)
        free = max(free, end)
    return idle / (len(graphs) - 1), idle / (free - graphs[0][0])


def profile_idle(core: EngineCore, steps: int = 20) -> dict[str, float]:
    """:func:`idle_between_launches` of some steps, by the GPU's own record of when its kernels ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(steps):
            core.step()
        torch.cuda.synchronize()
    kineto = profile.profiler
    assert kineto is not None and kineto.kineto_results is not None, "the profiler has no results"
    kernels = [
        (event.correlation_id(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in kineto.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    ]
    gap, share = idle_between_launches(kernels)
    return {"gap_us": gap / 1000, "share_of_profiled_step": share}


def one(engine: Engine, limits: Ceilings, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Measure one batch size and context."""
    core, text = engine.core, engine.config.text
    generator = torch.Generator().manual_seed(batch * 1_000_003 + context)
    requests = grow(core, batch, context, steps, generator)
    lengths = [len(request.prompt) + len(request.outputs) for request in requests]
    seconds, spread = clock_steps(core, requests, steps)
    mean_context = sum(lengths) / batch + steps / 2
    idle = profile_idle(core) if engine.device.type == "cuda" else None
    sequences = [[*request.prompt, *request.outputs] for request in requests]
    finish(core, requests)
    experts = experts_touched(engine.model, sequences, min(8, steps))
    itemsize = engine.dtype.itemsize
    work = decode_step(text, batch, mean_context, experts, itemsize)
    floor = limits.floor(work)
    row = {
        "batch": batch, "context": context, "mean_context": mean_context, "tokens_per_s": batch / seconds,
        "ms_per_step": seconds * 1000, "step_ms": spread * 1000, "experts_touched": experts, "floor_ms": floor * 1000,
        "mbu": work.nbytes / seconds / limits.read, "mfu": work.flops / seconds / limits.product,
    }  # fmt: skip
    if idle is not None:
        row["idle_gap_us"] = idle["gap_us"]
        row["idle_share"] = idle["gap_us"] / 1e6 / seconds
        row["idle_share_profiled"] = idle["share_of_profiled_step"]
    return row


def with_waiting(engine: Engine, waiting: int, context: int, steps: int) -> dict[str, float]:
    """Measure a step with a full batch and ``waiting`` requests in the queue."""
    core = engine.core
    generator = torch.Generator().manual_seed(waiting)
    requests = grow(core, core.max_batch, context, steps, generator)
    params = SamplingParams(max_tokens=steps, temperature=2.0, seed=0, ignore_eos=True)
    queued = []
    for _ in range(waiting):
        queued += core.add(measure.random_prompt(core.model.config, context, generator), params)
    core.step()
    seconds, spread = clock_steps(core, requests, steps)
    finish(core, (*queued, *requests))
    return {
        "waiting": waiting,
        "running": len(requests),
        "ms_per_step": seconds * 1000,
        "median_ms": spread.median * 1000,
    }


def finish(core: EngineCore, requests: Sequence[Request]) -> None:
    """Abort requests."""
    for request in requests:
        core.finish(request)
    while core.busy:
        core.step()


def run(
    engine: Engine, limits: Ceilings, *, batches: Sequence[int], contexts: Sequence[int], steps: int,
    waiting: Sequence[int] = (),
) -> dict[str, Any]:  # fmt: skip
    """Measure all batch sizes at the first context, the first batch size at the other contexts, then the queue."""
    pairs = [(batch, contexts[0]) for batch in batches] + [(batches[0], context) for context in contexts[1:]]
    rows = []
    for batch, context in pairs:
        if context + steps + SETTLE > engine.max_model_len:
            print(f"skipping context {context}: the maximum length is {engine.max_model_len} tokens")
            continue
        rows.append(one(engine, limits, batch, context, steps))
    print(show(rows))
    results: dict[str, Any] = {"decode": rows}
    if waiting:
        results["waiting"] = [with_waiting(engine, count, contexts[0], steps) for count in waiting]
        for row in results["waiting"]:
            print(f"{row['running']} running, {row['waiting']:.0f} waiting: {row['ms_per_step']:.3f} ms per step")
    return results


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a table."""
    cells = []
    for row in rows:
        idle = f"{row['idle_share']:.1%}" if "idle_share" in row else "-"
        cells.append(
            (
                f"batch {row['batch']}, context {row['context']}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['ms_per_step']:.3f}",
                f"{row['step_ms'].low:.3f} to {row['step_ms'].high:.3f}",
                f"{row['experts_touched']:.1f}",
                f"{row['floor_ms']:.3f}",
                f"{row['mbu']:.1%}",
                f"{row['mfu']:.1%}",
                idle,
            )
        )
    return measure.table(cells, ("decode", "tok/s", "ms/step", "spread", "experts", "floor ms", "MBU", "MFU", "idle"))


def run_peer(
    peer: Peer,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    waiting: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure the same with transformers, which has no queue."""
    rows = []
    for batch, context in [(b, contexts[0]) for b in batches] + [(batches[0], c) for c in contexts[1:]]:
        row = peer.decode(batch, context, steps)
        for experts, ms in row["ms_per_step"].items():
            shown = f"{batch / ms * 1000:.1f} tok/s, {ms:.2f} ms per step" if ms else "out of memory"
            print(f"transformers, {experts}, batch {batch}, context {context}: {shown}")
        rows.append(row)
    return {"decode": rows}


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N")
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[128],
        metavar="T",
        help="prompt tokens: the first for all batch sizes, the others for the first batch size",
    )
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--waiting", type=int, nargs="+", default=[], metavar="N", help="requests in the queue")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {
        "batches": arguments.batch,
        "contexts": arguments.context,
        "steps": arguments.steps,
        "waiting": arguments.waiting,
    }
    script.run_script(arguments, run, run_peer, work)


if __name__ == "__main__":
    main()
