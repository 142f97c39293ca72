"""What nano learns from a batch: dense labels on patches and queries first, then answers beside them.

T tokens, D hidden, P patches of one picture, Q queries of one picture, K points under a query, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aria.model import Aria
from aria.ops import Segments
from aria.train.loss import CrossEntropy, linear_cross_entropy, next_token_labels, router_losses
from recipes.nano.train.fixed_shapes import FixedPatches, TrainingContext, bounded_segments, fixed_patches
from recipes.nano.train.model import DenseHeads, initialise

Batch = Mapping[str, Any]
Losses = tuple[Tensor, dict[str, Tensor]]


class Phase(NamedTuple):
    """What is computed of a batch, and on which share of each picture's patches and queries."""

    patches: bool
    queries: bool
    answers: bool
    share: float


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What is taught when, in shares of the whole training.

    Patches are taught from the start, queries once patches mean something, answers once queries do; then the dense
    losses step back to ``beside`` and stay, on a random ``kept`` share of each picture's patches and queries; with 0
    answers alone are taught. Batches of text are taught from the start.
    """

    queries: float = 0.01
    answers: float = 0.03
    settled: float = 0.25
    beside: float = 0.3
    kept: float = 0.5

    def weights(self, progress: float) -> tuple[float, float, float]:
        """Weights of the losses on patches, on queries and on answers; zero means not computed at all."""
        share = (progress - self.answers) / max(1e-9, self.settled - self.answers)
        dense = 1.0 - (1.0 - self.beside) * min(1.0, max(0.0, share))
        # A start that is already settled is settled before the first step, too.
        dense = self.beside if self.settled <= 0.0 else dense
        return dense, dense * (progress >= self.queries), float(progress >= self.answers)

    def phase(self, progress: float) -> Phase:
        """What :meth:`weights` and :meth:`share` leave to compute."""
        patches, queries, answers = (weight > 0.0 for weight in self.weights(progress))
        return Phase(patches, queries, answers, self.share(progress))

    def share(self, progress: float) -> float:
        """Share of each picture's patches and queries that the dense losses are computed on."""
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
        """The weighted sum to descend, and what to log."""
        dense = max(self.stages.weights(progress)[:2])
        return self.taught(batch, self.stages.phase(progress), torch.tensor(dense, device=batch["input_ids"].device))

    def taught(self, batch: Batch, phase: Phase, dense: Tensor) -> Losses:
        """The same with the dense losses' weight as a tensor, and nothing else that changes within a phase."""
        if not batch["size"]:
            return self.answer(batch, None)
        metrics: dict[str, Tensor] = {}
        patches, hidden_PD = self.see(batch)
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
        answers, told = self.answer(batch, tokens_QD)
        return total + answers, metrics | told

    def see(self, batch: Batch) -> tuple[FixedPatches, Tensor]:
        """Pictures -> patches and the ViT's output for them ``(N x P, D)``, padding computed but kept apart."""
        mask = batch["pixel_mask"]
        valid = torch.stack((mask[:, :, 0].sum(1), mask[:, 0].sum(1)), dim=1)
        dtype = self.heads.patch_head.weight.dtype
        patches = fixed_patches(batch["pixel_values"].to(dtype), valid, self.aria.config.vision)
        return patches, self.aria.vision_tower(patches.packed)

    def patch_loss(self, batch: Batch, patches: FixedPatches, hidden_PD: Tensor, share: float = 1.0) -> CrossEntropy:
        """What lies under a random ``share`` of each picture's patches."""
        labels_NP = batch["patch_labels"].gather(1, patches.order)
        hidden_PD, labels_NP = _some(hidden_PD, labels_NP, share)
        return self.heads.patch_loss(hidden_PD, labels_NP)

    def query_loss(self, batch: Batch, tokens_QD: Tensor, share: float = 1.0) -> CrossEntropy:
        """What lies under the points of a random ``share`` of each picture's queries."""
        tokens_QD, labels_NQK = _some(tokens_QD, batch["query_labels"], share)
        return self.heads.query_loss(tokens_QD, labels_NQK, batch["size"])

    def project(self, patches: FixedPatches, hidden_PD: Tensor) -> Tensor:
        """The ViT's output -> picture tokens ``(N x Q, D)``; as in :class:`aria.model.Projector`, in fixed shapes."""
        projector = self.aria.multi_modal_projector
        images, places = patches.order.shape
        queries, rows = self._queries(images, places, hidden_PD.device)
        attended = projector.cross_attn(hidden_PD, projector.query, rows, queries, patches.packed.segments)
        return projector.feed_forward(projector.layer_norm(attended))

    def _queries(self, images: int, places: int, device: torch.device) -> tuple[Segments, Tensor]:
        """Segments of queries beside those of patches (no query reads padding), and each query's row of the table."""
        key = images, places, device
        if key not in self._query_segments:
            count = self.aria.multi_modal_projector.config.queries_for(places)
            # Every second segment is empty: it stands beside a crop's padding.
            cu_seqlens = (torch.arange(images + 1) * count).repeat_interleave(2)[1:].to(device)
            segments = bounded_segments(cu_seqlens, bound=count, total=count * images)
            self._query_segments[key] = segments, torch.arange(count, device=device).repeat(images)
        return self._query_segments[key]

    def answer(self, batch: Batch, tokens_QD: Tensor | None) -> Losses:
        """Next-token loss on the answers and the router's losses; without picture tokens, of text alone."""
        model, config = self.aria, self.aria.config.text
        ids, cu_seqlens = batch["input_ids"], batch["cu_seqlens"]
        segments = bounded_segments(cu_seqlens, batch["max_seqlen"], ids.shape[0])
        embedded = model.language_model.model.embed_tokens(ids)
        if tokens_QD is not None:
            # Sorting finds the image places in order without the host; a boolean mask would wait for their number.
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
        """Compile each transformer layer on its own: one small graph a kind of layer and a picture size."""
        torch._dynamo.config.recompile_limit = 32
        for layer in [*self.aria.vision_tower.encoder.layers, *self.aria.language_model.model.layers]:
            layer.compile(*args, dynamic=False, **options)


def _some(hidden_PD: Tensor, labels_NP: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A random ``share`` of the rows of each picture (at least one), and their labels ``(N, P)`` or ``(N, P, K)``."""
    images, places = labels_NP.shape[:2]
    count = max(1, round(places * share))
    if count == places:
        return hidden_PD, labels_NP
    drawn = torch.rand(images, places, device=labels_NP.device).argsort(1)[:, :count]
    rows = drawn + places * torch.arange(images, device=drawn.device)[:, None]
    # Selected, not indexed: its gradient adds rows up where indexing's would sort them first.
    return hidden_PD.index_select(0, rows.flatten()), labels_NP.flatten(0, 1)[rows]
