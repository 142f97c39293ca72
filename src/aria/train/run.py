"""A training run from beginning to end: claim the folder, prepare, resume, train, save, evaluate, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from rich.console import Console

from aria.config import CONFIG_NAME
from aria.hub import write_file
from aria.model.lora import lora_modules
from aria.train.assemble import Parts, make_trainer, make_update, prepare
from aria.train.console import EXPORT, rounded_epochs, say_end
from aria.train.data.report import Report
from aria.train.evaluate import Sampler
from aria.train.export import export
from aria.train.parallel import Parallel
from aria.train.progress import print_line
from aria.train.recipe import FILE_NAME, Recipe, refuse_changes
from aria.train.resume import Saved, about, course, make_budget
from aria.train.schedule import Budget
from aria.train.state import CheckpointError, RunState
from aria.train.trainer import Position, Trainer

LOCK_NAME = ".lock"


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    sampler: Sampler | None = None,
    stop_after: float | None = None,
    console: Console | None = None,
) -> str:
    """Train as the recipe says, from the folder's newest checkpoint if there is one, and export the result.

    Args:
        recipe: What to train.
        out: Folder of the run: recipe, log, checkpoints, export.
        sampler: Writes answers for ``[evaluate] samples``.
        stop_after: Seconds after which to save and stop; the next call resumes.
        console: Shows progress; standard error where None.

    Returns:
        Why it ended: ``done``, ``data ended``, ``terminated`` or ``time is up``.

    Raises:
        ValueError: The recipe does not fit the model, the data, the machine, or the run that the folder holds.
        FloatingPointError: Gradients were not finite; see :class:`aria.train.trainer.Trainer`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; a run needs a folder of its own: name another --out")
    parallel = Parallel.start(recipe.parallel)
    lock = FileLock(out / LOCK_NAME)
    try:
        if parallel.rank == 0 and out.is_dir():
            _lock(lock, out)
        parallel.barrier()
        if recipe.evaluate.samples and parallel.world > 1:
            raise ValueError("[evaluate] samples are written by one process only; leave them out with several")
        console = console or Console(stderr=True)
        state = RunState(
            out,
            recipe.checkpoint,
            parallel,
            about=about(recipe),
            report=lambda line: print_line(console, f"warning: {line}"),
        )
        _claim(out, recipe, parallel, lock, begun=state.latest() is not None)
        parts = prepare(recipe, parallel, out, console if parallel.rank == 0 else None)
        return _run(parts, state, out, console, sampler, stop_after)
    except KeyboardInterrupt:
        # Outside of the loop, which saves, or a second Ctrl-C.
        if parallel.rank == 0:
            print_line(console or Console(stderr=True), _interrupted(out))
        raise
    finally:
        # Acquired twice where the folder existed before. An exception that the caller keeps must not keep the lock.
        lock.release(force=True)
        parallel.close()


def _run(
    parts: Parts, state: RunState, out: Path, console: Console, sampler: Sampler | None, stop_after: float | None
) -> str:
    """Resume, train to the end, export."""
    recipe, parallel = parts.recipe, parts.parallel
    update = make_update(parts)
    saved = Saved(parts.module, update.optimizer, update.average, parts.stream, Position())
    meta = state.load(saved) if state.latest() is not None else None
    trainer, reporter = make_trainer(
        parts, update, saved, state, out, console=console, sampler=sampler, stop_after=stop_after
    )
    try:
        if reporter is not None:
            for line in _resumed(parts, trainer, meta) if meta is not None else ():
                reporter.say(line)
            for line in rounded_epochs(recipe, parts.stream):
                reporter.say(line)
        failed: Exception | None = None
        try:
            reason = run_to_end(trainer)
        except Exception as error:
            # Trained weights must not be lost because a checkpoint or held-out data failed. Ranks agree on the former.
            if not (state.failed or (trainer.finished and parallel.world == 1)):
                raise
            failed, reason = error, "failed"
        report = getattr(parts.stream, "report", None)
        if isinstance(report, Report):
            # Each rank has read only its own rows.
            report = Report.joined(parallel.collect(report))
        if failed is not None or trainer.finished:
            with update.averaged():
                _export(parts, out / EXPORT, saved.position.step, failed)
        if reporter is not None:
            reporter.close()
            say_end(reporter, reason, trainer, report, out, beside=recipe.model if lora_modules(parts.aria) else None)
    finally:
        if reporter is not None:
            reporter.close()
        state.close()
    return reason


def _resumed(parts: Parts, trainer: Trainer, meta: Mapping[str, Any]) -> list[str]:
    """What to print about a run that resumes from the checkpoint that ``meta`` describes."""

    def budget(of: Recipe) -> Budget:
        return make_budget(of, parts.stream, lambda: trainer.clock.seconds)

    return course(meta, parts.recipe, parts.parallel, budget, trainer.position.step)


def run_to_end(trainer: Trainer) -> str:
    """Train, then save, then evaluate: in this order, because held-out data may fail after hours of training.

    The export follows (:func:`train`), also where the last checkpoint or the last evaluation failed.

    Returns:
        See :meth:`aria.train.trainer.Trainer.train`.
    """
    with trainer.session() as session:
        reason = trainer.train(session)
        trainer.save()
        if trainer.finished:
            trainer.evaluate()
    return reason


def _export(parts: Parts, folder: Path, step: int, failed: Exception | None) -> None:
    """Export the weights of a step. Where the run had failed before, raise that error and say where the weights are."""
    try:
        export(parts, folder)
    except Exception as error:
        if failed is None:
            raise RuntimeError(
                f"the export could not be written to {folder}: {error}. Step {step} is in a checkpoint, from which "
                "`aria train RECIPE --out FOLDER --export` writes it"
            ) from error
        raise RuntimeError(f"{failed}. Nor could the weights be exported to {folder}: {error}") from failed
    if failed is not None:
        kind = CheckpointError if isinstance(failed, CheckpointError) else RuntimeError
        raise kind(f"{failed}. The weights of step {step} are exported to {folder}") from failed


def _claim(out: Path, recipe: Recipe, parallel: Parallel, lock: BaseFileLock, *, begun: bool) -> None:
    """Write the resolved recipe into the run's folder; refuse one with checkpoints or weights of another recipe."""
    file = out / FILE_NAME
    if recipe.targets.method == "lora" and (out / EXPORT / CONFIG_NAME).is_file():
        raise ValueError(
            f"{out / EXPORT} holds the weights of an earlier training, and full weights from an earlier run would "
            "shadow the adapter: move them away, or name another --out"
        )
    there = Recipe.read(file) if file.is_file() else None
    if begun and there is not None:
        refuse_changes(file, there, recipe)
    parallel.barrier()
    if parallel.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        _lock(lock, out)
    # An equal recipe stays as it is: it may be the user's own file, with comments.
    if parallel.rank == 0 and there != recipe:
        write_file(file, recipe.to_toml())
    parallel.barrier()


def _lock(lock: BaseFileLock, out: Path) -> None:
    """Keep other processes out of a run's folder; the lock of a process that died does not hold."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{out} is being trained in by another process; wait for its end, or name another --out"
        ) from None


def _interrupted(out: Path) -> str:
    """What to print where a run ends without another checkpoint."""
    found = RunState.latest_in(out)
    if found is None:
        return "interrupted before the first checkpoint; nothing is saved"
    return f"interrupted; step {int(found.name.rpartition('-')[2])} is saved in {out}; rerun to resume"


def begun(out: str | Path) -> bool:
    """Whether a folder holds a checkpoint to resume from."""
    return RunState.latest_in(Path(out)) is not None
