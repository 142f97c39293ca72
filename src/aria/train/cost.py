"""What training costs, by arithmetic: FLOPs of a batch, and bytes that a step keeps for its backward pass.

T tokens, D hidden, H heads, K head width, E experts, A experts per token, F expert width, V vocabulary, L layers,
P patches, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from aria.config import AriaConfig
from aria.model import Aria
from aria.processor.image_inputs import Crops
from aria.train.objective import trains


@dataclass(frozen=True)
class Trained:
    """Which parts of a model get gradients; for adapters, their part counts as passed through, not as trained."""

    vision: bool
    """Whether gradients flow into the vision encoder."""
    projector: bool
    decoder: bool
    full: bool
    """Whether weights themselves train, so that there are products for their gradients too."""
    passes: tuple[float, ...] | None = None
    """Of each layer of the decoder, and last of its head: products of a weight for each of its inputs. 1 where no
    gradient comes, 2 where gradients pass through, and up to 3 by the share of the weights that train. None: alike."""

    @classmethod
    def of(cls, aria: Aria, *, full: bool) -> Trained:
        """What gets gradients in a model: everything after the first part that trains."""
        vision = trains(aria.vision_tower)
        projector = vision or trains(aria.multi_modal_projector)
        language, decoder = aria.language_model, aria.language_model.model
        active = aria.config.text.moe_topk / aria.config.text.moe_num_experts
        reached, passes = projector or trains(decoder.embed_tokens), []
        for layer in decoder.layers:
            reached = reached or trains(layer)
            passes.append(1 + reached + (_share(layer, active) if full else 0.0))
        reached = reached or trains(decoder.norm)
        # An adapter beside the head counts as passed through, as everywhere.
        through = reached or not full
        passes.append(1 + through + (_share(language.lm_head, active) if full else 0.0))
        return cls(vision, projector, projector or trains(language), full, tuple(passes))

    def decoder_passes(self, config: AriaConfig) -> tuple[float, ...]:
        """``passes``, or what the other fields say where there are none."""
        if self.passes is not None:
            return self.passes
        alike = _passes(self.decoder or self.projector or self.vision, self.full and self.decoder)
        return (alike,) * (config.text.num_hidden_layers + 1)


def _share(module: nn.Module, active: float) -> float:
    """Of the weights that a token multiplies with, the part that trains; of experts it meets ``active`` of all."""
    trained = whole = 0.0
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            count = parameter.numel() * (active if ".experts." in name else 1.0)
            trained, whole = trained + count * parameter.requires_grad, whole + count
    return trained / whole


def token_flops(config: AriaConfig, trained: Trained) -> float:
    """FLOPs of training on a token of text that is a target, attention left out."""
    return sum(_products(config, trained))


def _products(config: AriaConfig, trained: Trained) -> tuple[float, float]:
    """FLOPs of a token's products with the weights of the layers, and with those of the head."""
    text = config.text
    *layers, last = trained.decoder_passes(config)
    head = text.head_weights
    return 2.0 * (text.active_parameters() - head) * sum(layers) / len(layers), 2.0 * head * last


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
    layers, head = _products(config, trained)
    # Causal attention reads half of each sequence on average; two products of 2 FLOPs, and their backward costs twice.
    width = text.num_attention_heads * text.head_dim
    attended = sum(n * n for n in lengths) / 2
    times = sum(3 if passes > 1 else 1 for passes in trained.decoder_passes(config)[:-1])
    attention = 4.0 * attended * width * times
    return layers * sum(lengths) + head * labels + attention + _vision_flops(config, trained, crops)


def _vision_flops(config: AriaConfig, trained: Trained, crops: Iterable[Crops]) -> float:
    vision, projector = config.vision, config.projector
    p = vision.patch_size
    D = vision.hidden_size
    per_patch = vision.patch_weights + vision.num_hidden_layers * vision.layer_weights
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
