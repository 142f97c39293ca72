"""Saving in today's Hub layout: one tensor in memory at a time, and all files or none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aria.checkpoint.layouts import Shape, main_dtype
from aria.checkpoint.load import parameter_shapes
from aria.checkpoint.stored import SAFETENSORS_DTYPES, describe
from aria.config import CONFIG_NAME, AriaConfig
from aria.hub import sync, write_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GENERATION_NAME = "generation_config.json"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a tensor to write."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
    state: Mapping[str, Tensor],
    config: AriaConfig,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's parameters, ``config.json`` and ``generation_config.json``; transformers and vLLM load them.

    Args:
        state: Every parameter by name (``model.state_dict()``), on any device; each keeps its dtype.
        config: Configuration of the model; its dtype is replaced by that of most bytes of ``state``.
        folder: Created if missing. Weights in it are replaced, other files stay; if anything fails, it stays as it was.
        max_shard_size: Bytes, or text such as ``"5GB"``; a larger tensor gets a shard of its own.
        generation_config: None means the published end-of-text and padding ids.

    Raises:
        ValueError: The parameters do not fit the config.
        OSError: The files cannot be written.
    """
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    with replacing(folder) as staging:
        write_weights(specs, state.__getitem__, config, staging, max_shard_size=max_shard_size)
        # Readers default to the dtype stated here, so it must be that of the weights.
        write_json(staging / CONFIG_NAME, replace(config, dtype=main_dtype(state.values())).to_dict())
        write_json(staging / GENERATION_NAME, generation_config or default_generation_config(config))


def default_generation_config(config: AriaConfig) -> dict[str, Any]:
    """The published settings: beginning and end of text are tokens 1 and 2."""
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": config.pad_token_id}


def write_weights(
    specs: Mapping[str, Spec],
    get: Callable[[str], Tensor],
    config: AriaConfig,
    folder: Path,
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights in today's Hub layout into ``folder``, one tensor at a time from ``get``.

    Raises:
        ValueError: Names or shapes do not fit the config.
    """
    _check(specs, parameter_shapes(config))
    # The vision encoder has no final norm, but the Hub's files contain one of zeros, which transformers expects.
    bias = "vision_tower.encoder.layers.0.layer_norm1.bias"
    filler = {f"vision_tower.post_layernorm.{kind}": specs[bias] for kind in ("weight", "bias")}
    specs = {**specs, **filler}

    def get_any(name: str) -> Tensor:
        return torch.zeros(filler[name].shape, dtype=filler[name].dtype) if name in filler else get(name)

    shards = _shards(specs, _parse_size(max_shard_size))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, get_any)
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs.values()),
            "total_size": sum(spec.nbytes for spec in specs.values()),
        }
        write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_safetensors(file: Path, specs: Mapping[str, Spec], get: Callable[[str], Tensor]) -> None:
    """Write one safetensors file, tensor by tensor.

    The safetensors library needs all tensors of a file in memory, a shard of 5 GB here. The format is a header followed
    by the tensors' bytes, so it is easy to write one tensor at a time.
    """
    # Wide dtypes first, so that every tensor is aligned to its item size, as in the library.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = specs[name]
        if spec.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is {spec.dtype}; weights are saved as one of {list(SAFETENSORS_DTYPES)}")
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = get(name).detach().cpu().contiguous()
            assert Spec(tuple(tensor.shape), tensor.dtype) == specs[name], f"{name} changed while it was saved"
            out.write(tensor.view(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str], *, stale: Sequence[str] = ("model*.safetensors", INDEX_NAME)
) -> Iterator[Path]:
    """A temporary folder to write into, whose files replace those in ``folder`` at the end of the ``with`` block.

    Files of an earlier save that match a pattern of ``stale`` are deleted. If anything fails, ``folder`` is as before.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder to save into")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the target, because renaming is atomic only within one file system.
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield staging
        _install(staging, folder, [file for pattern in stale for file in folder.glob(pattern)])
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: the save succeeded
                folder.rmdir()


def _install(staging: Path, folder: Path, stale: Sequence[Path]) -> None:
    new = sorted(staging.iterdir())
    for file in new:
        sync(file)  # a power failure must not leave empty files
    leaving = dict.fromkeys([*stale, *(folder / file.name for file in new)])
    old = staging / ".old"
    old.mkdir()
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moved.append((source, target))

    try:
        for file in leaving:
            if file.exists():
                move(file, old / file.name)
        for file in new:
            move(file, folder / file.name)
    except OSError:
        for source, target in reversed(moved):
            target.rename(source)
        raise


def _check(specs: Mapping[str, Spec], shapes: Mapping[str, Shape]) -> None:
    if any(".adapter." in name for name in specs):
        raise ValueError(
            "the model has adapters beside its weights; save them with save_adapter, and merge them with `aria merge`"
        )
    missing = [name for name in shapes if name not in specs]
    unexpected = [name for name in specs if name not in shapes]
    wrong = [
        f"{name} is {list(specs[name].shape)} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in specs and specs[name].shape != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    if any(faults.values()):
        raise ValueError(f"the parameters to save do not fit the config: {describe(faults)}")


def _shards(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    """Split in order, so that a shard holds consecutive layers."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _parse_size(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", size.upper())
        if match is None:
            raise ValueError(f"max_shard_size {size!r} should be bytes or text such as '5GB' or '500MB'")
        size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"max_shard_size should be above 0, but is {size}")
    return size
