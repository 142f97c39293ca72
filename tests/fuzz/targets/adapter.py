"""Adapter folders: rejected, or with shapes that match the model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from aria.checkpoint import read_adapter, save_adapter
from aria.checkpoint.adapter import WEIGHTS_NAME
from aria.config import AriaConfig, ProjectorConfig, TextConfig, VisionConfig
from aria.hub import ADAPTER_NAME
from aria.model import Aria
from aria.model.lora import LoRASettings, attach_lora
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.files import folder

LONGEST = 400
MEMORY = 128 << 20
WORDS = (
    *(
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "peft_type",
        "LORA",
        "bias",
        "none",
        "use_rslora",
        "use_dora",
    ),
    *(
        "lora_A",
        "lora_B",
        ".weight",
        "base_model.model.",
        "(a+)+$",
        ".*",
        "dtype",
        "shape",
        "data_offsets",
        "F32",
        "q_proj",
    ),
)
CONFIG = AriaConfig(
    vision=VisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28),
    projector=ProjectorConfig(hidden_size=8, num_attention_heads=1, output_size=8, patch_to_query={4: 2}),
    text=TextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1,
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    ),
)  # fmt: skip
PLACES = ("language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.mlp.experts.fc1")


@cache
def _sound() -> Path:
    """An adapter folder as it should be."""
    model = Aria.random(CONFIG)
    for place in PLACES:
        attach_lora(model, place, LoRASettings(rank=2, alpha=4.0))
    path = folder("adapter") / "sound"
    save_adapter(model, path)
    return path


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    path = folder("adapter") / "spoiled"
    path.mkdir(exist_ok=True)
    settings = json.loads((_sound() / ADAPTER_NAME).read_bytes())
    settings |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*fc1": 3}}
    weights = (_sound() / WEIGHTS_NAME).read_bytes()
    if draw.flag():
        settings = spoiled(draw, settings, WORDS)
    if draw.flag():
        size = int.from_bytes(weights[:8], "little")
        header = json.dumps(spoiled(draw, json.loads(weights[8 : 8 + size]), WORDS)).encode()
        weights = len(header).to_bytes(8, "little") + header + weights[8 + size :]
    (path / ADAPTER_NAME).write_text(json.dumps(settings))
    (path / WEIGHTS_NAME).write_bytes(weights)
    try:
        stored = read_adapter(path, CONFIG)
    except ValueError as error:
        assert len(str(error)) < 4000, "a message as long as the file"
        return
    assert stored.weights.keys() <= set(PLACES), "weights for places that the file has none for"
    for name, lora in stored.weights.items():
        assert lora.a.shape[-1 if lora.a.ndim == 3 else 0] == stored.settings[name].rank
        assert lora.a.isfinite().all() and lora.b.isfinite().all()


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield b"\0\0"
    yield from (chance.randbytes(24) for _ in range(30))
