"""What a run leaves on disk so that it can go on: folders of checkpoints that are whole or not there.

A checkpoint is a folder ``checkpoints/step-N``. While it is written it is called ``step-N.partial``; its new name is
the mark that it is whole, so that a crash at any moment leaves the one before. Tensors are in the format of
``torch.distributed.checkpoint``, which another number of ranks can read; of the weights only those that train are in
it. What belongs to one rank (its place in the data, its random numbers) lies beside them in ``rank-R.pt``.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aria.hub import read_json, sync
from aria.train.ranks import Ranks
from aria.train.shards import whole
from aria.train.stored import Planner, Reader, read_value, refusal, write_value

FOLDER = "checkpoints"
"""In the folder of a run."""
PARTIAL = ".partial"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(PARTIAL)})?", re.ASCII)
"""Other folders beside checkpoints, such as somebody's copies of them, are left alone."""
META = "run.json"
OF_RANK = ("stream", "random")
"""Entries of a state that belong to one rank."""
_CUT_SHORT = re.compile(r"\[enforce fail at inline_container.*unexpected pos.*")
"""What PyTorch says where a disk filled up in the middle of a file."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """``[checkpoint]`` of a recipe. A training that ends, or is asked to, saves in any case."""

    every_steps: int | None = None
    every_minutes: float | None = 15.0
    """With ``every_steps``: whichever comes first."""
    keep: int = 2
    """Checkpoints that stay; older ones are deleted."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")


class Saved(Protocol):
    """All of a run that is saved. ``position.step`` names the checkpoint; ``optimizer`` fills its state in itself."""

    position: Any

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class MisfitError(ValueError):
    """A checkpoint that is whole, but of another training."""


class CheckpointError(OSError):
    """A checkpoint could not be written. Raised on every rank, whichever of them failed."""


