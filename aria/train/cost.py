"""What training costs, by arithmetic: FLOPs of a batch, and bytes that a step keeps for its backward pass.

T tokens, D hidden, H heads, K head width, E experts, A experts per token, F expert width, V vocabulary, L layers,
P patches, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aria.config import AriaConfig
from aria.processor.pictures import Crops


@dataclass(frozen=True)
class Trained:
    """Which parts of a model get gradients; for adapters, their part counts as passed through, not as trained."""

    vision: bool
    """Whether gradients flow into the vision encoder."""
    projector: bool
    decoder: bool
    full: bool
    """Whether weights themselves train, so that there are products for their gradients too."""


def batch_flops(
    config: AriaConfig, trained: Trained, lengths: Sequence[int], labels: int, crops: Iterable[Crops] = ()
) -> float:
    """FLOPs of one forward and backward pass over a batch, as MFU counts them: nothing computed twice is counted.

    A product with a weight is 2 FLOPs a parameter and token forward, 2 backward where gradients pass through it, and 2
    more where the weight itself trains. Low-rank products and everything that is no product of matrices are left out.

    Args:
        config: of the model.
        trained: which parts get gradients.
        lengths: tokens of each packed sequence.
        labels: targets; the head is computed for them alone.
        crops: the pictures.
    """
    text = config.text
    tokens = sum(lengths)
    passes = _passes(trained.decoder or trained.projector or trained.vision, trained.full and trained.decoder)
    head = text.vocab_size * text.hidden_size
    layers = text.active_parameters() - head
    # Causal attention reads half of each sequence on average; two products of 2 FLOPs, and their backward costs twice.
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    attended = sum(n * n for n in lengths) / 2
    attention = 4.0 * attended * width * (3 if passes > 1 else 1)
    return 2.0 * passes * (layers * tokens + head * labels) + attention + _vision_flops(config, trained, crops)


def _vision_flops(config: AriaConfig, trained: Trained, crops: Iterable[Crops]) -> float:
    vision, projector = config.vision, config.projector
    p = vision.patch_size
    D = vision.hidden_size
    per_patch = vision.num_channels * p * p * D + vision.num_hidden_layers * (
        4 * D * D + 2 * D * vision.intermediate_size
    )
    patches, squares, queries, crossed = 0, 0, 0, 0
    for picture in crops:
        grid = (picture.pixels.shape[-1] // p) ** 2
        for height, width in picture.extents:
            real = -(-height // p) * -(-width // p)
            patches, squares = patches + real, squares + real * real
            queries, crossed = queries + projector.queries_for(grid), crossed + projector.queries_for(grid) * real
    seen = _passes(trained.vision, trained.vision and trained.full)
    made = _passes(trained.vision or trained.projector, trained.projector and trained.full)
    # Attention's backward is twice its forward.
    attention = 4.0 * squares * D * vision.num_hidden_layers * (3 if seen > 1 else 1)
    outside = 4.0 * crossed * D * (3 if made > 1 else 1)
    # k and v are projected twice for each patch; for each query there are out_proj, linear and the feed-forward.
    O = projector.output_size
    per_query = 2 * D * D + D * O + O * O
    return (
        2.0 * seen * per_patch * patches
        + attention
        + 2.0 * made * (4 * D * D * patches + per_query * queries)
        + outside
    )


def _passes(through: bool, weights: bool) -> int:
    """Products of a weight for each of its inputs: forward, gradient of the input, gradient of the weight."""
    return 1 + int(through) + int(through and weights)
