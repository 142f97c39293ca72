"""Short conversations with and without images."""

from __future__ import annotations

import torch
from PIL import Image


def image(seed: int, size: tuple[int, int] = (120, 80)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def asked(text: str, *images: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


CONVERSATIONS = [
    asked("what is shown", image(0)),
    asked("hello"),
    asked("red circle", image(1), image(2, (50, 90))),
]
