"""From a recipe to the parts of a run: model, data, objective, optimizer and trainer, each made once and complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from aria.checkpoint import load_model
from aria.checkpoint.adapter import read_adapter
from aria.config import AriaConfig, parse_dtype
from aria.model import Aria
from aria.model.lora import lora_modules
from aria.processor import AriaProcessor
from aria.train import targets
from aria.train.console import make_reporter
from aria.train.cost import Trained, batch_flops
from aria.train.data.encode import RowEncoder
from aria.train.data.look import judge, look
from aria.train.evaluate import Evaluation, Sampler, check_held_out, rank_stream
from aria.train.objective import Losses, Objective, Step
from aria.train.optimizer import clip_gradients, make_optimizer
from aria.train.parallel import Parallel
from aria.train.preflight import check
from aria.train.progress import LOG_NAME, Reporter, last_evaluated, measured_rate
from aria.train.recipe import Recipe, load_object
from aria.train.resume import Saved, make_budget, schedule_of
from aria.train.state import RunState
from aria.train.trainer import Clock, LoopSettings, Trainer
from aria.train.update import ParameterUpdate


@dataclass
class Parts:
    """What a recipe makes before the optimizer exists and a checkpoint is read."""

    recipe: Recipe
    parallel: Parallel
    module: nn.Module
    processor: AriaProcessor
    trainable: targets.Trainable
    stream: Any

    @property
    def aria(self) -> Aria:
        """The model inside the trained module, which may have further parts that only training needs."""
        return aria_in(self.module)


def aria_in(module: nn.Module) -> Aria:
    """The module itself if it is the model, else its attribute ``aria``."""
    model = module if isinstance(module, Aria) else getattr(module, "aria", None)
    if not isinstance(model, Aria):
        raise ValueError(
            f"[model] factory made a {type(module).__name__}; expected an Aria, or one as attribute `aria`"
        )
    return model


def prepare(recipe: Recipe, parallel: Parallel, out: Path, console: Console | None) -> Parts:
    """Open the data, read the weights, choose what trains, and spread the model over the ranks.

    Mistakes in the recipe or the data are raised before weights are read.

    Args:
        recipe: The recipe.
        parallel: The ranks.
        out: Folder of the run.
        console: Gets the memory plan, the table of trained parameters and warnings; None prints nothing.
    """
    settings = recipe.model

    def say(text: str) -> None:
        if console is not None and text:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    # Ranks with data of their own draw their own dropout masks.
    torch.manual_seed(recipe.seed + parallel.data_rank)
    if settings.factory is not None:
        module = load_object(settings.factory, "[model] factory")(recipe).to(parallel.device)
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        stream, _ = open_stream(recipe, processor, aria_in(module).config, parallel, say)
    else:
        config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
        processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
        outline(recipe, config)
        stream, density = open_stream(recipe, processor, config, parallel, say)
        plan = check(recipe, config, parallel.device, world=parallel.world, density=density, out=out)
        if console is not None:
            console.print(plan.table())
        for warning in plan.storage.warnings():
            say(f"warning: {warning}")
        module = load(recipe, config, parallel.device)
    aria = aria_in(module)
    trainable = targets.apply(aria, recipe.targets)
    if settings.adapter is not None:
        start_from_adapter(aria, settings.adapter)
    module.train()
    if console is not None:
        console.print(trainable.table())
    return Parts(recipe, parallel, parallel.apply(module, recipe.parallel), processor, trainable, stream)


def outline(recipe: Recipe, config: AriaConfig) -> tuple[Aria, targets.Trainable]:
    """The model without its weights, and what trains of it. Finds mistakes before tens of gigabytes are read.

    Raises:
        ValueError: Targets, adapter, optimizer or objective do not fit the model.
    """
    with torch.device("meta"):
        model = Aria(config)
    trainable = targets.apply(model, recipe.targets)
    if recipe.model.adapter is not None:
        start_from_adapter(model, recipe.model.adapter)
    make_optimizer(((name, p) for name, p in model.named_parameters() if p.requires_grad), recipe.optimizer)
    if recipe.objective.factory is None:
        Objective(model, recipe.objective)
    else:
        load_object(recipe.objective.factory, "[objective] factory")
    return model, trainable


def load(recipe: Recipe, config: AriaConfig, device: torch.device) -> Aria:
    """The base model with its weights, or with random ones if the recipe says so."""
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


@torch.no_grad()
def start_from_adapter(model: Aria, folder: str) -> None:
    """Copy a stored adapter into a model's fresh adapters.

    Raises:
        ValueError: It adapts other modules, or has another rank.
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


