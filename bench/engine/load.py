"""Loading time of a checkpoint against a plain read of the same files, and memory beyond the weights.

    python -m bench.engine.load --gigabytes 8 --folder SCRATCH

Writes a random checkpoint with the published shapes (fewer layers), then measures in turn, each in a new process: a
plain read through a 1 MiB buffer, a plain read into new memory, and the load. Cold runs drop the files from the page
cache first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from aria.checkpoint import find_weights, load_model, parameter_shapes
from aria.checkpoint.save import Spec, write_weights
from aria.config import AriaConfig
from aria.hub import write_json

KINDS = ("read", "read into memory", "load")


def make(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint of about ``gigabytes`` GB: the published shape with fewer layers."""
    base = AriaConfig.aria()
    one, two = (
        dataclasses.replace(base, text=dataclasses.replace(base.text, num_hidden_layers=n, vocab_size=32768))
        for n in (1, 2)
    )
    per_layer = two.num_parameters() - one.num_parameters()
    layers = max(1, round((gigabytes * 5e8 - one.num_parameters()) / per_layer) + 1)
    config = dataclasses.replace(one, text=dataclasses.replace(one.text, num_hidden_layers=layers))
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in parameter_shapes(config).items()}
    noise = torch.randn(1 << 24).bfloat16()

    def get(name: str) -> torch.Tensor:
        shape = torch.Size(specs[name].shape)
        return noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape)

    folder.mkdir(parents=True, exist_ok=True)
    write_weights(specs, get, config, folder)
    write_json(folder / "config.json", config.to_dict())
    os.sync()


def forget(files: list[Path]) -> None:
    """Drop files from the page cache; their pages are clean because `make` synced them."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(kind: str, folder: Path, device: str) -> dict[str, float]:
    """Return seconds, and peak resident bytes beyond the weights, of one run in this process."""
    files = find_weights(folder)
    nbytes = sum(file.stat().st_size for file in files)
    if device != "cpu":
        torch.zeros(1, device=device)
    begin = time.perf_counter()
    kept: object = None
    if kind == "load":
        kept = load_model(folder, dtype=torch.bfloat16, device=device)
    elif kind == "read into memory":
        kept = [file.read_bytes() for file in files]
    else:
        buffer = memoryview(bytearray(1 << 20))
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    over = peak - (nbytes if device == "cpu" and kind != "read" else 0)
    del kept
    return {"seconds": seconds, "bytes": nbytes, "over": over}


def compare(folder: Path, runs: int, device: str) -> None:
    files = find_weights(folder)
    result: dict[str, object] = {"bytes": sum(file.stat().st_size for file in files), "device": device, "runs": runs}
    for cache in ("cold", "warm"):
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        over = 0.0
        for _ in range(runs):
            for kind in KINDS:
                if cache == "cold":
                    forget(files)
                command = [sys.executable, __file__, "--measure", kind, "--folder", str(folder), "--device", device]
                run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                rates[kind].append(run["bytes"] / run["seconds"] / 1e9)
                over = max(over, run["over"]) if kind == "load" else over
        print(f"{cache} page cache, {runs} runs, GB/s: median (lowest to highest)")
        for kind, values in rates.items():
            print(f"  {kind:18} {statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})")
        medians = {kind: statistics.median(values) for kind, values in rates.items()}
        ratios = {kind: medians["load"] / medians[kind] for kind in KINDS[:2]}
        print("  load relative to " + ", ".join(f"{kind}: {ratio:.0%}" for kind, ratio in ratios.items()))
        print(f"  peak resident memory of the load beyond the weights: {over / 2**20:.0f} MiB")
        result[cache] = {"gb_per_s": medians, "spread": rates, "ratio": ratios, "resident_over_weights": over}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; an existing checkpoint is reused")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.device)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder.parent if arguments.folder else None) as scratch:
        folder = arguments.folder or Path(scratch) / "checkpoint"
        if not (folder / "config.json").is_file():
            make(folder, arguments.gigabytes)
        compare(folder, arguments.runs, arguments.device)


if __name__ == "__main__":
    main()
