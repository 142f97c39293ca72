"""Model shapes and requests that several tests on GPUs use, and the error measure of their results."""

from __future__ import annotations

import random

import torch

from aria.config import AriaConfig, ProjectorConfig, TextConfig, VisionConfig
from aria.processor.image_inputs import ImageSpan

# Aria's widths, which its kernels support, with fewer layers and words, so that a float32 copy fits into memory.
WIDE = AriaConfig(text=TextConfig(num_hidden_layers=3, vocab_size=4096, max_position_embeddings=8192))


Work = list[tuple[list[int], list[ImageSpan]]]


def requests_of(vocabulary: int, image_width: int, count: int, longest: int) -> Work:
    choice = random.Random(0)
    made = []
    for seed in range(count):
        ids = [choice.randrange(20, vocabulary) for _ in range(choice.randrange(1, longest))]
        images = []
        if seed % 3 == 0 and len(ids) > 70:
            features = torch.randn(64, image_width, generator=torch.Generator().manual_seed(seed))
            ids[5:69] = [9] * 64
            images = [ImageSpan(5, 64, b"%d" % seed, features)]
        made.append((ids, images))
    return made


CONFIG = AriaConfig(
    vision=VisionConfig(hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2),
    projector=ProjectorConfig(hidden_size=144, num_attention_heads=2, output_size=128),
    text=TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=48, moe_num_experts=8, moe_topk=3, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
    ),
)  # fmt: skip


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())
