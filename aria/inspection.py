"""What a model is and where it fits: the report behind ``aria inspect``."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from aria.checkpoint import Checkpoint, find_weights, parameter_shapes, read_remote
from aria.config import CONFIG_NAME, AriaConfig
from aria.hub import resolve

BYTES_PER_PARAMETER = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of the weights themselves; the scales of quantised formats add 1 to 6 % to the last two."""
RESERVE = 2**30
"""Bytes kept free for activations and the runtime."""


def report(path_or_repo_id: str | os.PathLike[str] | None, *, revision: str | None, console: Console) -> None:
    """Print the report.

    Args:
        path_or_repo_id: a folder, a file of weights or an index of shards with ``config.json`` beside it, a Hub
            repository, of whose weights only the headers are fetched, or None for the packaged nano model.
        revision: branch, tag or commit of a Hub repository.
        console: where to print.

    Raises:
        FileNotFoundError: there is no such model, or shards that its index lists are missing.
        ValueError: it is not a checkpoint of Aria.
    """
    # Weights on the Hub are looked at there, unless they were fetched before; the index tells whether they all were.
    local = path_or_repo_id is None or Path(path_or_repo_id).expanduser().exists()
    path = resolve(path_or_repo_id, revision=revision, allow_patterns=[CONFIG_NAME, "*.safetensors.index.json"])
    config = AriaConfig.from_pretrained(path if path.is_dir() else path.parent)
    shapes = parameter_shapes(config)
    if local or _is_cached(path):
        checkpoint = Checkpoint(path, shapes)
        layout, dtype = checkpoint.layout, checkpoint.dtype
    else:
        layout, dtype = read_remote(str(path_or_repo_id), shapes, revision=revision)
    text = config.text
    console.print(f"layout        {layout.name} ({layout.description})", soft_wrap=True)
    console.print(f"stored as     {str(dtype).removeprefix('torch.')}")
    console.print(
        f"experts       {text.moe_num_experts} routed, {text.moe_topk} a token, {text.moe_num_shared_experts} shared"
    )
    sizes = ", ".join(f"{side} px -> {queries} tokens" for side, queries in config.image_sizes().items())
    console.print(f"pictures      {sizes}")
    console.print(f"context       {text.max_position_embeddings:,} tokens")
    console.print(f"active        {_count(config.active_parameters())} parameters a text token")
    console.print(f"cache         {config.cache_bytes_per_token():,} bytes a token in bf16\n")
    console.print(_parameters(config))
    console.print(_fits(config))


def _is_cached(snapshot: Path) -> bool:
    """Whether all the weights of a Hub repository were fetched before."""
    try:
        return bool(find_weights(snapshot))
    except (FileNotFoundError, ValueError):  # none, some, or only an index of pickles beside safetensors on the Hub
        return False


def _parameters(config: AriaConfig) -> Table:
    table = Table("part", "parameters", *BYTES_PER_PARAMETER, title="Parameters", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    parts = config.parameters_by_part()
    for part, count in [*parts.items(), ("all", sum(parts.values()))]:
        table.add_row(part, f"{count:,}", *(_size(count * width) for width in BYTES_PER_PARAMETER.values()))
    return table


def _fits(config: AriaConfig) -> Table:
    """For each device of this machine: how many tokens of bf16 cache are left beside the weights."""
    table = Table(
        "device", "free", *BYTES_PER_PARAMETER, title="Fits here, with so many tokens of context", title_justify="left"
    )
    for name, free in _devices():
        cells = []
        for width in BYTES_PER_PARAMETER.values():
            left = free - RESERVE - config.num_parameters() * width
            tokens = min(int(left // config.cache_bytes_per_token()), config.text.max_position_embeddings)
            cells.append(f"{tokens:,}" if tokens > 0 else "no")
        table.add_row(name, _size(free), *cells)
    return table


def _devices() -> list[tuple[str, int]]:
    devices = [("CPU memory", psutil.virtual_memory().available)]
    for index in range(torch.cuda.device_count()):
        devices.append((f"cuda:{index} {torch.cuda.get_device_name(index)}", torch.cuda.mem_get_info(index)[0]))
    return devices


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
