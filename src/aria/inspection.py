"""The report of ``aria inspect``: what a model is and on which devices it fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from aria.checkpoint import Checkpoint, Layout, detect, find_weights, parameter_shapes, read_index, read_remote
from aria.checkpoint.layouts import Shape
from aria.config import CONFIG_NAME, AriaConfig
from aria.hub import resolve
from aria.wording import format_bytes

BYTES_PER_PARAMETER = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Weights only; the scales of quantised formats add 1 to 6 % to int8 and int4."""
RESERVE = 2**30
"""Bytes reserved for activations and the runtime."""
_WEIGHTS = (".safetensors", ".pdparams", ".index.json", ".bin", ".pth", ".pt", ".ckpt", ".pkl")


def inspect_model(path_or_repo_id: str | os.PathLike[str] | None, *, revision: str | None = None) -> dict[str, Any]:
    """Describe a model as JSON-serialisable values.

    Local weights, and those on the Hub by their headers, are checked as when loading. Without weights, the
    configuration and the shard index still give size, context length and what fits.

    Args:
        path_or_repo_id: A folder, a weights file, ``config.json`` or a shard index with ``config.json`` beside it, a
            Hub repository (of which only the headers of the weights are fetched), or None for the packaged nano model.
        revision: Branch, tag or commit of a Hub repository.

    Returns:
        ``layout`` (name and description, or None if unknown), ``dtype``, ``weights`` (``complete``, and a ``note`` on
        what is missing), ``experts``, ``image_sizes`` (side in pixels -> tokens), ``context`` in tokens, ``parameters``
        by part with ``total`` and ``active``, ``cache_bytes_per_token`` in bfloat16, and ``devices``: ``name``,
        ``free_bytes``, and the context in ``tokens`` that fits beside the weights in each format.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: Not an Aria checkpoint.
    """
    # Weights on the Hub are inspected there, unless all of them (by the index) are in the local cache.
    local = path_or_repo_id is None or Path(path_or_repo_id).expanduser().exists()
    path = resolve(path_or_repo_id, revision=revision, allow_patterns=[CONFIG_NAME, "*.safetensors.index.json"])
    if path.is_file() and path.name == CONFIG_NAME:
        path = path.parent
    if not path.is_dir() and not path.name.endswith(_WEIGHTS):
        raise ValueError(
            f"{path} is not a model; expected a folder with {CONFIG_NAME} and weights, a .safetensors or .pdparams "
            "file, a shard index (.index.json), or a Hub repository"
        )
    config = AriaConfig.from_pretrained(path if path.is_dir() else path.parent)
    shapes = parameter_shapes(config)
    note: str | None = None
    if local or _is_cached(path):
        layout, dtype, note = _local(path, config, shapes)
    else:
        layout, dtype = read_remote(str(path_or_repo_id), shapes, revision=revision)
    text = config.text
    parts = config.parameters_by_part()
    return {
        "layout": layout and {"name": layout.name, "description": layout.description},
        "dtype": str(dtype).removeprefix("torch."),
        "weights": {"complete": note is None, "note": note},
        "experts": {
            "routed": text.moe_num_experts, "per_token": text.moe_topk, "shared": text.moe_num_shared_experts
        },
        "image_sizes": {str(side): queries for side, queries in config.image_sizes().items()},
        "context": text.max_position_embeddings,
        "parameters": {**parts, "total": sum(parts.values()), "active": config.active_parameters()},
        "cache_bytes_per_token": config.cache_bytes_per_token(),
        "devices": _fits(config),
    }  # fmt: skip


def _local(
    path: Path, config: AriaConfig, shapes: Mapping[str, Shape]
) -> tuple[Layout | None, torch.dtype, str | None]:
    """Layout and dtype of local weights, and a note if they are incomplete."""
    try:
        find_weights(path)
    except (FileNotFoundError, ValueError) as error:  # missing, incomplete, or pickles, which are not supported
        names = read_index(path)
        return detect(dict.fromkeys(names, ()), shapes) if names else None, config.dtype, str(error)
    checkpoint = Checkpoint(path, shapes)
    return checkpoint.layout, checkpoint.dtype, None


def report(found: Mapping[str, Any], console: Console) -> None:
    """Print the result of :func:`inspect_model`. Numbers are never truncated, even on a narrow console."""
    layout, experts, parameters = found["layout"], found["experts"], dict(found["parameters"])
    total, active = parameters.pop("total"), parameters.pop("active")
    origin = "" if found["weights"]["complete"] else " (by its config)"
    sizes = ", ".join(f"{side} px -> {tokens} tokens" for side, tokens in found["image_sizes"].items())
    lines = {
        "layout": f"{layout['name']} ({layout['description']})" if layout else "unknown until weights are there",
        "stored as": found["dtype"] + origin,
        "experts": f"{experts['routed']} routed, {experts['per_token']} a token, {experts['shared']} shared",
        "images": sizes,
        "context": f"{found['context']:,} tokens",
        "active": f"{_count(active)} parameters a text token",
        "cache": f"{found['cache_bytes_per_token']:,} bytes a token in bf16",
    }
    for name, value in lines.items():
        console.print(f"{name:<14}{value}", soft_wrap=True, highlight=False)
    if note := found["weights"]["note"]:
        console.print(f"[yellow]weights[/yellow]       unavailable: {escape(note)}", soft_wrap=True, highlight=False)
    console.print()
    formats = BYTES_PER_PARAMETER
    rows = [
        (part, f"{count:,}", *(format_bytes(count * width) for width in formats.values()))
        for part, count in [*parameters.items(), ("all", total)]
    ]
    _print_table(console, "Parameters", ("part", "parameters", *formats), rows)
    rows = [
        (one["name"], format_bytes(one["free_bytes"]), *(f"{n:,}" if n else "no" for n in one["tokens"].values()))
        for one in found["devices"]
    ]
    _print_table(console, "Fits here, with so many tokens of context", ("device", "free", *formats), rows)


def _print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, or one value per line if the table is wider than the console."""
    table = Table(*header, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
        console.print(table)
        return
    console.print(title, soft_wrap=True)
    for first, *values in rows:
        console.print(f"  {first}", soft_wrap=True, highlight=False)
        for name, value in zip(header[1:], values, strict=True):
            console.print(f"    {name}: {value}", soft_wrap=True, highlight=False)


def _is_cached(snapshot: Path) -> bool:
    """Whether all weights of a Hub repository are in the local cache."""
    try:
        return bool(find_weights(snapshot))
    except (FileNotFoundError, ValueError):  # none, some, or only an index of pickles beside safetensors on the Hub
        return False


def _fits(config: AriaConfig) -> list[dict[str, Any]]:
    """For each device of this machine: how many tokens of bf16 KV cache fit beside the weights."""
    fits = []
    for name, free in _devices():
        tokens = {}
        for kind, width in BYTES_PER_PARAMETER.items():
            left = free - RESERVE - config.num_parameters() * width
            tokens[kind] = max(0, min(int(left // config.cache_bytes_per_token()), config.text.max_position_embeddings))
        fits.append({"name": name, "free_bytes": free, "tokens": tokens})
    return fits


def _devices() -> list[tuple[str, int]]:
    devices = [("CPU memory", psutil.virtual_memory().available)]
    for index in range(torch.cuda.device_count()):
        devices.append((f"cuda:{index} {torch.cuda.get_device_name(index)}", torch.cuda.mem_get_info(index)[0]))
    return devices


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
