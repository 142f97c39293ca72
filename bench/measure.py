"""What all benchmarks share: the machine's ceilings, clocks, and how results come out."""

from __future__ import annotations

import datetime
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from aria import AriaConfig
from bench.floors import Work


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches on the simplest work, in the same run as everything else."""

    copy: float
    """Bytes a second of a copy within the device's memory, read and written counted."""
    read: float
    """Bytes a second of weights in a matrix-vector product of the shape of Aria's head."""
    product: float
    """Operations a second of a square matrix product in the model's dtype."""

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at least."""
        return work.seconds(self.read, self.product)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(run: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 3) -> Spread:
    """Seconds that a call takes on the device: by events on CUDA, where calls may queue up, by the clock elsewhere."""
    for _ in range(warm_up):
        run()
    synchronize(device)
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return Spread.of(seconds)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    synchronize(device)
    return Spread.of([a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)])


def clock_graph(runs: Sequence[Callable[[], object]], device: torch.device, *, repeats: int = 10) -> Spread:
    """Seconds that one of several like calls takes, launched together as a CUDA graph where there is CUDA.

    Calls on different buffers, larger together than the chip's cache, measure memory; a graph leaves the host out. What
    waits for the host cannot be in a graph and is launched call by call.
    """

    def run_all() -> list[object]:
        return [run() for run in runs]

    launch: Callable[[], object] = run_all
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run_all()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run_all()
            launch = graph.replay
        except RuntimeError:
            torch.cuda.synchronize(device)
    return clock(launch, device, repeats=repeats, warm_up=1) * (1 / len(runs))


def _copy_rate(elements: int, device: torch.device, dtype: torch.dtype) -> float:
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source), device).median


def _read_rate(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> float:
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * 0.02
    x = torch.randn(1, inputs, device=device, dtype=dtype)
    return weight.nbytes / clock_graph([lambda: torch.nn.functional.linear(x, weight)] * 4, device).median


def _product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / clock(lambda: a @ b, device).median


@torch.inference_mode()
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the machine; takes a second and 5 GB on CUDA, little elsewhere."""
    if device.type != "cuda":
        return Ceilings(
            _copy_rate(1 << 22, device, dtype), _read_rate(4096, 512, device, dtype), _product_rate(256, device, dtype)
        )
    limits = Ceilings(
        _copy_rate(1 << 30, device, dtype),
        _read_rate(100352, 2560, device, dtype),
        _product_rate(8192, device, dtype),
    )
    torch.cuda.empty_cache()
    return limits


def machine(device: torch.device) -> dict[str, str]:
    """Where, when and with which versions something was measured."""
    names = ("torch", "triton", "transformers")
    found = {name: version(name) for name in names if importlib.util.find_spec(name) is not None}
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        found["aria"] = version("aria-moe")
    except PackageNotFoundError:
        found["aria"] = "from source"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {
        "date": date,
        "device": on,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        **found,
    }


def dtype_of(device: torch.device) -> torch.dtype:
    """What the model runs in: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_prompt(config: AriaConfig, tokens: int, generator: torch.Generator) -> list[int]:
    """Token ids, none of them a picture's."""
    ids = torch.randint(config.text.vocab_size - 1, (tokens,), generator=generator)
    return (ids + (ids >= config.image_token_index)).tolist()


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Columns under each other, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def report(results: dict[str, Any], file: Path | None = None) -> None:
    """Print the results as the last line, in JSON, and write them to ``file``."""
    write(results, file)
    print(json.dumps(results, default=_plain), flush=True)


def write(results: dict[str, Any], file: Path | None) -> None:
    """Write the results to ``file``, if there is one, in JSON."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, default=_plain) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    if isinstance(value, Spread | Ceilings | Work):
        return {name: float(f"{number:.6g}") for name, number in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def describe(limits: Ceilings) -> str:
    """The ceilings in a line."""
    return (
        f"ceilings of this run: {limits.copy / 1e12:.3g} TB/s copy, {limits.read / 1e12:.3g} TB/s matrix-vector read, "
        f"{limits.product / 1e12:.4g} TFLOP/s"
    )
