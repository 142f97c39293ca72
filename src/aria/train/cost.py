"""FLOPs of training, computed from the shapes.

T tokens, D hidden, H heads, K head width, E experts, A experts per token, F expert width, V vocabulary, L layers,
P patches.
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
    """Which parts of a model get gradients. With adapters, gradients pass through a part and train no weights of it."""

    vision: bool
    """Whether gradients flow into the vision encoder."""
    projector: bool
    decoder: bool
    full: bool
    """Whether the weights themselves train, which needs products for their gradients too."""
    passes: tuple[float, ...] | None = None
    """Products per weight and input token, for each decoder layer and last for the head: 1 without gradients, 2 where
    gradients pass through, up to 3 by the fraction of the weights that train. None: the same for all layers."""

    @classmethod
    def of(cls, aria: Aria, *, full: bool) -> Trained:
        """The parts of a model that get gradients: everything after the first part that trains."""
        vision = trains(aria.vision_tower)
        projector = vision or trains(aria.multi_modal_projector)
        language, decoder = aria.language_model, aria.language_model.model
        active = aria.config.text.moe_topk / aria.config.text.moe_num_experts
        reached, passes = projector or trains(decoder.embed_tokens), []
        for layer in decoder.layers:
            reached = reached or trains(layer)
            passes.append(1 + reached + (_share(layer, active) if full else 0.0))
        reached = reached or trains(decoder.norm)
        # With LoRA on the head, gradients pass through it, as everywhere.
        through = reached or not full
        passes.append(1 + through + (_share(language.lm_head, active) if full else 0.0))
        return cls(vision, projector, projector or trains(language), full, tuple(passes))

    def decoder_passes(self, config: AriaConfig) -> tuple[float, ...]:
        """``passes``, or the values that follow from the other fields where it is None."""
        if self.passes is not None:
            return self.passes
        alike = _passes(self.decoder or self.projector or self.vision, self.full and self.decoder)
        return (alike,) * (config.text.num_hidden_layers + 1)


def _share(module: nn.Module, active: float) -> float:
    """Fraction of the weights used by a token that train; a token uses the fraction ``active`` of the experts."""
    trained = whole = 0.0
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            count = parameter.numel() * (active if ".experts." in name else 1.0)
            trained, whole = trained + count * parameter.requires_grad, whole + count
    return trained / whole


def token_flops(config: AriaConfig, trained: Trained) -> float:
    """FLOPs of training on one text token with a target, without attention."""
    return sum(_products(config, trained))


def _products(config: AriaConfig, trained: Trained) -> tuple[float, float]:
    """FLOPs of one token's products with the weights of the layers, and with those of the head."""
    text = config.text
    *layers, last = trained.decoder_passes(config)
    head = text.head_weights
    return 2.0 * (text.active_parameters() - head) * sum(layers) / len(layers), 2.0 * head * last


def batch_flops(
    config: AriaConfig, trained: Trained, lengths: Sequence[int], labels: int, crops: Iterable[Crops] = ()
) -> float:
    """FLOPs of one forward and backward pass over a batch, as MFU counts them: recomputation does not count.

    A product with a weight is 2 FLOPs per parameter and token in the forward pass, 2 in the backward pass where
    gradients pass through it, and 2 more where the weight itself trains. LoRA products and everything that is not a
    matrix product are left out.

    Args:
        config: Configuration of the model.
        trained: Which parts get gradients.
        lengths: Tokens of each packed sequence.
        labels: Number of targets; the head is computed for these tokens only.
        crops: Crops of the images.
    """
    text = config.text
    layers, head = _products(config, trained)
    # Causal attention reads half of each sequence on average: two products of 2 FLOPs; backward costs twice as much.
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
    for image in crops:
        grid = (image.pixels.shape[-1] // p) ** 2
        for height, width in image.extents:
            real = -(-height // p) * -(-width // p)
            patches, squares = patches + real, squares + real * real
            queries, crossed = queries + projector.queries_for(grid), crossed + projector.queries_for(grid) * real
    seen = _passes(trained.vision, trained.vision and trained.full)
    made = _passes(trained.vision or trained.projector, trained.projector and trained.full)
    # The backward pass of attention costs twice its forward pass.
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
    """Products per weight and input: forward, gradient of the input, gradient of the weight."""
    return 1 + int(through) + int(through and weights)
