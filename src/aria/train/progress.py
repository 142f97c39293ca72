"""Metrics, logs and progress of a run: means over steps, ``log.jsonl``, a progress bar, TensorBoard and wandb.

L layers, E experts.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from aria.hub import read_text, write_file

LOG_NAME = "log.jsonl"
WANDB_ID_NAME = "wandb-id"
"""File in the run's folder with the id of its wandb run."""
_WANDB_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
"""wandb makes paths and URLs from it."""


class Metrics:
    """Sums of scalars on the device, which the host reads once per log line."""

    def __init__(self) -> None:
        # One vector per set of names: dozens of scalars would cost a kernel launch each.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._loads: Tensor | None = None
        self._load_steps = 0
        self.steps = 0
        """Steps since the last drain."""

    def add(self, scalars: Mapping[str, Tensor], *, count: int = 1) -> None:
        """Add scalars. Micro-batches of one step have ``count`` 0, except the last."""
        names = tuple(scalars)
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._sums[names] = self._sums[names] + values if names in self._sums else values
        self._counts[names] = self._counts.get(names, 0) + count
        self.steps = max(self._counts.values())

    def add_loads(self, loads_LE: Tensor, *, count: int = 1) -> None:
        """Add the fraction of assignments that each expert took."""
        self._loads = loads_LE if self._loads is None else self._loads + loads_LE
        self._load_steps += count

    def peek(self, name: str) -> float:
        """This rank's sum of a scalar since the last drain; waits for the device."""
        found = [(names.index(name), values) for names, values in self._sums.items() if name in names]
        return sum(values[place].item() for place, values in found)

    def drain(self, total: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
        """Means over the steps since the last call.

        Args:
            total: Sums a tensor over the ranks with data of their own.
        """
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, values in self._sums.items():
            for name, value in zip(names, total(values).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + self._counts[names]
        found: dict[str, Any] = {name: value / max(1, counts[name]) for name, value in sums.items()}
        if self._loads is not None:
            found |= load_report(total(self._loads) / max(1, self._load_steps))
        self._sums, self._counts, self._loads, self._load_steps, self.steps = {}, {}, None, 0, 0
        return found


def load_report(loads_LE: Tensor) -> dict[str, Any]:
    """How evenly experts are used.

    Args:
        loads_LE: Fraction of each layer's assignments that each expert took.

    Returns:
        ``load entropy N`` for each layer, 1 if all experts take equally many and 0 if one takes all, and ``dead
        experts``, those without any assignment, by layer.
    """
    loads_LE = loads_LE.float().cpu()
    entropies = torch.special.entr(loads_LE).sum(1) / math.log(max(2, loads_LE.shape[1]))
    report: dict[str, Any] = {f"load entropy {number}": value for number, value in enumerate(entropies.tolist())}
    dead = {str(number): (row == 0).nonzero()[:, 0].tolist() for number, row in enumerate(loads_LE)}
    report["dead experts"] = {layer: experts for layer, experts in dead.items() if experts}
    return report


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on the device, measured now: the base of MFU."""
    size = 8192 if device.type == "cuda" else 512
    # Its own generator: the state of the global one is part of a run's state.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Sink(Protocol):
    """Takes log lines."""

    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> str | None:
        """Finish. Returns a line to print, or None."""
        ...


class JsonLines:
    """``log.jsonl``. Lines of steps that a resumed run repeats are dropped first."""

    def __init__(self, file: Path, step: int):
        self._file = file
        drop_after(file, step)

    def write(self, line: Mapping[str, Any]) -> None:
        rounded = {name: _rounded(value) for name, value in line.items()}
        append_lines(self._file, [json.dumps(rounded, allow_nan=False)])

    def close(self) -> None:
        pass


def append_lines(file: Path, lines: Sequence[str]) -> None:
    """Append lines to a file, all of them or none. An incomplete line at its end, left by a crash, is removed first.

    Raises:
        OSError: They could not be written.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    with file.open("a+b", buffering=0) as out:
        before = _whole(out)
        out.truncate(before)
        # A disk that fills up writes a part without an error.
        if (written := out.write(data)) < len(data):
            out.truncate(before)
            raise OSError(errno.ENOSPC, f"only {written:,} of {len(data):,} bytes could be written", str(file))


def _whole(file: BinaryIO) -> int:
    """Length in bytes of the complete lines."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        if (at := file.read(end - start).rfind(b"\n")) >= 0:
            return start + at + 1
        end = start
    return 0


def drop_after(file: Path, step: int) -> None:
    """Remove lines of steps after ``step``, and an incomplete one, from a file of JSON lines."""
    if not file.is_file():
        return
    kept = [line for line in read_lines(file) if _step_of(line) <= step]
    write_file(file, b"".join(kept))


def read_lines(file: Path) -> list[bytes]:
    """The lines of a file of JSON lines, each with its ``\\n``.

    Bytes, because JSON strings may contain U+2028, U+2029 and U+0085, where ``str.splitlines`` splits too, and an
    incomplete line may end inside a character.
    """
    with file.open("rb") as opened:
        return [line.removesuffix(b"\n") + b"\n" for line in opened]


def last_evaluated(file: Path) -> int:
    """The last step in a log with a held-out loss; -1 if there is none."""
    lines = read_lines(file) if file.is_file() else []
    steps = (_step_of(line) for line in lines if b'"held-out loss"' in line)
    return max((int(step) for step in steps if math.isfinite(step)), default=-1)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for an incomplete line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


class TensorBoard:
    """TensorBoard files in ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path):
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ValueError(f"[log] tensorboard is on, but {error}; pip install tensorboard") from error
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name.replace(" ", "_"), value, int(line["step"]))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run. Its id is drawn once and kept in the run's folder, where a resumed run finds it."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        try:
            module = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(f"[log] wandb is {project!r}, but {error}; pip install wandb") from error
        file = folder / WANDB_ID_NAME
        if not file.is_file():
            write_file(file, secrets.token_hex(8))
        name = read_text(file, 1 << 10).strip()
        if not _WANDB_ID.fullmatch(name):
            raise ValueError(
                f"{file} holds {name!r:.40}, which is not the id of a wandb run; delete it to start a new one"
            )
        self._run = module.init(
            project=project,
            name=folder.resolve().name,
            id=name,
            dir=str(folder),
            config=dict(settings),
            resume="allow",
        )

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))

    def close(self) -> None:
        self._run.finish()


