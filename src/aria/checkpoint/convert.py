"""Conversion of any published layout to today's Hub layout, with one tensor in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aria.checkpoint.adapter import merged, read_adapter
from aria.checkpoint.load import WEIGHT_PATTERNS, Checkpoint, Progress, parameter_shapes
from aria.checkpoint.save import (
    GENERATION_NAME,
    Spec,
    default_generation_config,
    replacing,
    write_weights,
)
from aria.config import CONFIG_NAME, AriaConfig
from aria.hub import ADAPTER_NAME, read_json, resolve, write_json
from aria.ops import LoRA

COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    GENERATION_NAME,
    "LICENSE",
)
"""Files beside the weights that are copied to a converted checkpoint."""
_SETTINGS = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
"""Files that may point to the authors' code."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Result of a conversion."""

    layout: str
    """Layout of the source, such as ``paddle``."""
    tensors: int
    nbytes: int
    companions: tuple[str, ...]
    """Files copied beside the weights."""


def convert(
    source: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Converted:
    """Convert a checkpoint of any layout to today's Hub layout with the same dtypes, optionally merging an adapter.

    Files of the tokenizer and the processor are copied without pointers to the authors' code. In the original
    repositories they lack what transformers needs; ``AriaProcessor.from_pretrained(out).save_pretrained(out)`` adds it,
    as ``aria convert`` does.

    Memory stays at one tensor (1.1 GB for the published model) and a few buffers, for any size of the checkpoint.

    Args:
        source: A folder, a weights file with its ``config.json`` beside it, or a Hub repository; None: nano.
        out: Folder to write; if anything fails, its previous contents stay as they were.
        revision: Branch, tag or commit of a Hub repository.
        adapter: Folder in PEFT's format; its LoRA is added in float32 and rounded once.
        max_shard_size: Bytes, or text such as ``"5GB"``.
        progress: Called with bytes done and total bytes.

    Raises:
        FileNotFoundError, ValueError: The source is not a readable checkpoint of Aria, or is ``out`` itself; the
            adapter does not fit, or ``out`` holds one.
        OSError: The files cannot be written.
    """
    path = resolve(source, revision=revision, allow_patterns=[*WEIGHT_PATTERNS, *COMPANIONS])
    folder = path if path.is_dir() else path.parent
    if Path(out).resolve() == folder.resolve():
        raise ValueError(f"{out} is the source itself; give another folder to write to")
    if (Path(out) / ADAPTER_NAME).is_file():
        # transformers adds an adapter that is beside the weights.
        again = "" if adapter is None else "once more "
        raise ValueError(f"{out} holds an adapter, which would be added {again}on loading; give another folder")
    config = AriaConfig.from_pretrained(folder)
    checkpoint = Checkpoint(path, parameter_shapes(config))
    config = replace(config, dtype=checkpoint.dtype)
    specs = {name: Spec(shape, checkpoint.dtype_of(name)) for name, shape in checkpoint.shapes.items()}
    changes = {} if adapter is None else read_adapter(adapter, config).weights
    with replacing(out) as staging:
        get = _getter(checkpoint, specs, changes, progress)
        write_weights(specs, get, config, staging, max_shard_size=max_shard_size)
        write_json(staging / CONFIG_NAME, config.to_dict())
        copied = _copy_companions(folder, staging, config)
    return Converted(checkpoint.layout.name, len(specs), checkpoint.nbytes, copied)


def _getter(
    checkpoint: Checkpoint, specs: dict[str, Spec], changes: Mapping[str, LoRA], progress: Progress | None
) -> Callable[[str], Tensor]:
    done = 0

    def get(name: str) -> Tensor:
        nonlocal done
        tensor = torch.empty(specs[name].shape, dtype=specs[name].dtype)
        checkpoint.read({name: tensor})
        done += specs[name].nbytes
        if progress is not None:
            progress(done, checkpoint.nbytes)
        change = changes.get(name.removesuffix(".weight"))
        return tensor if change is None else merged(tensor, change)

    return get


def _copy_companions(folder: Path, out: Path, config: AriaConfig) -> tuple[str, ...]:
    present = tuple(name for name in COMPANIONS if (folder / name).is_file())
    for name in present:
        if name in _SETTINGS:
            write_json(out / name, _modern(read_json(folder / name)))
        else:
            shutil.copyfile(_own(folder, name), out / name)
    if GENERATION_NAME not in present:
        write_json(out / GENERATION_NAME, default_generation_config(config))
    return present


def _own(folder: Path, name: str) -> Path:
    """A file of a model's folder, which may be a link within it or into the Hub's cache.

    Raises:
        ValueError: It links elsewhere. A copy would publish a file of this machine together with the weights.
    """
    root, target = folder.resolve(), (folder / name).resolve()
    if root.parent.name == "snapshots":  # in the Hub's cache, files are links to blobs beside this folder
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise ValueError(f"{folder / name} is a link to {target}, outside of its folder; put a copy in its place")
    return target


def _modern(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with today's class name and without pointers to the authors' code, which is not copied."""
    settings.pop("auto_map", None)
    if settings.get("image_processor_type") == "AriaVisionProcessor":
        settings["image_processor_type"] = "AriaImageProcessor"
    return settings
