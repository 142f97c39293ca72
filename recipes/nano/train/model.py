"""Nano's shape and initialisation, and the dense heads that teach it to see (used in training only).

T tokens, D hidden, P patches of an image, Q queries of an image, K points of a query, N images, V classes.
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
"""Image points that one query should know, by image size."""

_POINT_WIDTH = 128


def nano_config(vocab_size: int) -> AriaConfig:
    """Return nano's configuration: at most 40 MiB in bfloat16, most of it vision, since reading is the hard part."""
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
    return _config(vision, text)


def tiny_config(vocab_size: int) -> AriaConfig:
    """Return a tiny configuration for tests and dry runs on a CPU."""
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
    return _config(vision, text)


def _config(vision: VisionConfig, text: TextConfig) -> AriaConfig:
    projector = ProjectorConfig(
        patch_to_query={256: 64, 1024: 128},
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        output_size=text.hidden_size,
    )
    return AriaConfig(vision=vision, projector=projector, text=text)


class Dense(NamedTuple):
    """Dense losses of a batch."""

    patches: CrossEntropy
    queries: CrossEntropy | None


class DenseHeads(nn.Module):
    """Predicts the class under each patch from the ViT, and under each point of a query from the projector.

    A small resampler that learns from answers alone predicts letter frequencies for a long time; with a target for each
    query it reads within minutes.
    """

    def __init__(self, config: AriaConfig, num_classes: int):
        super().__init__()
        num_classes = -(-num_classes // 8) * 8  # a multiple of 8 suits tensor cores; the last few are never a label
        self.patch_norm = nn.LayerNorm(config.vision.hidden_size)
        self.patch_head = nn.Linear(config.vision.hidden_size, num_classes)
        self.query_norm = nn.LayerNorm(config.text.hidden_size)
        self.points = nn.ModuleDict(
            {str(size): nn.Linear(config.text.hidden_size, k * _POINT_WIDTH) for size, k in QUERY_POINTS.items()}
        )
        self.point_head = nn.Linear(_POINT_WIDTH, num_classes)

    def patch_loss(self, hidden_PD: Tensor, labels_NP: Tensor) -> CrossEntropy:
        """Return the loss on patches, given in the order of the labels; -100 marks padding."""
        return self._loss(self.patch_norm(hidden_PD), self.patch_head, labels_NP)

    def query_loss(self, tokens_QD: Tensor, labels_NQK: Tensor, size: int) -> CrossEntropy:
        """Return the loss on queries; ``tokens_QD`` are the projector's outputs for images of ``size`` pixels."""
        points = self.points[str(size)](self.query_norm(tokens_QD)).unflatten(1, (-1, _POINT_WIDTH))
        return self._loss(nn.functional.silu(points).flatten(0, 1), self.point_head, labels_NQK.flatten(1))

    def _loss(self, hidden: Tensor, head: nn.Linear, labels: Tensor) -> CrossEntropy:
        weights = area_weights(labels, head.out_features)
        return linear_cross_entropy(
            hidden, head.weight, labels.flatten(), bias_V=head.bias, weights_T=weights.flatten()
        )


def area_weights(labels_NP: Tensor, num_classes: int) -> Tensor:
    """Weigh each label by one over the square root of its class's count in that image.

    A thing then counts by the root of its area: the background (240 of 256 patches around a word) weighs about as much
    as the word, and an emoji that fills the image no more than either. Labels of -100 weigh nothing.
    """
    known = labels_NP.clamp(min=0)
    real = (labels_NP >= 0).float()
    count = real.new_zeros(labels_NP.shape[0], num_classes).scatter_add_(1, known, real)
    return real * count.gather(1, known).clamp(min=1.0).rsqrt()


def initialise(model: Aria, seed: int = 0) -> None:
    """Initialise a small Aria so that it learns to read within minutes; with a plain random start it does not.

    Matrices are Xavier-initialised, branches into the residual stream scaled down with depth. The position table and
    the queries are grids of sines and cosines. The projector's attention starts near the identity, so that each head of
    each query attends to one patch of its cell and passes on its share of the channels.
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
    """Return sines and cosines of positions in a ``side`` x ``side`` grid: ``(len(rows), width)``.

    A quarter of the width each: sine and cosine of the row, sine and cosine of the column. Wavelengths range from twice
    the side to four steps, so that neighbours differ and distant positions are not alike.
    """
    n = width // 4
    wavelengths = 2.0 * side * (4.0 / (2.0 * side)) ** (torch.arange(n) / max(1, n - 1))
    angles = [2.0 * math.pi * place[:, None] / wavelengths for place in (rows, columns)]
    out = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(out, (0, width - out.shape[1]))


def _start_positions(tower: VisionTower, heads: int) -> None:
    """Use the same grid for the channels of every head, so that each head can tell positions apart."""
    table = tower.embeddings.position_embedding.weight
    side = math.isqrt(table.shape[0])
    places = torch.arange(side * side)
    grid = grid_embedding(places // side, places % side, table.shape[1] // heads, side)
    table.copy_(grid.repeat(1, heads))


def _query_places(config: AriaConfig) -> Tensor:
    """Return the initial position of each head of each query in the position table: ``(Q, H, 2)``, row and column.

    Queries form an 8 x 8 grid of cells. At 224 px there are 64, and a cell has 2 x 2 patches: one head each, further
    heads at the middle. At 448 px a cell has 4 x 4 patches, and the second 64 queries take its lower half.
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
    # Twice as sharp: among 256 patches a perfect match has to stand out from near matches.
    attention.layer_norm.weight.fill_(2.0)
