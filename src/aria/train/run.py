"""From a recipe to a trained model in a folder: everything is made here, checked, resumed, and put into the loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from aria.checkpoint import load_model, save_checkpoint
from aria.checkpoint.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS
from aria.checkpoint.adapter import read_adapter, save_adapter
from aria.config import CONFIG_NAME, AriaConfig, parse_dtype
from aria.hub import ADAPTER_NAME, write_file
from aria.model import Aria
from aria.model.lora import lora_modules
from aria.processor import AriaProcessor
from aria.train import targets
from aria.train.console import EXPORT, make_reporter, rounded_epochs, say_end
from aria.train.cost import Trained, batch_flops
from aria.train.data import DataStream, make_stream
from aria.train.data.encode import Encoder
from aria.train.data.look import judge, look
from aria.train.data.report import Report
from aria.train.evaluate import Evaluation, Sampler, check_held_out
from aria.train.objective import Losses, Objective, Step
from aria.train.optimizer import clip_gradients, make_optimizer
from aria.train.parallel import Parallel
from aria.train.preflight import Sampled, check, weights_dtype
from aria.train.progress import (
    LOG_NAME,
    last_evaluated,
    measured_rate,
    print_line,
)
from aria.train.recipe import FILE_NAME, Recipe, changes, load_object
from aria.train.resume import Saved, about, course, make_budget, schedule_of
from aria.train.schedule import Budget, StepBudget
from aria.train.state import CheckpointError, RunState, gathered, trained_weights
from aria.train.trainer import Descent, LoopSettings, Position, Trainer

LOCK_NAME = ".lock"
SAMPLED = 4
"""Batches that a dry run looks at to tell steps and time."""


@dataclass
class Parts:
    """What a recipe makes before the loop starts."""

    recipe: Recipe
    parallel: Parallel
    module: nn.Module
    processor: AriaProcessor
    trainable: targets.Trainable
    stream: Any

    @property
    def aria(self) -> Aria:
        """The model in what is trained, which may hold training aids besides."""
        return aria_in(self.module)


def aria_in(module: nn.Module) -> Aria:
    """The model itself, or the attribute ``aria`` of a module that trains it with aids of its own."""
    model = module if isinstance(module, Aria) else getattr(module, "aria", None)
    if not isinstance(model, Aria):
        raise ValueError(
            f"[model] factory made a {type(module).__name__}; expected an Aria, or one as attribute `aria`"
        )
    return model


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    sampler: Sampler | None = None,
    stop_after: float | None = None,
    console: Console | None = None,
) -> str:
    """Train as the recipe says, from where the folder's last checkpoint is, and export what came of it.

    Args:
        recipe: what to train.
        out: folder of the run: recipe, log, checkpoints, export.
        sampler: writes answers for ``[evaluate] samples``.
        stop_after: seconds after which to save and stop; run again, it goes on.
        console: where progress is told; standard error where None.

    Returns:
        Why it ended: ``done``, ``data ended``, ``terminated`` or ``time is up``.

    Raises:
        ValueError: the recipe does not fit the model, the data, the machine, or the run that the folder holds.
        FloatingPointError: gradients were not finite; see :class:`aria.train.trainer.Trainer`.
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
        parts = _prepare(recipe, parallel, out, console if parallel.rank == 0 else None)
        return _run(parts, state, out, console, sampler, stop_after)
    except KeyboardInterrupt:
        # Outside of the loop, which saves, or asked for twice.
        if parallel.rank == 0:
            print_line(console or Console(stderr=True), _interrupted(out))
        raise
    finally:
        # Taken twice where the folder was there before; an error that is kept would keep the lock.
        lock.release(force=True)
        parallel.close()


