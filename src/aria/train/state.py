"""Checkpoints that a run resumes from. Each is complete or absent.

A checkpoint is a folder ``checkpoints/step-N``. While it is written it is called ``step-N.partial``; the rename marks
it as complete, so that a crash at any moment leaves the one before. Tensors are in the format of
``torch.distributed.checkpoint``, which any number of ranks can read; of the weights only trained ones are stored. The
state of one rank (its position in the data, its random states) is in ``rank-R.pt`` beside them.
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
from aria.train.stored import CheckpointReader, Planner, read_value, refusal, write_value

FOLDER = "checkpoints"
"""Folder inside the run's folder."""
PARTIAL = ".partial"
_NAME = re.compile(rf"step-(\d{{8,}})({re.escape(PARTIAL)})?", re.ASCII)
"""Other folders, such as copies of checkpoints, are ignored."""
META = "run.json"
OF_RANK = ("stream", "random")
"""Entries of a state that are separate for each rank."""
_CUT_SHORT = re.compile(r"\[enforce fail at inline_container.*unexpected pos.*")
"""PyTorch's message when a disk fills up in the middle of a file."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """``[checkpoint]`` of a recipe. A run that ends, or is stopped, saves in any case."""

    every_steps: int | None = None
    every_minutes: float | None = 15.0
    """With ``every_steps``, whichever comes first."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_minutes", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")


class Savable(Protocol):
    """The state of a run. ``position.step`` names the checkpoint."""

    position: Any

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class MisfitError(ValueError):
    """A complete checkpoint of another training."""


class CheckpointError(OSError):
    """A checkpoint could not be written. Raised on every rank, whichever failed."""


class RunState:
    """The checkpoints of one run.

    Args:
        out: Folder of the run, shared by all machines.
        settings: ``[checkpoint]``.
        ranks: The processes that train together.
        about: JSON values that are stored in each checkpoint, and returned when it is loaded.
        report: Gets a line about a failed background write, on each rank whose part failed, and about ignored folders.

    Attributes:
        failed: Whether the last requested checkpoint could not be written, even when tried again.
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
        """The newest complete checkpoint in a run's folder."""
        return next(reversed(_checkpoints(Path(out) / FOLDER)), None)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return self.latest_in(self.folder.parent)

    def due(self, step: int) -> bool:
        """Whether to write a checkpoint after this step: by the settings and this rank's clock, or because the last one
        failed in the background."""
        settings, writing = self._settings, self._writing
        if writing is not None and writing.done() and writing.exception() is not None:
            return True
        by_steps = settings.every_steps is not None and step % settings.every_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (settings.every_minutes is not None and minutes >= settings.every_minutes)

    def save(self, saved: Savable, *, wait: bool = False, prune: bool = True) -> None:
        """Write a checkpoint of all ranks in the background; only the copy from the devices is waited for.

        The previous write is finished first. If it failed, this is reported, and the new write is waited for: a full
        disk ends the run now, before more hours are lost.

        Args:
            saved: The state of the run.
            wait: Wait until it is on disk.
            prune: Delete the oldest checkpoints beyond ``keep``.

        Raises:
            CheckpointError: It could not be written. The incomplete checkpoint is deleted.
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
                # With its parent folders, in case they were deleted.
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
                # Rank 0 is done when all are: it writes the metadata of all ranks last.
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
        """Do this rank's part of a checkpoint; if any rank fails, all raise an error."""
        failed: BaseException | None = None
        try:
            work()
        except (Exception, CheckpointException) as error:
            failed = error
        if self._ranks.max(int(failed is not None)):
            self._step = -1
            if self._ranks.rank == 0:
                # The export may need its disk space.
                self._drop_partial()
            why = "another process failed; see its own message" if failed is None else _reasons(failed)
            raise CheckpointError(f"the checkpoint in {self.folder} could not be written: {why}") from failed

    def _lost(self) -> bool:
        """Wait for the write in progress, and report it if it failed on this rank."""
        try:
            self._finish()
        except (Exception, CheckpointException) as error:
            self._report(f"the checkpoint in {self.folder} could not be written: {_reasons(error)}; trying again")
            return True
        return False

    def _drop_partial(self) -> None:
        """Delete incomplete checkpoints."""
        for left in _checkpoints(self.folder, partial=True):
            shutil.rmtree(left)

    def load(self, saved: Savable, folder: Path | None = None) -> dict[str, Any]:
        """Load the newest checkpoint of the run, or the one in a folder.

        It may be untrusted: nothing in it is executed, see :mod:`aria.train.stored`.

        Returns:
            Its description: ``step``, ``world``, ``data_world``, ``torch``, and ``about`` as it was saved; and
            ``folder``, which was read.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It does not fit the run, or cannot be read.
        """
        self._finish()
        folder = folder or self.latest()
        if folder is None:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint")
        others = sorted(
            path.name for path in folder.parent.glob("step-*") if not _NAME.fullmatch(path.name) and path.is_dir()
        )
        if others and self._ranks.rank == 0:
            self._report(f"{folder.name} is loaded; {', '.join(others)} beside it are ignored: no names of checkpoints")
        state = saved.state_dict()
        with _readable(folder):
            meta = self._read(folder, state)
        self._step = meta["step"]
        try:
            saved.load_state_dict(state)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{folder} lacks what this run needs: {type(error).__name__}: {error}") from error
        return {**meta, "folder": folder}

    def _read(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Fill a state from a checkpoint. Returns the description of the checkpoint."""
        own = {name: state.pop(name) for name in OF_RANK if name in state}
        reader = CheckpointReader(folder)
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
            raise ValueError("the position in the data is missing")
        if same:
            state |= files[0]
        else:
            # A stream gets the positions of all ranks. Random states are not restored: two ranks must not share one.
            state |= {**own, "stream": [file["stream"] for file in files]}
        return meta

    def close(self) -> None:
        """Wait for the write in progress.

        Raises:
            CheckpointError: It failed. While another exception is being handled, this is only reported.
        """
        other_error = sys.exc_info()[0] is not None
        try:
            self._finish()
        except (Exception, CheckpointException) as error:
            message = f"the checkpoint in {self.folder} could not be written: {_reasons(error)}"
            if not other_error:
                raise CheckpointError(message) from error
            self._report(message)

    def _finish(self) -> None:
        """Wait for the write in progress; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _complete(self, writing: Future[Any], partial: Path, final: Path, done: Future[Any], prune: bool) -> None:
        """Rename a completely written checkpoint, and delete old ones."""
        try:
            writing.result()
            for file in partial.iterdir():
                sync(file)
            partial.rename(final)
            sync(self.folder)
            for old in _checkpoints(self.folder)[: -self._settings.keep] if prune else ():
                # A half deleted checkpoint must not look complete.
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)


