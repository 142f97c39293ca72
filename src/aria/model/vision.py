"""The vision encoder: a ViT over packed patches (paper section 2.1; SigLIP-SO400M's shape, NaViT's positions).

P patches of all crops end to end, C crops, D hidden, H heads, K head width. Patches that are only padding are removed
before the first layer. There is no final LayerNorm: the projector reads the last layer's raw output.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria import ops
from aria.config import VisionConfig
from aria.model.layers import join
from aria.model.patches import PackedPatches
from aria.ops import Segments

MLP_PATCHES = 30_000
"""Patches that an MLP takes at once in inference. More are no faster, and need more memory between products."""

CUT_ROUNDS = 4
"""Whole rounds of tiles at which :func:`_add_product` splits; with more, the last one matters less
(docs/lab/kernels.md)."""


@cache
def _round_rows(columns: int, device: torch.device) -> int:
    """Rows that give each multiprocessor one tile of 192 x 192; 0 on GPUs where splitting by them was not measured."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return 192 * (multiprocessors // -(-columns // 192))


def _add_product(x_PD: Tensor, y_PI: Tensor, weight_DI: Tensor) -> None:
    """``x += y @ weight.T`` in place, on Hopper perhaps in two parts.

    If the last of a few rounds of tiles would be about half empty (19,600 patches are 4.6 rounds), cuBLAS widens all
    tiles beyond the matrix to save that round. Without those rows, the whole rounds use tiles that fit.
    """
    rows = _round_rows(len(weight_DI), x_PD.device)
    rounds, rest = divmod(len(x_PD), rows) if rows else (0, 0)
    cut = rounds == CUT_ROUNDS and rows <= 4 * rest <= 3 * rows
    sizes = [rounds * rows, rest] if cut else [len(x_PD)]
    for x, y in zip(x_PD.split(sizes), y_PI.split(sizes), strict=True):
        x.addmm_(y, weight_DI.t())


class VisionEmbeddings(nn.Module):
    """Patches -> hidden states, plus a learned vector for each position."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size, p = config.hidden_size, config.patch_size
        # A convolution in the checkpoints; on patches it is one matrix product.
        self.patch_embedding = nn.Conv2d(config.num_channels, size, kernel_size=p, stride=p)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, size)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(pixels.to(weight.dtype), weight, self.patch_embedding.bias) + self.position_embedding(positions)


class VisionAttention(nn.Module):
    """Bidirectional attention within each crop."""

    has_lora = False

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x_PD: Tensor, segments: Segments) -> Tensor:
        return self.out_proj(self.attend(x_PD, segments))

    def attend(self, x_PD: Tensor, segments: Segments) -> Tensor:
        """Outputs of all heads, side by side, before ``out_proj``: ``(P, D)``."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self._project(x_PD))
        return ops.attention(q, k, v, segments, segments, causal=False).flatten(1)

    def _project(self, x_PD: Tensor) -> tuple[Tensor, ...]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights, biases = [proj.weight for proj in projections], [proj.bias for proj in projections]
        if ops.inference_kernels(x_PD) and not self.has_lora and ops.adjacent(weights) and ops.adjacent(biases):
            return F.linear(x_PD, ops.as_one(weights), ops.as_one(biases)).chunk(3, dim=-1)
        return tuple(proj(x_PD) for proj in projections)

    def lay_out(self) -> None:
        """See :meth:`Aria.lay_out`."""
        join(self.q_proj, self.k_proj, self.v_proj)


class VisionMLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_PD), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_PD: Tensor, segments: Segments) -> Tensor:
        x_PD = x_PD + self.self_attn(self.layer_norm1(x_PD), segments)
        return x_PD + self.mlp(self.layer_norm2(x_PD))

    def infer(self, x_PD: Tensor, segments: Segments, shift_2D: Tensor) -> None:
        """The same without gradients, added to ``x_PD`` in place, except for the biases of ``out_proj`` and ``fc2``.

        A bias is one vector for all patches. Left out of x, it costs no pass over x: ``shift_2D`` (float32) is the sum
        of the biases left out before each half, and is added where a norm reads x.
        """
        norm, attention = self.layer_norm1, self.self_attn
        normed = ops.layer_norm(x_PD, norm.weight, norm.bias, norm.eps, shift_2D[0])
        _add_product(x_PD, attention.attend(normed, segments), attention.out_proj.weight)
        norm, mlp = self.layer_norm2, self.mlp
        normed = ops.layer_norm(x_PD, norm.weight, norm.bias, norm.eps, shift_2D[1])
        parts = -(-len(x_PD) // MLP_PATCHES)
        for x, y in zip(x_PD.tensor_split(parts), normed.tensor_split(parts), strict=True):
            _add_product(x, ops.linear_gelu(y, mlp.fc1.weight, mlp.fc1.bias), mlp.fc2.weight)


class VisionEncoder(nn.Module):
    """The layers, named as in the checkpoints."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTower(nn.Module):
    """The vision encoder: patches of crops -> hidden states ``(P, D)``."""

    has_lora = False

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)

    def forward(self, patches: PackedPatches) -> Tensor:
        if ops.inference_kernels(self.embeddings.patch_embedding.weight) and not self.has_lora:
            return self._infer(patches)
        x_PD = self.embeddings(patches.pixels, patches.positions)
        for layer in self.encoder.layers:
            x_PD = layer(x_PD, patches.segments)
        return x_PD

    def _infer(self, patches: PackedPatches) -> Tensor:
        """Without gradients; :meth:`VisionLayer.infer` says why biases are summed here."""
        patch, layers = self.embeddings.patch_embedding, cast("list[VisionLayer]", self.encoder.layers)
        biases = [bias for layer in layers for bias in (layer.self_attn.out_proj.bias, layer.mlp.fc2.bias)]
        shifts_BD = torch.stack([cast(Tensor, patch.bias), *biases]).float().cumsum(0)
        x_PD = self.embeddings.position_embedding(patches.positions)
        # Rows of 588 values are not a multiple of 16 bytes, for which there are only older, slower products.
        pixels, weight = patches.pixels.to(x_PD.dtype), patch.weight.flatten(1)
        pixels, weight = (F.pad(x, (0, -x.shape[1] % 8)) for x in (pixels, weight))
        x_PD.addmm_(pixels, weight.t())
        for layer, shift_2D in zip(layers, shifts_BD[:-1].unflatten(0, (-1, 2)), strict=True):
            layer.infer(x_PD, patches.segments, shift_2D)
        return x_PD.add_(shifts_BD[-1].to(x_PD.dtype))
