"""Model configurations of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from aria import AriaConfig
from aria.config import ProjectorConfig, TextConfig, VisionConfig


def small_config() -> AriaConfig:
    """Return Aria with less width, depth and vocabulary, to try the scripts on a CPU."""
    return AriaConfig(
        vision=VisionConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, image_size=56
        ),
        projector=ProjectorConfig(
            hidden_size=48, num_attention_heads=2, output_size=64, patch_to_query={4: 2, 16: 4}
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=32,
            moe_num_experts=8,
            moe_topk=3,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=2048,
        ),
        dtype=torch.float32,
    )  # fmt: skip


SHAPES: Mapping[str, Callable[[], AriaConfig]] = {"aria": AriaConfig.aria, "small": small_config}
