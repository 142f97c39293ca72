"""Files of a model folder: read, or rejected by name, without allocating the sizes that they declare."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aria import AriaImageProcessor
from aria.checkpoint import find_weights, parameter_shapes, read_index
from aria.config import AriaConfig
from aria.hub import NANO
from aria.processor import AriaTokenizer
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.files import folder

LONGEST = 400
MEMORY = 128 << 20
WORDS = (
    *("model_type", "aria", "text_config", "vision_config", "num_hidden_layers", "hidden_size", "moe_num_experts"),
    *("projector_patch_to_query_dict", "torch_dtype", "bfloat16", "rope_scaling", "vocab_size", "weight_map", "../a"),
    *("model-00001-of-00002.safetensors", "added_tokens_decoder", "chat_template", "image_mean", "size_conversion"),
)


def _check_config(file: Path) -> None:
    config = AriaConfig.from_pretrained(file)
    assert AriaConfig.from_dict(config.to_dict()) == config
    config.num_parameters(), config.image_sizes(), config.cache_bytes_per_token()
    if config.text.num_hidden_layers * config.text.moe_num_experts + config.vision.num_hidden_layers < 200:
        parameter_shapes(config)


def _check_index(file: Path) -> None:
    assert all(isinstance(name, str) for name in read_index(file))
    for weights in find_weights(file):
        assert weights.parent == file.parent, f"{weights} is outside of the folder"


def _check_tokenizer(file: Path) -> None:
    (file.parent / "tokenizer.model").write_bytes((NANO / "tokenizer.model").read_bytes())
    tokenizer = AriaTokenizer.from_pretrained(file.parent)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def _check_images(file: Path) -> None:
    AriaImageProcessor.from_pretrained(file.parent)


_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
_CHECKS: dict[str, Callable[[Path], object]] = {
    "config.json": _check_config,
    "model.safetensors.index.json": _check_index,
    "tokenizer_config.json": _check_tokenizer,
    "preprocessor_config.json": _check_images,
}


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    name = draw.one(list(_CHECKS))
    where = folder("config") / name.removesuffix(".json")
    where.mkdir(exist_ok=True)
    file = where / name
    content = json.dumps(spoiled(draw, json.loads(json.dumps(_given(name))), WORDS)).encode()
    if draw.byte() % 8 == 7:
        at = draw.below(len(content))
        content = content[:at] + draw.bytes(6) + content[at + draw.below(4) :]
    file.write_bytes(content)
    try:
        _CHECKS[name](file)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) < 4000, "a message as long as the file"


def _given(name: str) -> Any:
    return (
        _INDEX
        if name not in ("config.json", *(file.name for file in NANO.iterdir()))
        else json.loads((NANO / name).read_bytes())
    )


def seeds() -> Iterator[bytes]:
    parameter_shapes(AriaConfig.from_pretrained())  # what PyTorch loads for the first is not an input's
    chance = random.Random(0)
    yield from (bytes([number % len(_CHECKS)]) + chance.randbytes(24) for number in range(40))
