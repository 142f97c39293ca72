"""Small random Arias, and the same weights in transformers' own Aria."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aria.config import AriaConfig, ProjectorConfig, TextConfig, VisionConfig
from aria.model import Aria

if TYPE_CHECKING:
    import transformers


def tiny_config(
    *, vocab_size: int = 300, image_size: int = 980, table: dict[int, int] | None = None, key_value_heads: int = 4
) -> AriaConfig:
    """Return Aria with less width and depth; image sizes are the real ones by default."""
    return AriaConfig(
        vision=VisionConfig(
            hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=image_size
        ),
        projector=ProjectorConfig(
            hidden_size=48, num_attention_heads=4, output_size=64, patch_to_query=table or {1225: 128, 4900: 256}
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=32,
            moe_num_experts=8,
            moe_topk=3,
            moe_num_shared_experts=2,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=key_value_heads,
            head_dim=16,
            max_position_embeddings=4096,
        ),
        dtype=torch.float32,
    )


def tiny_model(config: AriaConfig, seed: int = 0) -> Aria:
    """Make a model with weights large enough that routing and attention matter; norms and biases are random, too."""
    model = Aria.random(config, dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(spread + 1 if parameter.ndim == 1 else spread)
    return model


def transformers_twin(folder: Path) -> transformers.AriaForConditionalGeneration:
    """Load transformers' Aria from a folder that we wrote; every key has to match."""
    import transformers  # where only our own models are made, it is not needed

    twin, info = transformers.AriaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: keys for kind, keys in info.items() if keys}
    assert not wrong, f"transformers did not load what we saved: {wrong}"
    return twin.eval()
