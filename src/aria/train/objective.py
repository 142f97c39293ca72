"""The training objective: next-token cross-entropy over packed conversations, and the routers' auxiliary losses.

T tokens, D hidden, V vocabulary, Q image tokens, C crops, L layers, E experts, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria.model import Aria, Packed
from aria.model.context import Context
from aria.model.image_cache import ImageCache
from aria.model.lora import LoRALinear
from aria.model.patches import pack_crops
from aria.ops import Segments
from aria.processor.image_inputs import Crops
from aria.train.batch import Batch
from aria.train.loss import (
    BALANCE_COEFFICIENT,
    IGNORE_INDEX,
    Z_COEFFICIENT,
    linear_cross_entropy,
    router_losses,
)
from aria.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """``[objective]`` of a recipe."""

    factory: str | None = None
    """``package.module:callable``, called with the model, the recipe and the :class:`~aria.train.ranks.Ranks`; returns
    a custom objective, which may read the other settings."""
    z_coefficient: float = Z_COEFFICIENT
    """Coefficient of the routers' z-loss; 0 leaves it out."""
    balance_coefficient: float = BALANCE_COEFFICIENT
    """Coefficient of the load-balance loss; 0 leaves it out."""
    balance_group: int = 1
    """Experts that are balanced together: 1 as in the authors' fine-tuning code, 8 as in their pre-training."""
    vision_chunk: int = 4
    """Crops that go through the vision encoder at a time."""
    picture_bytes: int = 0
    """Host memory of each rank for a cache of image tokens: if encoder and projector are frozen, an image is encoded
    once, not in every epoch and evaluation. The least recently used are evicted first."""

    def __post_init__(self) -> None:
        for name in ("z_coefficient", "balance_coefficient", "picture_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} should be 0 or above, but is {getattr(self, name)}")
        for name in ("balance_group", "vision_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")


class Step(NamedTuple):
    """The optimizer step that a micro-batch belongs to."""

    labels: float
    """Targets of the whole step: all micro-batches of all ranks."""
    micro_batches: int
    """Micro-batches of the step over all ranks with data of their own."""
    progress: float
    """Fraction of the training that is done, 0 to 1."""


class Losses(NamedTuple):
    """What a micro-batch adds to a step; the sum over its micro-batches is the step's loss and metrics."""

    total: Tensor
    """Scalar to call ``.backward()`` on."""
    metrics: Mapping[str, Tensor]
    """Scalars without gradients."""
    loads: Tensor | None = None
    """float32 ``(L, E)``: fraction of the assignments that each expert took."""


