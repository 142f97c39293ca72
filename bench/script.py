"""Shared frame of engine benchmarks: options, an engine with random weights, the peer, and the report."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aria import Engine
from bench import measure
from bench.engine.peer import Peer
from bench.shapes import SHAPES

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all engine benchmarks share."""
    on_cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model",
        choices=SHAPES,
        default="aria" if on_cuda else "small",
        help="aria: the published shape, 25.3B; small: runs anywhere (default: aria on CUDA, else small)",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if on_cuda else "cpu"))
    parser.add_argument("--cache-tokens", type=int, help="capacity of the KV cache in tokens (default: what fits)")
    parser.add_argument("--max-batch", type=int, help="maximum number of concurrent sequences (default: 256 on CUDA)")
    parser.add_argument("--peer", choices=("transformers",), help="also measure transformers' Aria")
    parser.add_argument(
        "--peer-compiled", action="store_true", help="also measure its compiled decoding (takes a minute or more)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")


def make_engine(arguments: argparse.Namespace) -> Engine:
    """Make an engine with random weights of standard deviation 0.02; smaller ones collapse routing and look faster."""
    device = arguments.device
    return Engine(
        SHAPES[arguments.model](),
        dtype=measure.dtype_of(device),
        device=device,
        cache_tokens=arguments.cache_tokens or (None if device.type == "cuda" else 8192),
        max_batch=arguments.max_batch,
    )


def dispose(engine: Engine) -> None:
    """Release an engine and its memory."""
    engine.close()
    engine.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_script(
    arguments: argparse.Namespace,
    run: Callable[..., Results],
    run_peer: Callable[..., Results] | None,
    work: Mapping[str, Any],
) -> None:
    """Measure the ceilings, the engine, and the peer if requested, and report.

    Args:
        arguments: Parsed options, see :func:`add_arguments`.
        run: Called as ``run(engine, ceilings, **work)``.
        run_peer: Called as ``run_peer(peer, **work)``; None if transformers has no equivalent.
        work: Arguments of both.
    """
    device = arguments.device
    results: Results = {
        "machine": measure.machine(device),
        "ceilings": measure.ceilings(device, measure.dtype_of(device)),
    }
    limits = results["ceilings"]
    print(measure.describe(limits))
    engine = make_engine(arguments)
    results |= run(engine, limits, **work)
    dispose(engine)
    if arguments.peer and run_peer is not None:
        results["peer"] = run_peer(make_peer(arguments), **work)
    measure.report(results, arguments.json)


def make_peer(arguments: argparse.Namespace) -> Peer:
    """Make transformers' model of the same shape."""
    device = arguments.device
    return Peer(SHAPES[arguments.model](), measure.dtype_of(device), device, compiled=arguments.peer_compiled)


def parse(
    description: str | None, add_work: Callable[[argparse.ArgumentParser], None], argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse the shared options and a benchmark's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_work(parser)
    return parser.parse_args(argv)
