"""Nano's losses: dense labels on patches and queries first, then answers as well.

T tokens, D hidden, P patches of an image, Q queries of an image, K points of a query, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aria.model import Aria
from aria.ops import Segments
from aria.train.loss import IGNORE_INDEX, CrossEntropy, linear_cross_entropy, router_losses
from recipes.nano.train.fixed_shapes import FixedPatches, TrainingContext, bounded_segments, fixed_patches
from recipes.nano.train.model import DenseHeads, initialise

Batch = Mapping[str, Any]
Losses = tuple[Tensor, dict[str, Tensor]]


class Phase(NamedTuple):
    """Which losses are computed, and on which share of each image's patches and queries."""

    patches: bool
    queries: bool
    answers: bool
    share: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Schedule of the losses, in shares of the whole training.

    Patches are trained from the start, queries once patches mean something, answers once queries do. Text batches are
    trained from the start.

    Attributes:
        queries: Start of the loss on queries.
        answers: Start of the loss on answers; from here the weight of the dense losses falls.
        settled: End of that fall.
        beside: Final weight of the dense losses; 0 leaves answers alone.
        kept: Share of each image's patches and queries, drawn at random, that the dense losses use once settled.
    """

    queries: float = 0.01
    answers: float = 0.03
    settled: float = 0.25
    beside: float = 0.3
    kept: float = 0.5

    def weights(self, progress: float) -> tuple[float, float, float]:
        """Return the weights of the losses on patches, queries and answers; zero means not computed."""
        share = (progress - self.answers) / max(1e-9, self.settled - self.answers)
        dense = 1.0 - (1.0 - self.beside) * min(1.0, max(0.0, share))
        # With ``settled`` at 0 this holds before the first step, too.
        dense = self.beside if self.settled <= 0.0 else dense
        return dense, dense * (progress >= self.queries), float(progress >= self.answers)

    def phase(self, progress: float) -> Phase:
        """Return what :meth:`weights` and :meth:`share` leave to compute."""
        patches, queries, answers = (weight > 0.0 for weight in self.weights(progress))
        return Phase(patches, queries, answers, self.share(progress))

    def share(self, progress: float) -> float:
        """Return the share of each image's patches and queries that the dense losses use."""
        return self.kept if progress >= self.settled else 1.0