def open_stream(
    recipe: Recipe, processor: AriaProcessor, config: AriaConfig, parallel: Parallel, say: Callable[[str], None]
) -> tuple[Any, float | None]:
    """Open this rank's batches, and check some rows of the data and of the held-out data.

    Returns:
        The stream, and the density of images in the rows that were checked (:class:`~aria.train.data.look.Look`); None
        with a ``[data] factory``, whose rows are not checked.
    """
    data = recipe.data
    if recipe.evaluate.data:
        found = check_held_out(recipe, processor, config, parallel)
        say(judge(parallel.collect(found), "held-out rows", data.on_error))
    if recipe.data.factory is not None:
        make = load_object(recipe.data.factory, "[data] factory")
        return make(recipe, processor, parallel.data_rank, parallel.data_world), None
    stream = rank_stream(data, recipe, processor, config, parallel, passes=recipe.budget.epochs)
    encoder = RowEncoder(processor, config, data, recipe.batch.tokens)
    looks = parallel.collect(look(stream.sources, encoder, data, rank=parallel.data_rank, world=parallel.data_world))
    say(judge(looks, "training rows", data.on_error))
    return stream, max(one.density for one in looks)


def make_update(parts: Parts) -> ParameterUpdate:
    """The optimizer over everything that trains, with clipping and averaging."""
    recipe = parts.recipe
    parameters = {name: p for name, p in parts.module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters.items(), recipe.optimizer)
    return ParameterUpdate(
        parameters,
        optimizer,
        clip=clip_gradients,
        clip_norm=recipe.optimizer.clip_norm,
        average=recipe.schedule.average,
        sources=optimizer.masters(),
    )


def make_objective(parts: Parts) -> tuple[Callable[[Any, Step], Losses], Callable[[Any], float] | None]:
    """The objective, and this rank's FLOPs of a batch where they are known."""
    recipe, aria = parts.recipe, parts.aria
    if recipe.objective.factory is not None:
        make = load_object(recipe.objective.factory, "[objective] factory")
        return make(parts.module, recipe, parts.parallel), None
    images = parts.processor.image_processor
    objective = Objective(aria, recipe.objective, mean=images.image_mean, std=images.image_std, ranks=parts.parallel)
    trained = Trained.of(aria, full=recipe.targets.method == "full")

    def flops(batch: Any) -> float:
        # Called after the objective. Ranks that share sequences share their work.
        whole = batch_flops(aria.config, trained, batch.lengths, batch.labels, objective.encoded)
        return whole / parts.parallel.sequence

    return objective, flops


def make_trainer(
    parts: Parts,
    update: ParameterUpdate,
    saved: Saved,
    state: RunState,
    out: Path,
    *,
    console: Console,
    sampler: Sampler | None,
    stop_after: float | None,
) -> tuple[Trainer, Reporter | None]:
    """The training loop at the position that was saved, and the reporter of rank 0.

    Args:
        parts: Model, data and ranks.
        update: Updates the parameters.
        saved: The state of the run, already loaded if the run is resumed.
        state: Writes ``saved`` as checkpoints.
        out: Folder of the run.
        console: Shows progress on rank 0.
        sampler: Writes answers for ``[evaluate] samples``.
        stop_after: Seconds after which to save and stop.
    """
    recipe, parallel, position = parts.recipe, parts.parallel, saved.position
    objective, flops = make_objective(parts)
    evaluation = Evaluation(parts.aria, objective, recipe, parts.processor, parallel, update, out, position, sampler)
    reporter = make_reporter(recipe, out, console, position.step) if parallel.rank == 0 else None
    parallel.barrier()  # rank 0 has cut the log back to the step that the run resumes from
    settings = _loop_settings(recipe, parallel, stop_after)
    clock = Clock(position.seconds)
    trainer = Trainer(
        objective,
        parts.stream,
        update,
        make_budget(recipe, parts.stream, lambda: clock.seconds),
        settings,
        parallel,
        position=position,
        clock=clock,
        data_ranks=parallel.data_world,
        save=lambda wait, prune: state.save(saved, wait=wait, prune=prune),
        due=state.due,
        evaluate=evaluation.run if recipe.evaluate.data else None,
        reporter=reporter,
        flops=flops,
        evaluated=last_evaluated(out / LOG_NAME),
    )
    return trainer, reporter


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
