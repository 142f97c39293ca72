"""What a training takes: memory by part, steps, time, and what to change if it does not fit.

Weights, gradients and optimizer state are counted on the meta device. The activations that a layer keeps for backward
are measured on the CPU, on one layer of the real widths over a few tokens, so that the number always matches the code;
only for the decoder on CUDA, whose kernels keep less, they are computed.

T tokens, D hidden, V vocabulary, L layers, P patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.table import Table
from torch import Tensor, nn

from aria.config import AriaConfig, parse_dtype
from aria.model import Aria, Packed
from aria.ops import Segments
from aria.train import targets
from aria.train.cost import Trained, token_flops
from aria.train.optimizer import OptimizerSettings, make_optimizer
from aria.train.progress import duration
from aria.train.recipe import Recipe
from aria.train.storage import Storage
from aria.wording import format_bytes as size

RESERVE = 2 << 30
"""Bytes on CUDA for the runtime, kernel workspaces and fragmentation; a tenth of it on the CPU."""
CHUNK_LOGITS = 2**25
"""Logits that the head's loss holds at a time (:func:`aria.train.loss.linear_cross_entropy`)."""
SHORTEST = 512
"""Smallest micro-batch that is suggested, in tokens."""
SHARE_OF_RATE = {"cuda": 0.35, "cpu": 0.3}
"""Fraction of the measured rate of matrix products that a training is estimated to reach."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    working: int
    """One recomputed layer and its backward pass, or a chunk of images, whichever is more."""
    logits: int
    pictures: int
    """Cache of image tokens; 0 where it is in host memory."""
    reserve: int
    saving: int = 0
    """The copy that a save makes of the state, on the CPU."""
    whole: int = 0
    """Not a part: the unsharded model and the reserve on a rank that has just read the weights."""

    @property
    def parts(self) -> dict[str, int]:
        """The parts that are in memory during training, without empty ones."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value and name != "whole"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def most(self) -> int:
        """Peak memory, during training or before."""
        return max(self.total, self.whole)


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count tensors that autograd keeps for backward, each storage once, without the parameters.

    Yields:
        A function that returns the bytes so far.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    # Kept alive, so that no other tensor can reuse their memory and be mistaken for one of them.
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(found.values())