class Learner(nn.Module):
    """A small Aria with auxiliary heads; takes batches of ``image_batches`` after rendering, or of ``text_batches``."""

    def __init__(self, model: Aria, num_classes: int, stages: Stages | None = None, seed: int = 0):
        super().__init__()
        self.aria = model
        self.heads = DenseHeads(model.config, num_classes)
        self.stages = stages or Stages()
        initialise(model, seed)
        self._query_segments: dict[tuple[int, int, torch.device], tuple[Segments, Tensor]] = {}

    def loss(self, batch: Batch, progress: float) -> Losses:
        """Return the loss to minimise, and metrics."""
        dense = max(self.stages.weights(progress)[:2])
        return self.phase_loss(
            batch, self.stages.phase(progress), torch.tensor(dense, device=batch["input_ids"].device)
        )

    def phase_loss(self, batch: Batch, phase: Phase, dense: Tensor) -> Losses:
        """Like :meth:`loss`, with the dense weight as a tensor: nothing else changes within a phase."""
        if not batch["size"]:
            return self.answer(batch, None)
        metrics: dict[str, Tensor] = {}
        patches, hidden_PD = self.encode(batch)
        total = hidden_PD.new_zeros((), dtype=torch.float32)
        if phase.patches:
            found = self.patch_loss(batch, patches, hidden_PD, phase.share)
            total = dense * found.loss
            metrics |= {"patch loss": found.loss, "patch accuracy": found.accuracy}
        if not phase.queries and not phase.answers:
            return total, metrics
        tokens_QD = self.project(patches, hidden_PD)
        if phase.queries:
            found = self.query_loss(batch, tokens_QD, phase.share)
            total = total + dense * found.loss
            metrics |= {"query loss": found.loss, "query accuracy": found.accuracy}
        if not phase.answers:
            return total, metrics
        answers, more = self.answer(batch, tokens_QD)
        return total + answers, metrics | more

    def encode(self, batch: Batch) -> tuple[FixedPatches, Tensor]:
        """Encode images: patches, and the ViT's output ``(N x P, D)``; padding is computed in separate segments."""
        mask = batch["pixel_mask"]
        valid = torch.stack((mask[:, :, 0].sum(1), mask[:, 0].sum(1)), dim=1)
        dtype = self.heads.patch_head.weight.dtype
        patches = fixed_patches(batch["pixel_values"].to(dtype), valid, self.aria.config.vision)
        return patches, self.aria.vision_tower(patches.packed)

    def patch_loss(self, batch: Batch, patches: FixedPatches, hidden_PD: Tensor, share: float = 1.0) -> CrossEntropy:
        """Return the loss on a random ``share`` of each image's patches."""
        labels_NP = batch["patch_labels"].gather(1, patches.order)
        hidden_PD, labels_NP = _some(hidden_PD, labels_NP, share)
        return self.heads.patch_loss(hidden_PD, labels_NP)

    def query_loss(self, batch: Batch, tokens_QD: Tensor, share: float = 1.0) -> CrossEntropy:
        """Return the loss on the points of a random ``share`` of each image's queries."""
        tokens_QD, labels_NQK = _some(tokens_QD, batch["query_labels"], share)
        return self.heads.query_loss(tokens_QD, labels_NQK, batch["size"])

    def project(self, patches: FixedPatches, hidden_PD: Tensor) -> Tensor:
        """Project the ViT's output to image tokens ``(N x Q, D)``: :class:`aria.model.Projector` in fixed shapes."""
        projector = self.aria.multi_modal_projector
        images, places = patches.order.shape
        queries, rows = self._queries(images, places, hidden_PD.device)
        attended = projector.cross_attn(hidden_PD, projector.query, rows, queries, patches.packed.segments)
        return projector.feed_forward(projector.layer_norm(attended))

    def _queries(self, images: int, places: int, device: torch.device) -> tuple[Segments, Tensor]:
        """Return segments of queries that match those of patches, and each query's row of the table."""
        key = images, places, device
        if key not in self._query_segments:
            count = self.aria.multi_modal_projector.config.queries_for(places)
            # Every second segment is empty: no query attends to a crop's padding.
            cu_seqlens = (torch.arange(images + 1) * count).repeat_interleave(2)[1:].to(device)
            segments = bounded_segments(cu_seqlens, bound=count, total=count * images)
            self._query_segments[key] = segments, torch.arange(count, device=device).repeat(images)
        return self._query_segments[key]

    def answer(self, batch: Batch, tokens_QD: Tensor | None) -> Losses:
        """Return the next-token loss on answers plus the router losses; without image tokens, of text alone."""
        model, config = self.aria, self.aria.config.text
        ids, cu_seqlens = batch["input_ids"], batch["cu_seqlens"]
        segments = bounded_segments(cu_seqlens, batch["max_seqlen"], ids.shape[0])
        embedded = model.language_model.model.embed_tokens(ids)
        if tokens_QD is not None:
            # Sorting finds the image tokens without a host synchronisation, which a boolean mask would need.
            places = (ids != model.config.image_token_index).to(torch.uint8).argsort(stable=True)[: tokens_QD.shape[0]]
            embedded = embedded.index_copy(0, places, tokens_QD)
        context = TrainingContext(config, segments, batch["positions"], embedded.dtype)
        hidden, router_logits = model.language_model.model(embedded, context)
        labels = next_token_labels(batch["labels"], cu_seqlens)
        weights = batch["weights"].roll(-1)
        answers = linear_cross_entropy(hidden, model.language_model.lm_head.weight, labels, weights_T=weights)
        counted = torch.arange(ids.shape[0], device=ids.device) < batch["num_tokens"]
        routers = [router_losses(logits, config.moe_topk, counted_T=counted) for logits in router_logits]
        total = answers.loss + sum(router.z + router.balance for router in routers)
        kind = "answer" if tokens_QD is not None else "text"
        metrics = {f"{kind} loss": answers.loss, f"{kind} accuracy": answers.accuracy}
        if tokens_QD is not None:
            metrics[f"answer accuracy, {batch['kind']}"] = answers.accuracy
        for layer, router in enumerate(routers):
            metrics |= {f"router z {layer}": router.z, f"router balance {layer}": router.balance}
            metrics[f"busiest expert {layer}"] = router.load.max()
        return total, metrics

    def compile(self, *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Compile each transformer layer by itself: one small graph per kind of layer and image size."""
        torch._dynamo.config.recompile_limit = 32
        for layer in [*self.aria.vision_tower.encoder.layers, *self.aria.language_model.model.layers]:
            layer.compile(*args, dynamic=False, **options)


def _some(hidden_PD: Tensor, labels_NP: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw a ``share`` of each image's rows (at least one), with their labels ``(N, P)`` or ``(N, P, K)``."""
    images, places = labels_NP.shape[:2]
    count = max(1, round(places * share))
    if count == places:
        return hidden_PD, labels_NP
    drawn = torch.rand(images, places, device=labels_NP.device).argsort(1)[:, :count]
    rows = drawn + places * torch.arange(images, device=drawn.device)[:, None]
    # index_select instead of indexing: its gradient does not sort the rows first.
    return hidden_PD.index_select(0, rows.flatten()), labels_NP.flatten(0, 1)[rows]


def next_token_labels(labels_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Shift labels from their own token to the token before, never across two packed sequences.

    Args:
        labels_T: int64, ``IGNORE_INDEX`` where nothing is to be predicted.
        cu_seqlens: ``(N + 1,)``, the start of each sequence, then T.
    """
    shifted = torch.full_like(labels_T, IGNORE_INDEX)
    shifted[:-1] = labels_T[1:]
    return shifted.index_fill_(0, (cu_seqlens[1:].long() - 1).clamp(min=0), IGNORE_INDEX)