class Objective:
    """The loss of :class:`aria.model.Aria` on a :class:`~aria.train.batch.Batch`.

    Cross-entropy is a sum over targets, divided by the targets of the whole step, so that the gradient of a step is the
    same however it is split into micro-batches and over ranks. Router losses are means over a micro-batch's tokens,
    divided by the number of micro-batches, as the authors trained.
    """

    def __init__(
        self,
        model: Aria,
        settings: ObjectiveSettings | None = None,
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        ranks: Ranks | None = None,
    ):
        """``mean`` and ``std`` normalize images, as in the processor; ``ranks`` None means one process."""
        self.model, self.settings, self.ranks = model, settings or ObjectiveSettings(), ranks
        self._mean, self._std = mean, std
        self._kept = ImageCache(self.settings.picture_bytes)
        self.encoded: Sequence[Crops] = ()
        """Images of the last batch that the vision encoder ran on: all except those in the cache."""
        text = model.config.text
        if text.moe_num_experts % self.settings.balance_group:
            raise ValueError(
                f"[objective] balance_group is {self.settings.balance_group}, which does not divide the model's "
                f"{text.moe_num_experts} experts"
            )
        if self._kept.capacity and self._sees():
            raise ValueError(
                f"[objective] picture_bytes is {self._kept.capacity:,}, but the outputs of the vision encoder and "
                "projector change while they train: set picture_bytes = 0, or freeze_vit and freeze_projector to true"
            )

    def __call__(self, batch: Batch, step: Step) -> Losses:
        """Losses of a batch on the model's device."""
        model = self.model
        features_QD, tie = self._see(batch.crops)
        # Tied to the first tensor of all, so that on every rank gradients reach the encoder after the decoder.
        x_TD = model.embed(batch.input_ids, features_QD) + tie
        segments = _segments(batch.lengths, x_TD.device)
        targets_T, counted_T = batch.targets, None
        if batch.filler:
            counted_T = torch.arange(len(targets_T), device=x_TD.device) < len(targets_T) - batch.filler
        labels: int | None = batch.labels
        context: Context
        if self.ranks is not None and self.ranks.sequence > 1:
            context, labels = self.ranks.context(model.config.text, segments), None
            x_TD, targets_T = self.ranks.shard(x_TD), self.ranks.shard(targets_T)
            counted_T = None if counted_T is None else self.ranks.shard(counted_T)
        else:
            context = Packed(model.config.text, segments)
        hidden_TD, router_logits = model.decode(x_TD, context, router_logits=True)
        answers = head_loss(model.language_model.lm_head, hidden_TD, targets_T, step.labels, labels)
        total, metrics, loads = self._router_losses(router_logits, counted_T, step)
        metrics = {"loss": answers.loss.detach(), "accuracy": answers.accuracy, **metrics}
        if self.ranks is not None and self.ranks.sequence > 1:
            joined = self.ranks.join(torch.stack([value.float() for value in metrics.values()]))
            metrics, loads = dict(zip(metrics, joined, strict=True)), self.ranks.join(loads)
        return Losses(answers.loss + total, metrics, loads)

    def _router_losses(
        self, router_logits: Sequence[Tensor], counted_T: Tensor | None, step: Step
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        settings, top_k = self.settings, self.model.config.text.moe_topk
        # Ranks that share a sequence each have a part of its tokens; all parts count equally.
        parts = step.micro_batches * (self.ranks.sequence if self.ranks is not None else 1)
        layers = [
            router_losses(
                logits_TE,
                top_k,
                z_coefficient=settings.z_coefficient / parts,
                balance_coefficient=settings.balance_coefficient / parts,
                balance_group=settings.balance_group,
                counted_T=counted_T,
            )
            for logits_TE in router_logits
        ]
        metrics = {}
        for number, layer in enumerate(layers):
            metrics[f"router z {number}"] = layer.z.detach()
            metrics[f"router balance {number}"] = layer.balance.detach()
        total = torch.stack([layer.z + layer.balance for layer in layers]).sum()
        return total, metrics, torch.stack([layer.load for layer in layers]) / parts

    def _see(self, crops: Sequence[Crops]) -> tuple[Tensor | None, Tensor | float]:
        """Image tokens ``(Q, D)`` in the order of the crops, and a zero that ties dummy runs to the loss.

        Every rank runs the same number of chunks, on a grey crop where it has no more of its own: the others would wait
        forever for a rank that does not call a sharded module. Trained parts run at least once, so that they always
        have a gradient, even if zero.
        """
        kept = {image.key: known for image in crops if (known := self._kept.get(image.key)) is not None}
        self.encoded = [image for image in crops if image.key not in kept]
        # Cached results must not depend on the other images of a chunk, or a resumed run would differ from one that
        # was never stopped: with a cache, images are encoded one by one.
        portions = [[image] for image in self.encoded] if self._kept.capacity else [self.encoded]
        chunks = [chunk for portion in portions for chunk in _chunks(portion, self.settings.vision_chunk)]
        least = max(len(chunks), int(self._sees()))
        most = least if self.ranks is None else self.ranks.max(least)
        features = [self._encode(chunk) for chunk in chunks]
        tie: Tensor | float = 0.0
        for _ in range(most - len(chunks)):
            dummy = self._encode(self._dummy())
            if dummy.requires_grad:
                tie = tie + dummy.sum() * 0.0
        if self._kept.capacity:
            features = list(self._joined(crops, kept, features))
        return (torch.cat(features) if features else None), tie

    def _joined(
        self, crops: Sequence[Crops], kept: Mapping[bytes | None, Tensor], features: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """Image tokens of each image: cached ones, and new ones, which are put into the cache."""
        made = iter(torch.cat(list(features)).split([self._places(p) for p in self.encoded]) if features else ())
        device = self.model.multi_modal_projector.query.device
        for image in crops:
            if image.key in kept:
                yield kept[image.key].to(device, non_blocking=True)
                continue
            features_QD = next(made)
            if image.key is not None:
                self._kept.put(image.key, _on_host(features_QD))
            yield features_QD

    def _places(self, image: Crops) -> int:
        """Number of image tokens of an image."""
        config = self.model.config
        grid = (image.pixels.shape[-1] // config.vision.patch_size) ** 2
        return len(image.extents) * config.projector.queries_for(grid)

    def _sees(self) -> bool:
        """Whether anything trains that image tokens depend on."""
        return trains(self.model.vision_tower) or trains(self.model.multi_modal_projector)

    def _encode(self, crops: Crops) -> Tensor:
        """Encode crops of one size to image tokens; frozen parts keep nothing for gradients."""
        model = self.model
        weight = model.vision_tower.embeddings.patch_embedding.weight
        patches = pack_crops(
            crops.pixels.to(weight.device, non_blocking=True),
            crops.extents,
            self._mean,
            self._std,
            model.config.vision,
            weight.dtype,
        )
        projector = model.multi_modal_projector
        seen = trains(model.vision_tower)
        with torch.set_grad_enabled(seen and torch.is_grad_enabled()):
            hidden = model.vision_tower(patches)
        with torch.set_grad_enabled((seen or trains(projector)) and torch.is_grad_enabled()):
            return projector(hidden, patches.segments, patches.grid_patches)

    def _dummy(self) -> Crops:
        """One grey crop of the model's smallest size, with one patch that is not padding."""
        vision = self.model.config.vision
        side = min(self.model.config.image_sizes())
        pixels = torch.full((1, vision.num_channels, side, side), 128, dtype=torch.uint8)
        return Crops(pixels, ((vision.patch_size, vision.patch_size),))


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module requires gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())


def head_loss(head: nn.Module, hidden_TD: Tensor, targets_T: Tensor, denominator: float, labels: int | None) -> Any:
    """Cross-entropy of the language head, computed only for tokens with a target.

    Args:
        head: Linear layer without a bias, with or without LoRA.
        hidden_TD, targets_T: Hidden states and targets of all tokens.
        denominator: Divisor of the sum over targets.
        labels: Number of targets if known; None computes all tokens.
    """
    if labels is not None and labels < len(targets_T):
        # Sorting needs no wait for the host; a boolean mask would wait for the number of rows.
        rows = (targets_T == IGNORE_INDEX).to(torch.uint8).argsort(stable=True)[:labels]
        hidden_TD, targets_T = hidden_TD.index_select(0, rows), targets_T.index_select(0, rows)
    weight_VD = head.weight
    assert isinstance(weight_VD, Tensor), "the head has no weight"
    lora = None
    if isinstance(head, LoRALinear):
        adapter = head.adapter.lora().to(hidden_TD)
        lora = ((F.dropout(hidden_TD, adapter.dropout) @ adapter.a.t()) * adapter.scaling, adapter.b)
    return linear_cross_entropy(hidden_TD, weight_VD, targets_T, denominator=denominator, lora=lora)


def _segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Segments on a device, copied from the host asynchronously."""
    cu_seqlens = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
    if device.type == "cuda":
        cu_seqlens = cu_seqlens.pin_memory().to(device, non_blocking=True)
    return Segments(tuple(lengths), cu_seqlens.to(device))


def _on_host(tensor: Tensor) -> Tensor:
    """An asynchronous copy on the host; it is sent back on the same stream, after the copy."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _chunks(crops: Sequence[Crops], most: int) -> Iterator[Crops]:
    """The same crops in the same order, in chunks of at most ``most`` crops of one size."""
    for _, alike in groupby(crops, lambda image: image.pixels.shape[-1]):
        images = list(alike)
        extents = [extent for image in images for extent in image.extents]
        pixels = torch.cat([image.pixels for image in images])
        for start in range(0, len(extents), most):
            yield Crops(pixels[start : start + most], tuple(extents[start : start + most]))
