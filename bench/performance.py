"""All engine benchmarks on one engine: ``python -m bench.performance --json results.json``.

Takes about four minutes on an H100, peer included. A failing part is reported and does not stop the others; finished
parts are written to the file at once. ``python -m bench.plots`` makes the page from it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench import measure, script
from bench.engine import decode, prefill, throughput, video

Part = tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]] | None]
PARTS: Mapping[str, Part] = {
    "decode": (decode.run, decode.run_peer),
    "prefill": (prefill.run, prefill.run_peer),
    "video": (video.run, video.run_peer),
    "throughput": (throughput.run, None),
}
WORK: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "aria": {
        "decode": {
            "batches": (1, 8, 16, 32, 64, 256), "contexts": (128, 8192, 16384, 32768, 61440), "steps": 64,
            "waiting": (0, 100, 10000),
        },
        "prefill": {"tokens": (512, 2048, 8192, 32768), "images": 16, "repeats": 3},
        "video": {"frames": 256, "tokens": 100, "repeats": 2},
        "throughput": {"rates": (4, 16, 32, 64), "seconds": 4.0, "longest": 2048},
    },
    "small": {
        "decode": {"batches": (1, 3), "contexts": (16, 40), "steps": 4, "waiting": (0, 5)},
        "prefill": {"tokens": (16, 40), "images": 2, "repeats": 1},
        "video": {"frames": 4, "tokens": 4, "repeats": 1},
        "throughput": {"rates": (20, 50), "seconds": 0.2, "longest": 24},
    },
}  # fmt: skip
"""Work of each part, by model."""
PEER_WORK: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "aria": {
        "decode": {"batches": (1, 8, 64), "contexts": (128, 32768), "steps": 16},
        "prefill": {"tokens": (512, 2048, 8192, 32768), "images": 16, "repeats": 3},
        "video": {"frames": 256, "tokens": 16, "repeats": 1},
    },
    "small": {
        "decode": {"batches": (1, 2), "contexts": (16,), "steps": 3},
        "prefill": {"tokens": (16,), "images": 2, "repeats": 1},
        "video": {"frames": 2, "tokens": 3, "repeats": 1},
    },
}
"""Work of transformers, with fewer steps because it takes longer."""


def attempt(results: dict[str, Any], part: str, run: Callable[[], dict[str, Any]]) -> None:
    """Run a part; an exception becomes part of the results."""
    print(f"\n{part}", flush=True)
    began = time.perf_counter()
    try:
        results |= run()
    except Exception as problem:
        traceback.print_exc()
        results.setdefault("failed", {})[part] = f"{type(problem).__name__}: {problem}"
    print(f"({time.perf_counter() - began:.1f} s)", flush=True)


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run our parts, then the peer's."""
    device = arguments.device
    limits = measure.ceilings(device, measure.dtype_of(device))
    print(measure.describe(limits), flush=True)
    results: dict[str, Any] = {"machine": measure.machine(device), "ceilings": limits, "model": arguments.model}
    began = time.perf_counter()
    engine = script.make_engine(arguments)
    print(
        f"engine with random weights: {time.perf_counter() - began:.1f} s, maximum length {engine.max_model_len} tokens"
    )
    for name in arguments.parts:
        run, _ = PARTS[name]
        work = WORK[arguments.model][name]
        attempt(results, name, lambda run=run, work=work: run(engine, limits, **work))  # type: ignore[misc]
        measure.write(results, arguments.json)
    script.dispose(engine)
    if arguments.peer:
        results["peer"] = {"name": f"transformers {results['machine']['transformers']}"}
        attempt(results["peer"], "transformers", lambda: run_peers(arguments, results))
    return results


def run_peers(arguments: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Run the peer's parts in the same order, adding them to ``results`` one by one."""
    peer = script.make_peer(arguments)
    for name in arguments.parts:
        _, run_peer = PARTS[name]
        if run_peer is None:
            continue
        work = PEER_WORK[arguments.model][name]
        attempt(results["peer"], f"{name}, transformers", lambda run=run_peer, work=work: run(peer, **work))  # type: ignore[misc]
        measure.write(results, arguments.json)
    return {}


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run (default: all)")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    results = run_all(arguments)
    measure.report(results, arguments.json)
    if "failed" in results or "failed" in results.get("peer", {}):
        sys.exit(1)


if __name__ == "__main__":
    main()
