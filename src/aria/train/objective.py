"""What a step descends: next-token cross-entropy over packed conversations, and the routers' auxiliary losses.

T tokens, D hidden, V vocabulary, Q picture tokens, C crops, L layers, E experts, R rank of an adapter.
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
    """``package.module:callable``, called with the model, the recipe and the :class:`Ranks`; gives an objective of the
    recipe's own. The other settings are then for it to read."""
    z_coefficient: float = Z_COEFFICIENT
    """Of the routers' z-loss; 0 leaves it out."""
    balance_coefficient: float = BALANCE_COEFFICIENT
    """Of the load-balance loss; 0 leaves it out."""
    balance_group: int = 1
    """Experts that are balanced together: 1 as in the authors' fine-tuning code, 8 as in their pre-training."""
    vision_chunk: int = 4
    """Crops that go through the vision encoder at a time."""
    picture_bytes: int = 0
    """Memory of the host, on each rank, for picture tokens: where neither encoder nor projector trains, a picture is
    encoded once and not in every epoch and every evaluation. The least recently used go first."""

    def __post_init__(self) -> None:
        for name in ("z_coefficient", "balance_coefficient", "picture_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} should be 0 or above, but is {getattr(self, name)}")
        for name in ("balance_group", "vision_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")


class Step(NamedTuple):
    """What a micro-batch is a part of."""

    labels: float
    """Targets of the whole optimizer step: all micro-batches of all ranks."""
    micro_batches: int
    """Micro-batches of the step, of all ranks that have data of their own."""
    progress: float
    """Share of the whole training that is done, 0 to 1."""


class Losses(NamedTuple):
    """What a micro-batch adds to a step; summed over all its micro-batches, everything is the step's."""

    total: Tensor
    """To be backwarded."""
    metrics: Mapping[str, Tensor]
    """Scalars without gradients."""
    loads: Tensor | None = None
    """float32 ``(L, E)``: share of the tokens' assignments that each expert took."""


