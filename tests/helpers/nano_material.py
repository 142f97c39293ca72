"""Assets for nano's images from Pillow alone: one face, three emoji, three photographs, eight words."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from recipes.nano.assets import fonts
from recipes.nano.assets.archive import Assets
from recipes.nano.draw.commands import pack
from recipes.nano.draw.render import Renderer
from recipes.nano.scenes import scene as scenes

LABELS = ["red disc", "blue bar", "green tent"]


def png(draw_on) -> bytes:
    image = Image.new("RGBA", (128, 128))
    draw_on(ImageDraw.Draw(image))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def material() -> Assets:
    rasters = {em: fonts.rasterise([font(em)], em) for em in fonts.EM_SIZES}
    sprites = [
        png(lambda draw: draw.ellipse((8, 8, 120, 120), (220, 20, 20))),
        png(lambda draw: draw.rectangle((4, 44, 124, 84), (20, 20, 220))),
        png(lambda draw: draw.polygon([(64, 4), (124, 120), (4, 120)], (20, 160, 20))),
    ]
    return Assets(
        families=["Default"],
        face_metrics=fonts.measure(font(200))[None],
        glyph_boxes={em: boxes for em, (boxes, _) in rasters.items()},
        glyph_bits={em: bits for em, (_, bits) in rasters.items()},
        emoji=[{"label": label, "hexcode": "", "concrete": True} for label in LABELS],
        sprites=sprites,
        photos=[jpeg(seed) for seed in range(3)],
        words=["apple", "bread", "cloud", "door", "evening", "flower", "go", "hat"],
    )


def draw_scenes(
    renderer: Renderer, assets: Assets, drawn: list[scenes.Scene], seed: int = 0
) -> dict[str, torch.Tensor]:
    return renderer(packed_scenes(drawn, assets, seed))


def packed_scenes(drawn: list[scenes.Scene], assets: Assets, seed: int = 0) -> dict[str, Any]:
    packed = pack(drawn, assets)
    batch = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in packed.items()}
    return batch | {"size": drawn[0].size, "seed": seed}


def font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
