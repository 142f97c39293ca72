"""The nano model's shape, how it starts, and the dense heads that teach it to see (training aids, never shipped).

T tokens, D hidden, P patches of one picture, Q queries of one picture, K points under a query, N pictures, V classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aria.config import AriaConfig, ProjectorConfig, TextConfig, VisionConfig
from aria.model import Aria
from aria.model.projector import Projector
from aria.model.vision import VisionTower
from aria.train.loss import CrossEntropy, linear_cross_entropy

QUERY_POINTS = {224: 4, 448: 8}
"""Points of the picture that one query should know, by picture size."""

_POINT_WIDTH = 128


def nano_config(vocab_size: int) -> AriaConfig:
    """At most 40 MiB in bfloat16. Most of it looks: reading is the hard part, and the decoder only spells out."""
    vision = VisionConfig(
        hidden_size=320, intermediate_size=1344, num_hidden_layers=8, num_attention_heads=5, image_size=448
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=176,
        moe_num_experts=8,
        moe_topk=2,
        moe_num_shared_experts=1,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
    )
    return _joined(vision, text)


def tiny_config(vocab_size: int) -> AriaConfig:
    """The same in a size for tests and rehearsals on a CPU."""
    vision = VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=448
    )
    text = TextConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=32,
        moe_num_experts=4,
        moe_topk=2,
        moe_num_shared_experts=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
    )
    return _joined(vision, text)


def _joined(vision: VisionConfig, text: TextConfig) -> AriaConfig:
    projector = ProjectorConfig(
        patch_to_query={256: 64, 1024: 128},
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        output_size=text.hidden_size,
    )
    return AriaConfig(vision=vision, projector=projector, text=text)


class Dense(NamedTuple):
    """Dense losses of one batch and the share of labels hit, background and all."""

    patches: CrossEntropy
    queries: CrossEntropy | None


class DenseHeads(nn.Module):
    """Which class lies under each patch, read from the ViT, and under each point of a query, from the projector.

    A small resampler that learns from answers alone stays at the letters' frequencies for a long time; told what each
    query should hold, it reads within minutes.
    """

    def __init__(self, config: AriaConfig, num_classes: int):
        super().__init__()
        num_classes = -(-num_classes // 8) * 8  # matrix units want eights; the last few are never a label
        self.patch_norm = nn.LayerNorm(config.vision.hidden_size)
        self.patch_head = nn.Linear(config.vision.hidden_size, num_classes)
        self.query_norm = nn.LayerNorm(config.text.hidden_size)
        self.points = nn.ModuleDict(
            {str(size): nn.Linear(config.text.hidden_size, k * _POINT_WIDTH) for size, k in QUERY_POINTS.items()}
        )
        self.point_head = nn.Linear(_POINT_WIDTH, num_classes)

    def patch_loss(self, hidden_PD: Tensor, labels_NP: Tensor) -> CrossEntropy:
        """``hidden_PD`` are all patches in the order of the labels; -100 labels patches of padding."""
        return self._loss(self.patch_norm(hidden_PD), self.patch_head, labels_NP)

    def query_loss(self, tokens_QD: Tensor, labels_NQK: Tensor, size: int) -> CrossEntropy:
        """``tokens_QD`` are the projector's outputs for pictures of ``size`` pixels."""
        points = self.points[str(size)](self.query_norm(tokens_QD)).unflatten(1, (-1, _POINT_WIDTH))
        return self._loss(nn.functional.silu(points).flatten(0, 1), self.point_head, labels_NQK.flatten(1))

    def _loss(self, hidden: Tensor, head: nn.Linear, labels: Tensor) -> CrossEntropy:
        weights = area_weights(labels, head.out_features)
        return linear_cross_entropy(
            hidden, head.weight, labels.flatten(), bias_V=head.bias, weights_T=weights.flatten()
        )


def area_weights(labels_NP: Tensor, num_classes: int) -> Tensor:
    """Weight of each label: one over the root of how often its class occurs in that picture.

    So a thing counts with the root of its area: the background (240 of 256 patches around a word) weighs about as
    much as the word, an emoji that fills the picture no more than either. Labels of -100 weigh nothing.
    """
    known = labels_NP.clamp(min=0)
    real = (labels_NP >= 0).float()
    count = real.new_zeros(labels_NP.shape[0], num_classes).scatter_add_(1, known, real)
    return real * count.gather(1, known).clamp(min=1.0).rsqrt()