def _lock(lock: BaseFileLock, out: Path) -> None:
    """Keep others out of a run's folder; the lock of a process that died does not hold."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{out} is being trained in by another process; wait for its end, or name another --out"
        ) from None


def _interrupted(out: Path) -> str:
    """What to say where a run ends without another checkpoint."""
    found = RunState.latest_in(out)
    if found is None:
        return "interrupted before the first checkpoint; nothing is saved"
    return f"interrupted; step {int(found.name.rpartition('-')[2])} is saved in {out}; rerun to resume"


def begun(out: str | Path) -> bool:
    """Whether a folder holds a run that can be gone on with."""
    return RunState.latest_in(Path(out)) is not None


def dry(recipe: Recipe, out: Path | None = None) -> list[Table | str]:
    """What a training would take, and what of the model would train; nothing is loaded.

    Args:
        recipe: what would be trained.
        out: folder of the run, for the room on its disk.

    Data that are not there yet are no mistake here: a last line says so, and steps and time stay untold. Of several
    processes the first one tells.

    Raises:
        ValueError: it does not fit into memory, or the recipe does not fit the model.
    """
    settings = recipe.model
    if settings.factory is not None:
        raise ValueError("[model] factory makes the model by code of its own, which only running it can measure")
    config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
    parallel = Parallel.start(recipe.parallel)
    try:
        rate = measured_rate(parallel.device, weights_dtype(recipe, config, parallel.device))
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        model, trainable = _outline(recipe, config)
        sampled, density, notes = None, None, list[str]()
        try:
            stream, density = _stream(recipe, processor, config, parallel, notes.append)
        except FileNotFoundError as error:
            notes.append(f"A training needs what is not there yet: {error}")
        else:
            if isinstance(stream, DataStream):
                sampled = _sampled(stream, config, trained_parts(model, full=recipe.targets.method == "full"))
        plan = check(
            recipe,
            config,
            parallel.device,
            world=parallel.world,
            flops_rate=rate,
            sampled=sampled,
            density=density,
            out=out,
        )
        notes += [f"warning: {warning}" for warning in plan.storage.warnings()]
        return [] if parallel.rank else [trainable.table(), plan.table(), *filter(None, notes)]
    finally:
        parallel.close()


def _outline(recipe: Recipe, config: AriaConfig) -> tuple[Aria, targets.Trainable]:
    """The model without its weights, and what trains of it: mistakes come out before tens of gigabytes are read.

    Raises:
        ValueError: targets, adapter, optimizer or objective do not fit the model.
    """
    with torch.device("meta"):
        model = Aria(config)
    trainable = targets.apply(model, recipe.targets)
    if recipe.model.adapter is not None:
        train_on(model, recipe.model.adapter)
    make_optimizer(((name, p) for name, p in model.named_parameters() if p.requires_grad), recipe.optimizer)
    if recipe.objective.factory is None:
        Objective(model, recipe.objective)
    else:
        load_object(recipe.objective.factory, "[objective] factory")
    return model, trainable


def _sampled(stream: DataStream, config: AriaConfig, trained: Trained) -> Sampled | None:
    """What the first batches are like."""
    reading: Any = iter(stream)
    with contextlib.closing(reading) as batches:
        flops = [batch_flops(config, trained, b.lengths, b.labels, b.crops) for b in islice(batches, SAMPLED)]
    return Sampled(len(flops) / stream.epochs, sum(flops) / len(flops)) if stream.epochs else None


def _claim(out: Path, recipe: Recipe, parallel: Parallel, lock: BaseFileLock, *, begun: bool) -> None:
    """Put the resolved recipe into the run's folder; one with another recipe's checkpoints or weights is refused."""
    file = out / FILE_NAME
    if recipe.targets.method == "lora" and (out / EXPORT / CONFIG_NAME).is_file():
        raise ValueError(
            f"{out / EXPORT} holds the weights of an earlier training, and what is read from there would be these and "
            "not the adapter: move them away, or name another --out"
        )
    there = Recipe.read(file) if file.is_file() else None
    if begun and there is not None:
        _same(file, there, recipe)
    parallel.barrier()
    if parallel.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        _lock(lock, out)
    # One that says the same may be a person's own, with comments.
    if parallel.rank == 0 and there != recipe:
        write_file(file, recipe.to_toml())
    parallel.barrier()


def _same(file: Path, there: Recipe, recipe: Recipe) -> None:
    """Refuse another recipe than a run was begun with, but for what may differ."""
    if found := changes(there, recipe):
        raise ValueError(
            f"{file.parent} holds checkpoints of another recipe ({'; '.join(found[:6])}); name another --out, or go on "
            f"with the recipe that is there: {file}"
        )


def _prepare(recipe: Recipe, parallel: Parallel, out: Path, console: Console | None) -> Parts:
    """The model with its weights, what trains of it chosen and spread over the ranks."""
    settings = recipe.model

    def say(text: str) -> None:
        if console is not None and text:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    # Ranks with data of their own draw dropout of their own.
    torch.manual_seed(recipe.seed + parallel.data_rank)
    if settings.factory is not None:
        module = load_object(settings.factory, "[model] factory")(recipe).to(parallel.device)
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        stream, _ = _stream(recipe, processor, aria_in(module).config, parallel, say)
    else:
        config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        _outline(recipe, config)
        stream, density = _stream(recipe, processor, config, parallel, say)
        plan = check(recipe, config, parallel.device, world=parallel.world, density=density, out=out)
        if console is not None:
            console.print(plan.table())
        for warning in plan.storage.warnings():
            say(f"warning: {warning}")
        module = _load(recipe, config, parallel.device)
    aria = aria_in(module)
    trainable = targets.apply(aria, recipe.targets)
    if settings.adapter is not None:
        train_on(aria, settings.adapter)
    module.train()
    if console is not None:
        console.print(trainable.table())
    return Parts(recipe, parallel, parallel.apply(module, recipe.parallel), processor, trainable, stream)


@torch.no_grad()
def train_on(model: Aria, folder: str) -> None:
    """Give a model's fresh adapters the values of stored ones.

    Raises:
        ValueError: they stand in other places, or have another rank.
    """
    stored, fresh = read_adapter(folder, model.config).weights, lora_modules(model)
    if others := sorted(stored.keys() ^ fresh.keys()):
        raise ValueError(
            f"[model] adapter {folder} adapts other modules than [targets] chooses: {', '.join(others[:4])}"
        )
    for name, adapter in fresh.items():
        lora = stored[name]
        if lora.a.shape != adapter.a.shape:
            found, wanted = tuple(lora.a.shape), tuple(adapter.a.shape)
            raise ValueError(f"[model] adapter {folder} has {found} at {name}, but [targets] rank makes it {wanted}")
        adapter.a.copy_(lora.a)
        adapter.b.copy_(lora.b * (lora.scaling / adapter.scaling))


def _load(recipe: Recipe, config: AriaConfig, device: torch.device) -> Aria:
    settings = recipe.model
    dtype = None if settings.dtype == "auto" else settings.dtype
    if settings.random:
        wanted = dtype or ("float32" if device.type == "cpu" else None)
        return Aria.random(
            config, dtype=None if wanted is None else parse_dtype(wanted), device=device, seed=recipe.seed
        )
    model = load_model(settings.path, revision=settings.revision, dtype=dtype, device=device)
    model.config = config
    return model


def _run(
    parts: Parts, state: RunState, out: Path, console: Console, sampler: Sampler | None, stop_after: float | None
) -> str:
    """Put the parts into the loop, resume, train, export."""
    recipe, parallel = parts.recipe, parts.parallel
    parameters = {name: p for name, p in parts.module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.items(), recipe.optimizer)
    descent = Descent(
        parameters,
        optimizer,
        clip=clip_gradients,
        clip_norm=recipe.optimizer.clip_norm,
        average=recipe.schedule.average,
        sources=optimizer.masters(),
    )
    stream = parts.stream
    position = Position()
    saved = Saved(parts.module, optimizer, descent.average, stream, position)
    meta = state.load(saved) if state.latest() is not None else None
    objective, flops = _objective(parts)
    evaluation = Evaluation(parts.aria, objective, recipe, parts.processor, parallel, descent, out, position, sampler)
    reporter = make_reporter(recipe, out, console, position.step) if parallel.rank == 0 else None
    parallel.barrier()  # the log has been cut to where the run goes on
    evaluated = last_evaluated(out / LOG_NAME)
    trainer = Trainer(
        objective,
        stream,
        descent,
        StepBudget(1),
        _loop_settings(recipe, parallel, stop_after),
        parallel,
        position=position,
        data_ranks=parallel.data_world,
        save=lambda wait, prune: state.save(saved, wait=wait, prune=prune),
        due=state.due,
        evaluate=evaluation.run if recipe.evaluate.data else None,
        reporter=reporter,
        flops=flops,
        evaluated=evaluated,
    )

    def budget(of: Recipe) -> Budget:
        return make_budget(of, stream, lambda: trainer.clock.seconds)

    trainer.budget = budget(recipe)
    try:
        if reporter is not None:
            lines = [] if meta is None else course(meta, recipe, parallel, budget, position.step)
            for line in [*lines, *rounded_epochs(recipe, stream)]:
                reporter.say(line)
        failed: Exception | None = None
        try:
            reason = trainer.run()
        except Exception as error:
            # What was trained must not be lost with its checkpoint, nor for held-out data. Ranks agree on the former.
            if not (state.failed or (trainer.finished and parallel.world == 1)):
                raise
            failed, reason = error, "failed"
        report = getattr(stream, "report", None)
        if isinstance(report, Report):
            # Each rank has met only its own rows.
            report = Report.joined(parallel.collect(report))
        if failed is not None or reason in ("done", "data ended"):
            with descent.averaged():
                _export(parts, out / EXPORT, position.step, failed)
        if reporter is not None:
            reporter.close()
            say_end(reporter, reason, trainer, report, out, beside=recipe.model if lora_modules(parts.aria) else None)
    finally:
        if reporter is not None:
            reporter.close()
        state.close()
    return reason


def _export(parts: Parts, folder: Path, step: int, failed: Exception | None) -> None:
    """Export the weights of a step; where the run failed before, raise an error that also says what became of these."""
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


def _stream(
    recipe: Recipe, processor: AriaProcessor, config: AriaConfig, parallel: Parallel, say: Callable[[str], None]
) -> tuple[Any, float | None]:
    """Batches of this rank, and how dense pictures are in the rows that were looked at (:class:`Look`), None if none
    were. Some rows, held-out ones too, are checked: what they lack is reported before training.
    """
    data = recipe.data
    if recipe.evaluate.data:
        found = check_held_out(recipe, processor, config, parallel)
        say(judge(parallel.collect(found), "held-out rows", data.on_error))
    if recipe.data.factory is not None:
        make = load_object(recipe.data.factory, "[data] factory")
        return make(recipe, processor, parallel.data_rank, parallel.data_world), None
    stream = make_stream(
        data,
        processor,
        config,
        tokens=recipe.batch.tokens,
        rank=parallel.data_rank,
        world=parallel.data_world,
        seed=recipe.seed,
        passes=recipe.budget.epochs,
    )
    encoder = Encoder(processor, config, data, recipe.batch.tokens)
    looks = parallel.collect(look(stream.sources, encoder, data, rank=parallel.data_rank, world=parallel.data_world))
    say(judge(looks, "training rows", data.on_error))
    return stream, max(one.density for one in looks)


def _objective(parts: Parts) -> tuple[Callable[[Any, Step], Losses], Callable[[Any], float] | None]:
    """The objective, and the FLOPs of one rank for its batches where they are known."""
    recipe, aria = parts.recipe, parts.aria
    if recipe.objective.factory is not None:
        make = load_object(recipe.objective.factory, "[objective] factory")
        return make(parts.module, recipe, parts.parallel), None
    images = parts.processor.image_processor
    objective = Objective(aria, recipe.objective, mean=images.image_mean, std=images.image_std, ranks=parts.parallel)
    trained = trained_parts(aria, full=recipe.targets.method == "full")

    def flops(batch: Any) -> float:
        # Asked after the objective was. Ranks that share sequences share their work.
        whole = batch_flops(aria.config, trained, batch.lengths, batch.labels, objective.encoded)
        return whole / parts.parallel.sequence

    return objective, flops


def trained_parts(aria: Aria, *, full: bool) -> Trained:
    """Where gradients flow: through everything after the first part that trains."""
    return Trained.of(aria, full=full)


def _loop_settings(recipe: Recipe, parallel: Parallel, stop_after: float | None) -> LoopSettings:
    kind = torch.bfloat16 if parallel.device.type == "cuda" else torch.float32
    return LoopSettings(
        accumulate=recipe.batch.accumulate,
        log_every=recipe.log.every,
        evaluate_every=recipe.evaluate.every,
        max_skipped=recipe.schedule.max_skipped,
        schedule=schedule_of(recipe),
        stop_after=stop_after,
        rate=measured_rate(parallel.device, kind) if parallel.rank == 0 else None,
    )


def export(parts: Parts, folder: Path) -> None:
    """Write what came of a training: the adapter as PEFT's folder, or the whole model with its processor.

    All ranks have to call it together; the first one writes, and nobody waits for it: a slow disk may take longer than
    exchanges may.
    """
    weights = gathered(parts.aria, trained=bool(lora_modules(parts.aria)))
    if parts.parallel.rank == 0:
        _write(parts.recipe, parts.aria.config, weights, parts.processor, folder)


def export_checkpoint(out: str | Path, expected: Recipe | None = None) -> Path:
    """Write the export of a run's newest checkpoint, in one process and without a GPU, whatever it was trained on.

    Args:
        out: folder of the run.
        expected: what the run should be of; None takes any.

    Returns:
        The folder that was written.

    Raises:
        FileNotFoundError: the folder holds no run, or no checkpoint.
        ValueError: the run's model is made by code of its own, or the run is not of the recipe that is expected.
    """
    out = Path(out)
    if not (file := out / FILE_NAME).is_file():
        raise FileNotFoundError(f"{out} holds no run (no {FILE_NAME} in it); name the --out that was trained in")
    recipe = Recipe.read(file)
    if expected is not None:
        _same(file, recipe, expected)
    settings = recipe.model
    if settings.factory is not None:
        raise ValueError("[model] factory makes the model by code of its own; let the run end to export it")
    weights = trained_weights(out)
    config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
    if recipe.targets.method == "full":
        base = _load(recipe, config, torch.device("cpu")).state_dict()
        weights = {name: weights.get(name, tensor).to(tensor.dtype) for name, tensor in base.items()}
    processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
    _write(recipe, config, weights, processor, out / EXPORT)
    return out / EXPORT


def _write(
    recipe: Recipe, config: AriaConfig, weights: Mapping[str, Tensor], processor: AriaProcessor, folder: Path
) -> None:
    if recipe.targets.method == "full":
        save_checkpoint(weights, config, folder)
        processor.save_pretrained(folder)
        # Of an earlier training in this folder; transformers would add it to the weights.
        for name in (ADAPTER_NAME, ADAPTER_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    # The adapters alone, beside weights that take no memory: on many ranks the model here has only parts of its own.
    with torch.device("meta"):
        model = Aria(config)
    targets.apply(model, recipe.targets)
    save_adapter(model, folder, base_model=recipe.model.path, revision=recipe.model.revision, state=weights)