class RunState:
    """The checkpoints of one run.

    Args:
        out: folder of the run; on several machines, one that all of them see.
        settings: ``[checkpoint]``.
        ranks: the processes that train together.
        about: JSON values that are stored in each checkpoint, and returned when it is loaded.
        report: gets a line about a background write that failed, on each rank whose part failed, and about folders that
            are passed over.

    Attributes:
        failed: whether the last checkpoint that was asked for could not be written, even when tried again.
    """

    def __init__(
        self,
        out: str | Path,
        settings: CheckpointSettings,
        ranks: Ranks,
        *,
        about: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        self.folder = Path(out) / FOLDER
        self._settings, self._ranks, self._about, self._report = settings, ranks, dict(about or {}), report
        self._step, self._saved_at = -1, time.monotonic()
        self._writing: Future[Any] | None = None
        self.failed = False
        if ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._drop_partial()
        ranks.barrier()

    @staticmethod
    def latest_in(out: str | Path) -> Path | None:
        """The newest whole checkpoint of a run's folder."""
        return next(reversed(_checkpoints(Path(out) / FOLDER)), None)

    def latest(self) -> Path | None:
        """The newest whole checkpoint; what is being written does not count."""
        return self.latest_in(self.folder.parent)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step: by settings, by this rank's clock, or because the last
        one failed in the background."""
        settings, writing = self._settings, self._writing
        if writing is not None and writing.done() and writing.exception() is not None:
            return True
        by_steps = settings.every_steps is not None and step % settings.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def save(self, saved: Saved, *, wait: bool = False, prune: bool = True) -> None:
        """Write a checkpoint of all ranks, in the background: only the copy from the devices is waited for.

        The one before is finished first. Where that failed, this is reported, and the new one is waited for: a disk
        that is full for good ends the run now, and not when hours more are lost.

        Args:
            saved: the run.
            wait: until it is on disk.
            prune: delete the oldest ones beyond those that are to be kept.

        Raises:
            CheckpointError: it could not be written. What was written of it is deleted.
        """
        step = saved.position.step
        if self._ranks.max(int(self._lost())):
            self._step, wait = -1, True
        final = self.folder / f"step-{step:08d}"
        if step == self._step or final.exists():
            self._ranks.barrier()
            return
        self._saved_at, self.failed = time.monotonic(), True
        partial = final.with_name(final.name + PARTIAL)
        state: dict[str, Any] = {}

        def prepare() -> None:
            state.update(saved.state_dict())
            if self._ranks.rank == 0:
                self._drop_partial()
                # With the folders above it, should someone have deleted them.
                partial.mkdir(parents=True)
                meta = self._about | {
                    "step": step,
                    "world": self._ranks.world,
                    "data_world": self._ranks.data_world,
                    "torch": torch.__version__,
                }
                (partial / META).write_text(json.dumps(meta), encoding="utf-8")

        def write_own() -> None:
            own = {name: state.pop(name) for name in OF_RANK if name in state}
            write_value(own, partial / f"rank-{self._ranks.rank}.pt")

        def write() -> None:
            writing: Any = dcp.async_save(
                state, checkpoint_id=partial, process_group=self._ranks.saving, no_dist=self._ranks.world == 1
            )
            if self._ranks.rank == 0:
                # Rank 0 is done when all are: it writes last what the others told it they wrote.
                done: Future[Any] = Future()
                writing.add_done_callback(lambda future: self._complete(future, partial, final, done, prune))
                writing = done
            self._writing = writing

        self._together(prepare)
        self._together(write_own)
        self._together(write)
        self._step = step
        if wait:
            self._together(self._finish)
        self.failed = False

    def _together(self, work: Callable[[], None]) -> None:
        """Do this rank's part of a checkpoint; where the part of any rank fails, all of them raise an error."""
        failed: BaseException | None = None
        try:
            work()
        except (Exception, CheckpointException) as error:
            failed = error
        if self._ranks.max(int(failed is not None)):
            self._step = -1
            if self._ranks.rank == 0:
                # Its room may be what an export needs.
                self._drop_partial()
            why = "another process failed; its own message says why" if failed is None else _reasons(failed)
            raise CheckpointError(f"the checkpoint in {self.folder} could not be written: {why}") from failed

    def _lost(self) -> bool:
        """Wait for what is being written, and report it if it failed on this rank."""
        try:
            self._finish()
        except (Exception, CheckpointException) as error:
            self._report(f"the checkpoint in {self.folder} could not be written: {_reasons(error)}; trying once more")
            return True
        return False

    def _drop_partial(self) -> None:
        """Delete what was left of checkpoints that are not whole."""
        for left in _checkpoints(self.folder, partial=True):
            shutil.rmtree(left)

    def load(self, saved: Saved, folder: Path | None = None) -> dict[str, Any]:
        """Put a run back to where it was at its newest checkpoint, or at that of a folder.

        It may be a stranger's: nothing in it is executed, see :mod:`aria.train.stored`.

        Returns:
            What the checkpoint says of itself: ``step``, ``world``, ``data_world``, ``torch``, and ``about`` as it was
            saved; and ``folder``, which was read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it does not fit the run, or cannot be read.
        """
        self._finish()
        folder = folder or self.latest()
        if folder is None:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        others = sorted(
            path.name for path in folder.parent.glob("step-*") if not _NAME.fullmatch(path.name) and path.is_dir()
        )
        if others and self._ranks.rank == 0:
            self._report(f"{folder.name} is taken; {', '.join(others)} beside it are not called as checkpoints are")
        state = saved.state_dict()
        with _readable(folder):
            meta = self._read(folder, state)
        self._step = meta["step"]
        try:
            saved.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{folder} does not hold what this run needs: {type(error).__name__}: {error}") from error
        return {**meta, "folder": folder}

    def _read(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Fill a state with what a checkpoint has; gives what it says of itself."""
        own = {name: state.pop(name) for name in OF_RANK if name in state}
        reader = Reader(folder)
        known = reader.read_metadata().state_dict_metadata
        plain = {}
        for name, value in _entries(state):
            entry, shape = known.get(name), getattr(value, "shape", None)
            if entry is None:
                raise MisfitError(f"{folder} has no {name}; it is another training's")
            found = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
            if found != (None if shape is None else tuple(shape)):
                raise MisfitError(f"{folder} has {name} of {found}, not {shape}; it is another training's")
            if shape is None:
                plain[name] = type(value)
        dcp.load(
            state, storage_reader=reader, planner=Planner(), process_group=self._ranks.saving,
            no_dist=self._ranks.world == 1,
        )  # fmt: skip
        for name, value in _entries(state):
            if name in plain and type(value) is not plain[name]:
                raise ValueError(f"{name} is {value!r:.40}; expected {plain[name].__name__}")
        meta = _meta(folder)
        same = (self._ranks.world, self._ranks.data_world) == (meta["world"], meta["data_world"])
        there = [self._ranks.rank] if same else range(meta["world"])
        files = [read_value(folder / f"rank-{rank}.pt", f"rank-{rank}.pt") for rank in there]
        if not all(isinstance(file, dict) and "stream" in file for file in files):
            raise ValueError("the place in the data is missing")
        if same:
            state |= files[0]
        else:
            # A stream is told where all of them were. The same random numbers twice would be worse than new ones.
            state |= {**own, "stream": [file["stream"] for file in files]}
        return meta

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it could not be written. While another error is on its way, this is only reported.
        """
        other_error = sys.exc_info()[0] is not None
        try:
            self._finish()
        except (Exception, CheckpointException) as error:
            said = f"the checkpoint in {self.folder} could not be written: {_reasons(error)}"
            if not other_error:
                raise CheckpointError(said) from error
            self._report(said)

    def _finish(self) -> None:
        """Wait for what is being written; raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _complete(self, writing: Future[Any], partial: Path, final: Path, done: Future[Any], prune: bool) -> None:
        """Name a checkpoint that is written whole, and delete old ones."""
        try:
            writing.result()
            for file in partial.iterdir():
                sync(file)
            partial.rename(final)
            sync(self.folder)
            for old in _checkpoints(self.folder)[: -self._settings.keep] if prune else ():
                # Half deleted, it must not look whole.
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)


def _checkpoints(folder: Path, *, partial: bool = False) -> list[Path]:
    """Those that are whole, or those that are not, in the order of steps."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    found = [(int(name[1]), path) for name, path in names if name and bool(name[2]) == partial and path.is_dir()]
    return [path for _, path in sorted(found)]


def _meta(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    meta = read_json(folder / META)
    for name, least in (("step", 0), ("world", 1), ("data_world", 1)):
        value = meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{META} has the {name} {value!r:.40}; expected a whole number of at least {least}")
    if not isinstance(meta.get("recipe", ""), str):
        raise ValueError(f"{META} has a recipe that is no text")
    return meta


def _entries(state: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names under which a nested state is saved, and what goes there."""
    for name, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, f"{prefix}{name}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{name}", value


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Inside, what fails for a damaged checkpoint says so; those of ``torch.distributed`` are no plain exceptions."""
    try:
        yield
    except MisfitError:
        raise
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{folder} cannot be read: {_reasons(error)}. If it is damaged, delete that folder, and the one before it "
            "is taken"
        ) from error


def _reasons(error: BaseException) -> str:
    """What went wrong, by ranks where several say it; the first line of each."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    told = [f"rank {rank}: {_reason(failed)}" for rank, (failed, _) in failures.items()] or [_reason(error)]
    lines = [_CUT_SHORT.sub("a file was cut short; is the disk full?", one.strip().partition("\n")[0]) for one in told]
    return "; ".join(lines) or type(error).__name__


def _reason(error: BaseException) -> str:
    return f"a tensor {refusal(error)}" if isinstance(error, pickle.UnpicklingError) else str(error)


def trained_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights that train as a checkpoint has them, whole, on the CPU; their average if there is one.

    Args:
        folder: of a run, whose newest checkpoint is taken, or of a checkpoint.

    Returns:
        By the names of parameters, in the dtype of training; averages in float32.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read.
    """
    folder = Path(folder)
    found = folder if (folder / ".metadata").is_file() else RunState.latest_in(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint of a training")
    with _readable(found):
        reader = Reader(found)
        metadata = reader.read_metadata().state_dict_metadata
        for kind in ("average", "weights"):
            entries = {
                name: entry
                for name, entry in metadata.items()
                if name.startswith(f"{kind}.") and isinstance(entry, TensorStorageMetadata)
            }
            told = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
            if told > reader.room():
                raise ValueError(f"its weights would have {told:,} bytes, and its files have {reader.room():,}")
            if entries:
                wanted = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in entries.items()}
                dcp.load(wanted, storage_reader=reader, planner=Planner(), no_dist=True)
                return {name.removeprefix(f"{kind}."): tensor for name, tensor in wanted.items()}
        raise MisfitError(f"{found} holds no weights")


@torch.no_grad()
def gathered(model: nn.Module, *, trained: bool = False) -> dict[str, Tensor]:
    """A spread model's weights, whole, on rank 0's CPU; nothing on other ranks. All ranks have to call it together.

    Args:
        model: spread over the ranks, or whole.
        trained: only what trains.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            tensor = whole(parameter.detach())
            if first:
                found[name] = tensor.cpu()
    return found
