"""Roofline floors: minimum bytes and operations of a piece of work, from shapes alone.

T tokens, N sequences, D hidden, H heads, K head width, E experts, A experts per token, F expert width, V vocabulary,
P patches, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from aria.config import AriaConfig, TextConfig


@dataclass(frozen=True)
class Work:
    """Minimum memory traffic and arithmetic of a piece of work."""

    nbytes: float = 0.0
    """Minimum bytes between memory and chip."""
    flops: float = 0.0
    """Floating-point operations of matrix products; a multiply-add counts as two."""

    def __add__(self, other: Work) -> Work:
        return Work(self.nbytes + other.nbytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.nbytes * times, self.flops * times)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the floor: the longer of both times."""
        return max(self.nbytes / bytes_per_second, self.flops / flops_per_second)


def expected_experts(text: TextConfig, tokens: int) -> float:
    """Return the expected number of a layer's experts that ``tokens`` tokens use under random routing."""
    return text.moe_num_experts * (1 - (1 - text.moe_topk / text.moe_num_experts) ** tokens)


def decode_step(text: TextConfig, tokens: int, context: float, experts: float, itemsize: int = 2) -> Work:
    """Return the work of one new token for each of ``tokens`` sequences.

    Args:
        text: Configuration of the decoder.
        tokens: Sequences of the step.
        context: Mean number of cached tokens per sequence.
        experts: Experts that the step uses per layer, the mean over layers.
        itemsize: Bytes of a weight and of a cached value.
    """
    head = text.head_weights
    weights = text.num_hidden_layers * (text.dense_weights + experts * text.expert_weights) + head
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context * tokens
    products = text.num_hidden_layers * (text.dense_weights + text.moe_topk * text.expert_weights) + head
    scores = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * context
    return Work((weights + cached) * itemsize, 2.0 * tokens * (products + scores))


def prompt(text: TextConfig, tokens: int, past: int = 0, itemsize: int = 2) -> Work:
    """Return the work of prefilling ``tokens`` tokens after ``past`` others, with logits of the last."""
    layer = text.dense_weights + text.moe_topk * text.expert_weights
    pairs = tokens * past + tokens * tokens / 2
    attention = 4.0 * text.num_attention_heads * text.head_dim * pairs
    head = text.head_weights
    experts = expected_experts(text, tokens) * text.expert_weights
    weights = text.num_hidden_layers * (text.dense_weights + experts) + head
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * (tokens + past)
    flops = text.num_hidden_layers * (2.0 * tokens * layer + attention) + 2.0 * head
    return Work((weights + cache) * itemsize, flops)


def image(config: AriaConfig, patches: int, grid_patches: int | None = None, itemsize: int = 2) -> Work:
    """Return the work of encoder and projector for one crop.

    Args:
        config: Configuration of the model.
        patches: Patches without padding.
        grid_patches: Patches with padding, which determine the number of queries; None means ``patches``.
        itemsize: Bytes of a weight.
    """
    vision, projector = config.vision, config.projector
    D, P = vision.hidden_size, patches
    Q, O = projector.queries_for(grid_patches or patches), projector.output_size
    layer = P * vision.layer_weights + 2 * P * P * D
    embedding = P * vision.patch_weights
    # Keys, values and queries are projected twice each; then the output, another linear layer, and the MLP.
    resampler = 4 * P * D * D + Q * (4 * D * D + D * O + O * O) + 2 * Q * P * D
    weights = vision.num_parameters() + projector.num_parameters()
    return Work(weights * itemsize, 2.0 * (vision.num_hidden_layers * layer + embedding + resampler))
