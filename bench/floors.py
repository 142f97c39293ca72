"""What the machine cannot do without: the bytes and the operations of a piece of work, from the shapes alone.

T tokens, N sequences, D hidden, H heads, K head width, E experts, A experts per token, F expert width, V vocabulary,
P patches, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from aria.config import AriaConfig, TextConfig


@dataclass(frozen=True)
class Work:
    """A piece of work as the hardware sees it."""

    nbytes: float = 0.0
    """Bytes that have to move between memory and chip at least."""
    flops: float = 0.0
    """Floating-point operations of matrix products; a multiplication and an addition are two."""

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.nbytes * times, self.flops * times)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor: whichever of the two takes longer."""
        return max(self.nbytes / bytes_per_second, self.flops / flops_per_second)


def expected_experts(text: TextConfig, tokens: int) -> float:
    """Experts of a layer that ``tokens`` tokens touch if each chooses at random."""
    return text.moe_num_experts * (1 - (1 - text.moe_topk / text.moe_num_experts) ** tokens)


def decode_step(text: TextConfig, tokens: int, context: float, experts: float, itemsize: int = 2) -> Work:
    """One new token of each of ``tokens`` sequences.

    Args:
        text: the decoder's shape.
        tokens: sequences of the step.
        context: cached tokens that each of them reads, the mean.
        experts: experts that a layer's tokens touch together, the mean over layers.
        itemsize: bytes of a weight and of a cached number.
    """
    head = text.head_weights
    weights = text.num_hidden_layers * (text.dense_weights + experts * text.expert_weights) + head
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context * tokens
    products = text.num_hidden_layers * (text.dense_weights + text.moe_topk * text.expert_weights) + head
    scores = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * context
    return Work((weights + cached) * itemsize, 2.0 * tokens * (products + scores))


def prompt(text: TextConfig, tokens: int, past: int = 0, itemsize: int = 2) -> Work:
    """Reading ``tokens`` tokens of a prompt after ``past`` others, and the scores of the token that follows."""
    layer = text.dense_weights + text.moe_topk * text.expert_weights
    pairs = tokens * past + tokens * tokens / 2
    attention = 4.0 * text.num_attention_heads * text.head_dim * pairs
    head = text.head_weights
    experts = expected_experts(text, tokens) * text.expert_weights
    weights = text.num_hidden_layers * (text.dense_weights + experts) + head
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * (tokens + past)
    flops = text.num_hidden_layers * (2.0 * tokens * layer + attention) + 2.0 * head
    return Work((weights + cache) * itemsize, flops)


def picture(config: AriaConfig, patches: int, grid_patches: int | None = None, itemsize: int = 2) -> Work:
    """Encoder and projector on one crop.

    Args:
        config: the model's shape.
        patches: patches that are not padding.
        grid_patches: patches with padding, which decide how many queries stand for the crop; None means the same.
        itemsize: bytes of a weight.
    """
    vision, projector = config.vision, config.projector
    D, P = vision.hidden_size, patches
    Q, O = projector.queries_for(grid_patches or patches), projector.output_size
    layer = P * vision.layer_weights + 2 * P * P * D
    embedding = P * vision.patch_weights
    # Keys and values are projected twice, the queries twice; then the output, one more linear layer, and the MLP.
    resampler = 4 * P * D * D + Q * (4 * D * D + D * O + O * O) + 2 * Q * P * D
    weights = vision.num_parameters() + projector.num_parameters()
    return Work(weights * itemsize, 2.0 * (vision.num_hidden_layers * layer + embedding + resampler))