def initialise(model: Aria, seed: int = 0) -> None:
    """Start a small Aria so that it can learn to read in minutes (measured: started at random it does not).

    Matrices are Xavier's, branches into the residual stream scaled down with depth; position table and queries are
    grids of sines and cosines; the projector's attention starts near the identity, so that every head of every query
    looks at one patch of its cell and hands its share of the channels on.
    """
    generator = torch.Generator().manual_seed(seed)
    vision, text = model.config.vision, model.config.text
    depth = {"vision_tower": vision.num_hidden_layers, "language_model": text.num_hidden_layers}
    into_stream = ("out_proj.weight", "mlp.fc2.weight", "o_proj.weight", "down_proj.weight", "experts.fc2.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            *_, fan_a, fan_b = parameter.flatten(1).shape if parameter.ndim == 4 else parameter.shape
            std = math.sqrt(2.0 / (fan_a + fan_b))
            if name.endswith(into_stream):
                std /= math.sqrt(2.0 * depth.get(name.split(".")[0], 0.5))
            elif name.endswith("embed_tokens.weight"):
                std = 0.3
            elif name.endswith(("patch_embedding.weight", "router.weight", "lm_head.weight")):
                std = 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        _start_positions(model.vision_tower, model.config.vision.num_attention_heads)
        _start_projector(model.multi_modal_projector, model.config, generator)


def grid_embedding(rows: Tensor, columns: Tensor, width: int, side: int) -> Tensor:
    """Sines and cosines of places in a ``side`` x ``side`` grid: ``(len(rows), width)``.

    A quarter of the width each: sine and cosine of the row, sine and cosine of the column. Wavelengths run from
    twice the side to four steps, so that neighbours differ and far places do not look alike.
    """
    n = width // 4
    wavelengths = 2.0 * side * (4.0 / (2.0 * side)) ** (torch.arange(n) / max(1, n - 1))
    angles = [2.0 * math.pi * place[:, None] / wavelengths for place in (rows, columns)]
    out = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(out, (0, width - out.shape[1]))


def _start_positions(tower: VisionTower, heads: int) -> None:
    """The same grid for the channels of every head, so that each head alone can tell places apart."""
    table = tower.embeddings.position_embedding.weight
    side = math.isqrt(table.shape[0])
    places = torch.arange(side * side)
    grid = grid_embedding(places // side, places % side, table.shape[1] // heads, side)
    table.copy_(grid.repeat(1, heads))


def _query_places(config: AriaConfig) -> Tensor:
    """Where each head of each query looks first, in rows and columns of the position table: ``(Q, H, 2)``.

    Queries form an 8 x 8 grid of cells. The first 64 are all there is at 224 px, where a cell has 2 x 2 patches: a
    head for each, further heads at the middle. At 448 px a cell has 4 x 4 patches, and the second 64 take its lower
    half.
    """
    heads = config.vision.num_attention_heads
    cell = config.vision.patches_per_side / 8
    inside = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)], [(0.625, x) for x in (0.0, 0.25, 0.5, 0.75)]
    middle = (0.25, 0.25), (0.625, 0.375)
    places = [
        [((r + y) * cell, (c + x) * cell) for y, x in (offsets + [rest] * heads)[:heads]]
        for offsets, rest in zip(inside, middle, strict=True)
        for r in range(8)
        for c in range(8)
    ]
    return torch.tensor(places)


def _start_projector(projector: Projector, config: AriaConfig, generator: torch.Generator) -> None:
    attention = projector.cross_attn
    size, heads = config.vision.hidden_size, config.vision.num_attention_heads
    places = _query_places(config)
    grids = [
        grid_embedding(places[:, h, 0], places[:, h, 1], size // heads, config.vision.patches_per_side)
        for h in range(heads)
    ]
    projector.query.copy_(torch.cat(grids, dim=1))
    inner = attention.multihead_attn
    for weight in (
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        attention.linear.weight,
        inner.out_proj.weight,
        *inner.in_proj_weight.chunk(3),
    ):
        noise = torch.empty(size, size).normal_(0.0, 0.1 / math.sqrt(size), generator=generator)
        weight.copy_(torch.eye(size) + noise)
    # Twice as sharp: over 256 patches a perfect match must stand out from all the near ones.
    attention.layer_norm.weight.fill_(2.0)
