"""Shared by all benchmarks: ceilings of the machine, timing, and reports."""

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
    """Median, minimum and maximum of repeated measurements."""

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
    """Rates that the machine reaches on simple work, measured in the same run as everything else."""

    copy: float
    """Bytes per second of a copy in device memory, counting reads and writes."""
    read: float
    """Bytes per second of the weights in a matrix-vector product of the shape of Aria's head."""
    product: float
    """Operations per second of a square matrix product in the model's dtype."""

    def floor(self, work: Work) -> float:
        """Return the minimum seconds of the work."""
        return work.seconds(self.read, self.product)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(run: Callable[[], object], device: torch.device, *, repeats: int = 10, warm_up: int = 3) -> Spread:
    """Time a call in seconds: by CUDA events, with calls queued up, or by the host's clock elsewhere."""
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
    """Time one of several similar calls in seconds, launched together as a CUDA graph on CUDA.

    Use different buffers that together exceed the chip's cache to measure memory; a graph excludes the host. Calls that
    synchronise with the host cannot be captured and are launched one by one.
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
    """Measure the machine; takes a second and 5 GB on CUDA, less elsewhere."""
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
    """Return device, date and versions of a measurement."""
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
    """Return the dtype of the model: bfloat16 on CUDA, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_prompt(config: AriaConfig, tokens: int, generator: torch.Generator) -> list[int]:
    """Draw token ids without image tokens."""
    ids = torch.randint(config.text.vocab_size - 1, (tokens,), generator=generator)
    return (ids + (ids >= config.image_token_index)).tolist()


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Format a table: the first column left-aligned, the others right-aligned."""
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
    """Print the results as a last line of JSON, and write them to ``file``."""
    write(results, file)
    print(json.dumps(results, default=_plain), flush=True)


def write(results: dict[str, Any], file: Path | None) -> None:
    """Write the results to ``file`` as JSON, if given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, default=_plain) + "\n", encoding="utf-8")


def _plain(value: object) -> object:
    if isinstance(value, Spread | Ceilings | Work):
        return {name: float(f"{number:.6g}") for name, number in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def describe(limits: Ceilings) -> str:
    """Format the ceilings as a line."""
    return (
        f"ceilings of this run: {limits.copy / 1e12:.3g} TB/s copy, {limits.read / 1e12:.3g} TB/s matrix-vector read, "
        f"{limits.product / 1e12:.4g} TFLOP/s"
    )
