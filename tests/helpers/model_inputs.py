"""Crops, token ids and padded batches for comparisons with transformers."""

from __future__ import annotations

import torch

TOLERANCE = 1e-5


def crops(side: int, extents: list[tuple[int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Make random crops whose real pixels are the top left (height, width)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(len(extents), 3, side, side, generator=generator) * 2 - 1
    mask = torch.zeros(len(extents), side, side, dtype=torch.bool)
    for crop, (height, width) in enumerate(extents):
        mask[crop, :height, :width] = True
    return {"pixel_values": pixels.where(mask[:, None], -1.0), "pixel_mask": mask}


def ids(*parts: int | list[int], seed: int = 0) -> list[int]:
    """Make a prompt: a number stands for that many words, a list has the number of image tokens of an image."""
    generator = torch.Generator().manual_seed(seed)
    out: list[int] = []
    for part in parts:
        words = isinstance(part, int)
        out += torch.randint(20, 300, (part,), generator=generator).tolist() if words else [9] * part[0]
    return out


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [[2] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


CASES = {
    "text only": lambda: left_padded([ids(37)]),
    "text, left-padded batch": lambda: left_padded([ids(5), ids(31, seed=1), ids(1, seed=2)]),
    "490 picture, wide": lambda: left_padded([ids(4, [128], 9)]) | crops(490, [(336, 490)]),
    "980 picture, tall, ragged": lambda: left_padded([ids(4, [256], 9)]) | crops(980, [(980, 551)]),
    "pictures in several prompts": lambda: (
        left_padded([ids(3, [128], 5, [128], 2), ids(7, seed=1), ids(1, [128], 11, seed=2)])
        | crops(490, [(490, 490), (336, 490), (490, 367)])
    ),
}