class Objective:
    """The loss of :class:`aria.model.Aria` on a :class:`~aria.train.batch.Batch`.

    Cross-entropy is a sum over targets, divided by the targets of the whole step, so that a step has one gradient
    however it is cut into micro-batches and spread over ranks. Router losses are means over a micro-batch's tokens,
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
        """``mean`` and ``std`` normalise pictures, as the processor's do; ``ranks`` None means there is one process."""
        self.model, self.settings, self.ranks = model, settings or ObjectiveSettings(), ranks
        self._mean, self._std = mean, std
        self._kept = ImageCache(self.settings.picture_bytes)
        self.encoded: Sequence[Crops] = ()
        """Of the last batch, what the vision encoder was run on: all pictures but those that were kept."""
        text = model.config.text
        if text.moe_num_experts % self.settings.balance_group:
            raise ValueError(
                f"[objective] balance_group is {self.settings.balance_group}, which does not divide the model's "
                f"{text.moe_num_experts} experts"
            )
        if self._kept.capacity and self._sees():
            raise ValueError(
                f"[objective] picture_bytes is {self._kept.capacity:,}, but what the vision encoder or the projector "
                "gives changes while they train: set picture_bytes = 0, or freeze_vit and freeze_projector to true"
            )

    def __call__(self, batch: Batch, step: Step) -> Losses:
        """Losses of a batch that lies on the model's device."""
        model = self.model
        features_QD, tie = self._see(batch.crops)
        # Tied to the first of all tensors, so that gradients reach the encoder after the decoder, on every rank alike.
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
        # With a sequence over several ranks, each has a part of the tokens, and all parts count alike.
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
        """Picture tokens ``(Q, D)`` in the order of the crops, and a zero that ties what else was run to the loss.

        Every rank runs the same number of chunks, on a grey crop where it has no more of its own: a rank that did not
        call a module whose weights are spread over all ranks would let the others wait for ever. What trains runs once
        at least, so that there is always a gradient, be it zero.
        """
        kept = {picture.key: known for picture in crops if (known := self._kept.get(picture.key)) is not None}
        self.encoded = [picture for picture in crops if picture.key not in kept]
        # What is kept must not depend on what happened to be beside it, or a run that goes on would depart from one
        # that was never stopped: such pictures are encoded by themselves.
        portions = [[picture] for picture in self.encoded] if self._kept.capacity else [self.encoded]
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
        """Picture tokens of each picture: those that were kept, and those of the chunks, which are kept from now on."""
        made = iter(torch.cat(list(features)).split([self._places(p) for p in self.encoded]) if features else ())
        device = self.model.multi_modal_projector.query.device
        for picture in crops:
            if picture.key in kept:
                yield kept[picture.key].to(device, non_blocking=True)
                continue
            features_QD = next(made)
            if picture.key is not None:
                self._kept.put(picture.key, _on_host(features_QD))
            yield features_QD

    def _places(self, picture: Crops) -> int:
        """Picture tokens of a picture."""
        config = self.model.config
        grid = (picture.pixels.shape[-1] // config.vision.patch_size) ** 2
        return len(picture.extents) * config.projector.queries_for(grid)

    def _sees(self) -> bool:
        """Whether anything trains that picture tokens depend on."""
        return trains(self.model.vision_tower) or trains(self.model.multi_modal_projector)

    def _encode(self, crops: Crops) -> Tensor:
        """Crops of one size -> their picture tokens; a part that is frozen keeps nothing for gradients."""
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
        """One grey crop of the smallest size that the model knows, one patch of it real."""
        vision = self.model.config.vision
        side = min(self.model.config.image_sizes())
        pixels = torch.full((1, vision.num_channels, side, side), 128, dtype=torch.uint8)
        return Crops(pixels, ((vision.patch_size, vision.patch_size),))


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module asks for gradients."""
    return any(parameter.requires_grad for parameter in module.parameters())


def head_loss(head: nn.Module, hidden_TD: Tensor, targets_T: Tensor, denominator: float, labels: int | None) -> Any:
    """Cross-entropy of the language head, computed for tokens with a target only.

    Args:
        head: a linear layer without a bias, with a low-rank adapter or without.
        hidden_TD, targets_T: of all tokens.
        denominator: what the sum over targets is divided by.
        labels: number of targets where it is known; None computes all tokens.
    """
    if labels is not None and labels < len(targets_T):
        # Sorting finds the rows without the host, where a boolean mask would wait for their number.
        rows = (targets_T == IGNORE_INDEX).to(torch.uint8).argsort(stable=True)[:labels]
        hidden_TD, targets_T = hidden_TD.index_select(0, rows), targets_T.index_select(0, rows)
    weight_VD = head.weight
    assert isinstance(weight_VD, Tensor), "the head has a weight"
    lora = None
    if isinstance(head, LoRALinear):
        adapter = head.adapter.lora().to(hidden_TD)
        lora = ((F.dropout(hidden_TD, adapter.dropout) @ adapter.a.t()) * adapter.scaling, adapter.b)
    return linear_cross_entropy(hidden_TD, weight_VD, targets_T, denominator=denominator, lora=lora)


def _segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Segments of host lengths, sent to the device without waiting for it."""
    cu_seqlens = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
    if device.type == "cuda":
        cu_seqlens = cu_seqlens.pin_memory().to(device, non_blocking=True)
    return Segments(tuple(lengths), cu_seqlens.to(device))


def _on_host(tensor: Tensor) -> Tensor:
    """A copy on the host that nobody waits for: whoever sends it back does so on the same stream."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _chunks(crops: Sequence[Crops], most: int) -> Iterator[Crops]:
    """The same crops in the same order, in pieces of at most ``most`` and of one size each."""
    for _, alike in groupby(crops, lambda picture: picture.pixels.shape[-1]):
        pictures = list(alike)
        extents = [extent for picture in pictures for extent in picture.extents]
        pixels = torch.cat([picture.pixels for picture in pictures])
        for start in range(0, len(extents), most):
            yield Crops(pixels[start : start + most], tuple(extents[start : start + most]))