def _checkpoints(folder: Path, *, partial: bool = False) -> list[Path]:
    """Complete checkpoints, or incomplete ones, in the order of steps."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    found = [(int(name[1]), path) for name, path in names if name and bool(name[2]) == partial and path.is_dir()]
    return [path for _, path in sorted(found)]


def _meta(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint."""
    meta = read_json(folder / META)
    for name, least in (("step", 0), ("world", 1), ("data_world", 1)):
        value = meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{META} has the {name} {value!r:.40}; expected a whole number of at least {least}")
    if not isinstance(meta.get("recipe", ""), str):
        raise ValueError(f"{META} has a recipe that is no text")
    return meta


def _entries(state: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Entries of a nested state with the names under which they are saved."""
    for name, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, f"{prefix}{name}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{name}", value


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise errors of a damaged checkpoint as ValueError; ``CheckpointException`` is not an Exception."""
    try:
        yield
    except MisfitError:
        raise
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{folder} cannot be read: {_reasons(error)}. If it is damaged, delete that folder to resume from the "
            "checkpoint before it"
        ) from error


def _reasons(error: BaseException) -> str:
    """The first line of each error, by rank if there are several."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    found = [f"rank {rank}: {_reason(failed)}" for rank, (failed, _) in failures.items()] or [_reason(error)]
    lines = [_CUT_SHORT.sub("a file was cut short; is the disk full?", one.strip().partition("\n")[0]) for one in found]
    return "; ".join(lines) or type(error).__name__


def _reason(error: BaseException) -> str:
    return f"a tensor {refusal(error)}" if isinstance(error, pickle.UnpicklingError) else str(error)


def trained_weights(folder: str | Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint on the CPU; their moving average if there is one.

    Args:
        folder: Folder of a run, whose newest checkpoint is read, or of a checkpoint.

    Returns:
        Global tensors by the names of parameters, in the dtype of training; averages in float32.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read.
    """
    folder = Path(folder)
    found = folder if (folder / ".metadata").is_file() else RunState.latest_in(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint of a training")
    with _readable(found):
        reader = CheckpointReader(found)
        metadata = reader.read_metadata().state_dict_metadata
        for kind in ("average", "weights"):
            entries = {
                name: entry
                for name, entry in metadata.items()
                if name.startswith(f"{kind}.") and isinstance(entry, TensorStorageMetadata)
            }
            declared = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
            if declared > reader.tensor_bytes():
                raise ValueError(f"its weights would have {declared:,} bytes, its files have {reader.tensor_bytes():,}")
            if entries:
                wanted = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in entries.items()}
                dcp.load(wanted, storage_reader=reader, planner=Planner(), no_dist=True)
                return {name.removeprefix(f"{kind}."): tensor for name, tensor in wanted.items()}
        raise MisfitError(f"{found} holds no weights")


@torch.no_grad()
def gathered(model: nn.Module, *, trained: bool = False) -> dict[str, Tensor]:
    """Gather a model's weights on rank 0's CPU; empty on other ranks. All ranks call it together.

    Args:
        model: The model, sharded or not.
        trained: Gather only trained parameters.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            tensor = whole(parameter.detach())
            if first:
                found[name] = tensor.cpu()
    return found