class Reporter:
    """Writes log lines to all sinks, and shows a progress bar on a terminal. On rank 0 only.

    It never ends a training: a sink that fails is a warning, and a closed console is silent.
    """

    def __init__(self, sinks: Sequence[Sink], console: Console | None = None):
        self._sinks = list(sinks)
        self._warned: set[str] = set()
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def start(self, done: float) -> None:
        """Show the bar, at this fraction of the training."""
        if self.console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.update(self._task, completed=done)
            self._bar.start()

    def advance(self, done: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def write(self, line: Mapping[str, Any]) -> None:
        """Log a line with its ``step``."""
        for sink in self._sinks:
            try:
                sink.write(line)
            except Exception as error:  # wandb and TensorBoard have errors of their own
                self._warn(f"{type(sink).__name__} could not be written: {error}")
        if self._bar is not None:
            self._bar.update(self._task, description=f"{_of_total(line)}, {summary(line)}")
        elif "loss" in line or "held-out loss" in line:
            self.say(f"step {line['step']}: {summary(line)}{_ahead(line)}")

    def say(self, text: str) -> None:
        """Print a line."""
        print_line(self.console, text)

    def _warn(self, text: str) -> None:
        """Print a warning once."""
        if text not in self._warned:
            self._warned.add(text)
            self.say(f"warning: {text}")

    def close(self) -> None:
        """Finish all sinks, once."""
        if self._bar is not None:
            with _may_be_gone(self.console):
                self._bar.stop()
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                line = sink.close()
            except Exception as error:
                self._warn(f"{type(sink).__name__} could not be finished: {error}")
                continue
            if line:
                self.say(line)


def print_line(console: Console, text: str) -> None:
    """Print a line without markup. A closed console, such as a closed terminal, is silent from then on."""
    with _may_be_gone(console):
        console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _may_be_gone(console: Console) -> Iterator[None]:
    try:
        yield
    except (OSError, SystemExit):
        # Rich exits the process when the reader of a pipe is gone.
        console.quiet = True


def _of_total(line: Mapping[str, Any]) -> str:
    return f"step {line['step']}/{line['total steps']}" if "total steps" in line else f"step {line['step']}"


def _ahead(line: Mapping[str, Any]) -> str:
    """Total steps and time left, if the line has them."""
    parts = [f"{line['step']}/{line['total steps']} steps"] if "total steps" in line else []
    parts += [f"{duration(line['seconds left'])} left"] if "seconds left" in line else []
    return "".join(f", {part}" for part in parts)


def duration(seconds: float) -> str:
    """Seconds, formatted."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def summary(line: Mapping[str, Any]) -> str:
    """The few numbers of a line that fit beside a bar."""
    parts = []
    for name, form in (
        ("loss", "loss {:.4f}"),
        ("held-out loss", "held-out {:.4f}"),
        ("tokens/s", "{:,.0f} tokens/s"),
        ("MFU", "MFU {:.1%}"),
        ("memory", "{:.2f} GiB"),
    ):
        value = line.get(name)
        if value is not None:
            parts.append(form.format(value / 2**30 if name == "memory" else value))
            if name == "held-out loss" and "held-out rows" in line:
                parts[-1] += f" ({line['held-out rows']})"
    dead = sum(map(len, line.get("dead experts", {}).values()))
    return ", ".join([*parts, f"{dead} dead experts"] if dead else parts)