def layer_bytes(config: AriaConfig, chosen: targets.Targets, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per token that one decoder layer keeps, and bytes per patch that one layer of the vision encoder keeps.

    The layers have the real widths but only as many experts as a token is routed to: the others keep nothing.
    """
    text = dataclasses.replace(
        config.text, num_hidden_layers=1, moe_num_experts=config.text.moe_topk, vocab_size=config.image_token_index + 1
    )
    vision = dataclasses.replace(config.vision, num_hidden_layers=1)
    small = dataclasses.replace(config, text=text, vision=vision)
    with torch.device("meta"):
        model = Aria(small).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.lay_out()  # in the checkpoint's layout, 16-bit products take ten times as long on many CPUs
    _apply_uniformly(model, chosen)
    model.train()
    counts = (16, 48)
    decoder = [_decoder_bytes(model, n) for n in counts]
    seen = [_vision_bytes(model, n) for n in counts]
    more = counts[1] - counts[0]
    return (decoder[1] - decoder[0]) / more, (seen[1] - seen[0]) / more


def kernel_bytes(config: AriaConfig, dtype: torch.dtype) -> float:
    """Bytes per token that a decoder layer keeps with the training kernels, which run on CUDA.

    Eight rows of D (inputs and outputs of both norms, q, k, v and the output of attention), the first product of A
    experts, and gate, up and their product of the shared experts.
    """
    text = config.text
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    experts = 2 * text.moe_topk * text.intermediate_size + 3 * text.shared_size
    return (4 * text.hidden_size + heads + experts) * dtype.itemsize


def _apply_uniformly(model: Aria, chosen: targets.Targets) -> None:
    """Apply targets to a model of one layer; patterns for single layers may match nothing there, and are dropped."""
    chosen = dataclasses.replace(chosen, freeze_llm_layers=())
    try:
        targets.apply(model, chosen)
    except ValueError:
        targets.apply(model, dataclasses.replace(chosen, modules=None, freeze=()))


def _decoder_bytes(model: Aria, tokens: int) -> int:
    x = torch.zeros(tokens, model.config.text.hidden_size, dtype=model.dtype)
    layer = model.language_model.model.layers[0]
    with saved_bytes(model) as count:
        kept = layer(x.requires_grad_(), Packed(model.config.text, Segments.of([tokens])))
        found = count()
    del kept
    return found


def _vision_bytes(model: Aria, patches: int) -> int:
    tower = model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        return 0
    x = torch.zeros(patches, model.config.vision.hidden_size, dtype=model.dtype)
    with saved_bytes(model) as count:
        kept = tower.encoder.layers[0](x.requires_grad_(), Segments.of([patches]))
        found = count()
    del kept
    return found


def state_bytes(settings: OptimizerSettings, dtype: torch.dtype) -> float:
    """Bytes of optimizer state per parameter, masters included, measured on a small matrix."""
    weight = nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    optimizer = make_optimizer([("layer.weight", weight)], dataclasses.replace(settings, rates={}))
    found = {}

    def collect(value: object) -> None:
        if isinstance(value, Tensor) and value.numel() > 1:
            storage = value.untyped_storage()
            if storage.data_ptr() != weight.untyped_storage().data_ptr():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(optimizer.state_dict())
    return sum(found.values()) / weight.numel()


@dataclass(frozen=True)
class _Counts:
    """Sizes of a model with some targets, shared by recipes with the same targets."""

    base: int
    adapters: int
    layer: int
    trained: Mapping[torch.dtype, int]
    """Parameters that train, by dtype."""
    head: int
    """Parameters of the head if it trains itself."""
    per_token: float
    per_patch: float


class Estimator:
    """Estimates the memory of training one model on one kind of device."""

    def __init__(self, config: AriaConfig, device: torch.device):
        self.config, self._device = config, device
        self._counted: dict[str, _Counts] = {}

    def memory(self, recipe: Recipe, world: int = 1, density: float | None = None) -> Memory:
        """Memory of one of ``world`` ranks.

        Args:
            recipe: The recipe.
            world: World size.
            density: Maximum image patches per token of any row of the data; None: as many as possible.
        """
        config, text = self.config, self.config.text
        dtype = weights_dtype(recipe, config, self._device)
        counts = self._count(recipe.targets, dtype)
        # Each rank holds its shard, and unsharded the current layer and the prefetched next one.
        # A frozen vision encoder is not sharded (aria.train.parallel).
        unsharded = 0 if world == 1 or counts.per_patch else config.vision.num_parameters() * dtype.itemsize
        weights = (counts.base - unsharded) / world + unsharded + (2 * counts.layer if world > 1 else 0)
        state = _state(recipe, counts)
        T, inputs = recipe.batch.tokens, text.hidden_size * dtype.itemsize
        # Embeddings and image tokens cover all tokens on every rank; layers and head only this rank's part.
        own = T / recipe.parallel.sequence
        recomputed = {"none": 0.0, "selective": 0.5, "full": 1.0}[recipe.parallel.checkpointing]
        kept = own * text.num_hidden_layers * (inputs + (1 - recomputed) * counts.per_token)
        patches = _patches(recipe, config, density)
        vision, width = config.vision, config.vision.hidden_size * dtype.itemsize
        seen = patches * vision.num_hidden_layers * ((1 - recomputed) * counts.per_patch)
        if counts.per_patch:
            seen += patches * vision.num_hidden_layers * width
        chunk = min(patches, recipe.objective.vision_chunk * vision.patches_per_side**2)
        wide = (vision.intermediate_size * dtype.itemsize + 6 * width) * chunk
        # The backward pass of a layer holds what forward kept, and gradients of about the same size.
        again = max(2.0 * own * counts.per_token, 2.0 * chunk * counts.per_patch)
        logits = min(CHUNK_LOGITS, own * text.vocab_size) * (2 * dtype.itemsize + 8) + 4 * counts.head
        reserve = RESERVE if self._device.type == "cuda" else RESERVE // 10
        return Memory(
            weights=round(weights),
            adapters=round(counts.adapters / world),
            gradients=round(state.weights / world),
            optimizer=round(state.optimizer / world),
            average=round(state.average / world),
            activations=round(kept + seen + 2 * inputs * T),
            working=round(max(again, wide)),
            logits=round(logits),
            pictures=recipe.objective.picture_bytes if self._device.type == "cpu" else 0,
            reserve=reserve,
            saving=round(state.all / world) if self._device.type == "cpu" else 0,
            # Every rank reads the model onto its device, and adapters are attached, before anything is sharded.
            whole=counts.base + counts.adapters + reserve if world > 1 else 0,
        )

    def crops(self, recipe: Recipe, density: float | None = None) -> int:
        """Maximum crops of a batch if the vision encoder keeps activations of them; else 0."""
        if not self._count(recipe.targets, weights_dtype(recipe, self.config, self._device)).per_patch:
            return 0
        return _patches(recipe, self.config, density) // max(self.config.projector.patch_to_query)

    def storage(self, recipe: Recipe, world: int = 1, out: Path | None = None) -> Storage:
        """Host memory and disk space of checkpoints and the export; ``out`` is the run's folder."""
        counts = self._count(recipe.targets, weights_dtype(recipe, self.config, self._device))
        state = _state(recipe, counts)
        return Storage.of(
            checkpoint=state.all,
            export=counts.base if recipe.targets.method == "full" else state.weights,
            gathered=counts.base if recipe.targets.method == "full" and self._device.type == "cuda" else state.weights,
            pictures=recipe.objective.picture_bytes if self._device.type == "cuda" else 0,
            keep=recipe.checkpoint.keep,
            world=world,
            out=out,
        )

    def _count(self, chosen: targets.Targets, dtype: torch.dtype) -> _Counts:
        key = f"{chosen} {dtype}"
        if key not in self._counted:
            with torch.device("meta"):
                model = Aria(self.config).to(dtype)
            before = dict(model.named_parameters())
            base = sum(p.nbytes for p in before.values())
            layer = sum(p.nbytes for p in model.language_model.model.layers[0].parameters())
            targets.apply(model, chosen)
            named = dict(model.named_parameters())
            trained: dict[torch.dtype, int] = {}
            for parameter in named.values():
                if parameter.requires_grad:
                    trained[parameter.dtype] = trained.get(parameter.dtype, 0) + parameter.numel()
            head = model.language_model.lm_head.weight
            per_token, per_patch = layer_bytes(self.config, chosen, dtype)
            self._counted[key] = _Counts(
                base,
                sum(p.nbytes for name, p in named.items() if name not in before),
                layer,
                trained,
                head.numel() if head.requires_grad else 0,
                kernel_bytes(self.config, dtype) if self._device.type == "cuda" else per_token,
                per_patch,
            )
        return self._counted[key]


class _State(NamedTuple):
    """Bytes of a checkpoint, over all ranks."""

    weights: float
    optimizer: float
    average: float

    @property
    def all(self) -> float:
        return sum(self)


def _state(recipe: Recipe, counts: _Counts) -> _State:
    return _State(
        sum(dtype.itemsize * count for dtype, count in counts.trained.items()),
        sum(count * state_bytes(recipe.optimizer, dtype) for dtype, count in counts.trained.items()),
        4 * sum(counts.trained.values()) if recipe.schedule.average is not None else 0,
    )


def weights_dtype(recipe: Recipe, config: AriaConfig, device: torch.device) -> torch.dtype:
    """Dtype of the model's weights."""
    if recipe.model.dtype != "auto":
        return parse_dtype(recipe.model.dtype)
    return config.dtype if device.type == "cuda" else torch.float32


def _patches(recipe: Recipe, config: AriaConfig, density: float | None) -> int:
    """Maximum patches of a micro-batch: by the densest row of the data if known, else full of images."""
    crops = {patches: recipe.batch.tokens // queries for patches, queries in config.projector.patch_to_query.items()}
    most = recipe.data.max_crops
    full = max(patches * (count if most is None else min(count, most)) for patches, count in crops.items())
    return full if density is None else min(full, math.ceil(density * recipe.batch.tokens))


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Sampled:
    """Averages over a few batches of the data."""

    batches: float
    """Micro-batches of one rank in an epoch."""
    flops: float
    """FLOPs of a micro-batch."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will take."""

    memory: Memory
    available: int
    step_tokens: int
    steps: int | None
    """None if it depends on the data or the time."""
    seconds: float | None
    device: str
    storage: Storage

    def table(self) -> Table:
        """The plan as a table."""
        table = Table("part", "memory", title=f"One rank on {self.device}", title_justify="left")
        table.columns[1].justify = "right"
        for name, value in self.memory.parts.items():
            table.add_row(name, size(value))
        table.add_section()
        table.add_row("total", size(self.memory.total))
        if self.memory.whole > self.memory.total:
            table.add_row("unsharded model, before training", size(self.memory.whole))
        table.add_row("free", size(self.available))
        table.add_section()
        for row in self.storage.rows():
            table.add_row(*row)
        table.add_section()
        table.add_row("tokens a step", f"{self.step_tokens:,}")
        if self.steps is not None:
            table.add_row("steps", f"{self.steps:,}")
            table.add_row("tokens", f"{self.steps * self.step_tokens:,}")
        if self.seconds is not None:
            table.add_row("time, roughly", duration(self.seconds))
        return table


def check(
    recipe: Recipe,
    config: AriaConfig,
    device: torch.device,
    *,
    world: int = 1,
    available: int | None = None,
    flops_rate: float | None = None,
    sampled: Sampled | None = None,
    density: float | None = None,
    out: Path | None = None,
) -> TrainingPlan:
    """Estimate what a training takes, and refuse one that does not fit.

    Args:
        recipe: The recipe.
        config: Configuration of the model.
        device: Device of a rank.
        world: World size.
        available: Free bytes of a device; None asks the device.
        flops_rate: FLOP/s of matrix products on the device, for the estimate of time.
        sampled: Averages over the data, for steps per epoch and FLOPs of images; None: full batches of text.
        density: Maximum image patches per token of any row of the data; None: as many as possible.
        out: Folder of the run, for its free disk space.

    Raises:
        ValueError: It does not fit; the nearest settings that do are named.
    """
    free = available_bytes(device) if available is None else available
    estimator = Estimator(config, device)
    memory = estimator.memory(recipe, world, density)
    if memory.most > free:
        ways = list(_ways(recipe, estimator, device, world, free, density))
        fitting = "; ".join(ways) if ways else "nothing that was tried; use a device with more memory, or more devices"
        parts = ", ".join(f"{name} {size(value)}" for name, value in memory.parts.items())
        if memory.whole > free:
            parts += f"; before, every rank reads the whole model onto its device, which takes {size(memory.whole)}"
        raise ValueError(
            f"this training takes about {size(memory.most)} of memory on each device, but {size(free)} is free "
            f"({parts}). What would fit: {fitting}"
        )
    batch, budget = recipe.batch, recipe.budget
    ranks = world // recipe.parallel.sequence
    steps = budget.steps
    if budget.epochs is not None and sampled is not None:
        steps = math.ceil(budget.epochs * sampled.batches / batch.accumulate)
    storage = estimator.storage(recipe, world, out)
    seconds = budget.minutes * 60.0 if budget.minutes is not None else None
    if steps is not None and flops_rate is not None:
        each = batch.tokens * _token_flops(recipe, config) if sampled is None else sampled.flops
        # Ranks that share sequences share their work.
        each /= recipe.parallel.sequence
        seconds = steps * batch.accumulate * each / (flops_rate * SHARE_OF_RATE[device.type])
    return TrainingPlan(memory, free, batch.tokens * batch.accumulate * ranks, steps, seconds, str(device), storage)


def _token_flops(recipe: Recipe, config: AriaConfig) -> float:
    with torch.device("meta"):
        model = Aria(config)
    targets.apply(model, recipe.targets)
    return token_flops(config, Trained.of(model, full=recipe.targets.method == "full"))


def _ways(
    recipe: Recipe, estimator: Estimator, device: torch.device, world: int, free: int, density: float | None
) -> Iterator[str]:
    """The nearest settings that fit, one of each kind, as ``--set`` takes them; pairs only if no single one fits."""
    batch, changed = recipe.batch, dataclasses.replace
    shorter = [
        (
            f"batch.tokens={batch.tokens // n} and batch.accumulate={batch.accumulate * n}",
            {"batch": changed(batch, tokens=batch.tokens // n, accumulate=batch.accumulate * n)},
        )
        for n in (2, 4, 8, 16)
        if batch.tokens // n >= SHORTEST
    ]
    again = ("parallel.checkpointing=full", {"parallel": changed(recipe.parallel, checkpointing="full")})
    adapters = ("targets.method=lora", {"targets": changed(recipe.targets, method="lora")})
    # Fewer ranks then have data of their own, which more micro-batches make up for. Not in pairs: others change the
    # same sections.
    parallel, text = recipe.parallel, estimator.config.text
    shared = [
        (
            f"parallel.sequence={n} and batch.accumulate={batch.accumulate * n // parallel.sequence}",
            {
                "parallel": changed(parallel, sequence=n),
                "batch": changed(batch, accumulate=batch.accumulate * n // parallel.sequence),
            },
        )
        for n in (2, 4, 8)
        if n > parallel.sequence
        and not n % parallel.sequence
        and not any(x % n for x in (world, batch.tokens, text.num_attention_heads, text.num_key_value_heads))
    ]
    crops = estimator.crops(recipe, density)
    fewer = [
        (f"data.max_crops={crops // n}", {"data": changed(recipe.data, max_crops=crops // n)})
        for n in (2, 4, 8, 16, 32)
        if crops // n
    ]
    single: list[list[tuple[str, dict[str, Any]]]] = [shorter, fewer] if fewer else [shorter]
    if recipe.parallel.checkpointing != "full":
        single.append([again])
    if recipe.targets.method != "lora":
        single.append([adapters])
    pairs = [
        [(f"{a} and {b}", one | other) for a, one in first for b, other in second]
        for i, first in enumerate(single)
        for second in single[i + 1 :]
    ]
    counts = [n for n in (2, 4, 8, 16, 32, 64) if n > world] if device.type == "cuda" else []

    def most(settings: dict[str, Any], ranks: int) -> float:
        try:
            return estimator.memory(changed(recipe, **settings), ranks, density).most
        except ValueError:
            # Not valid with other settings of the recipe.
            return math.inf

    found = False
    for kinds in ([*single, shared], pairs):
        for kind in kinds:
            for words, settings in kind:
                need = most(settings, world)
                if need <= free:
                    found = True
                    yield f"{words} ({size(need)})"
                    break
        if found:
            break
    for words, settings in (("", {}), (f" and {again[0]}", again[1])):
        for n in counts:
            need = most(settings, n)
            if need <= free:
                yield f"{n} devices{words} ({size(need)} on each)"
                return
