"""What a training leaves for use: the adapter as PEFT's folder, or the whole model with its processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aria.checkpoint import save_checkpoint
from aria.checkpoint.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS
from aria.checkpoint.adapter import save_adapter
from aria.config import AriaConfig
from aria.hub import ADAPTER_NAME
from aria.model import Aria
from aria.model.lora import lora_modules
from aria.processor import AriaProcessor
from aria.train import targets
from aria.train.assemble import Parts, load
from aria.train.console import EXPORT
from aria.train.recipe import FILE_NAME, Recipe, refuse_changes
from aria.train.state import gathered, trained_weights


def export(parts: Parts, folder: Path) -> None:
    """Write the adapter, or the whole model with its processor. All ranks call it together.

    Rank 0 writes, and the others do not wait for it: a slow disk may take longer than collectives may.
    """
    weights = gathered(parts.aria, trained=bool(lora_modules(parts.aria)))
    if parts.parallel.rank == 0:
        _write(parts.recipe, parts.aria.config, weights, parts.processor, folder)


def export_checkpoint(out: str | Path, expected: Recipe | None = None) -> Path:
    """Export a run's newest checkpoint, in one process and without a GPU, whatever it was trained on.

    Args:
        out: Folder of the run.
        expected: Recipe that the run should have; None accepts any.

    Returns:
        The folder that was written.

    Raises:
        FileNotFoundError: The folder holds no run, or no checkpoint.
        ValueError: The recipe has a ``[model] factory``, or is not the expected one.
    """
    out = Path(out)
    if not (file := out / FILE_NAME).is_file():
        raise FileNotFoundError(f"{out} holds no run (no {FILE_NAME} in it); name the --out that was trained in")
    recipe = Recipe.read(file)
    if expected is not None:
        refuse_changes(file, recipe, expected)
    settings = recipe.model
    if settings.factory is not None:
        raise ValueError("[model] factory makes the model by code of its own; let the run end to export it")
    weights = trained_weights(out)
    config = settings.configure(AriaConfig.from_pretrained(settings.path, revision=settings.revision))
    if recipe.targets.method == "full":
        base = load(recipe, config, torch.device("cpu")).state_dict()
        weights = {name: weights.get(name, tensor).to(tensor.dtype) for name, tensor in base.items()}
    processor = AriaProcessor.from_pretrained(settings.path, revision=settings.revision)
    _write(recipe, config, weights, processor, out / EXPORT)
    return out / EXPORT


def _write(
    recipe: Recipe, config: AriaConfig, weights: Mapping[str, Tensor], processor: AriaProcessor, folder: Path
) -> None:
    if recipe.targets.method == "full":
        save_checkpoint(weights, config, folder)
        processor.save_pretrained(folder)
        # An adapter from an earlier training in this folder; transformers would add it to the weights.
        for name in (ADAPTER_NAME, ADAPTER_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return
    # The adapters alone, on a base without memory: with many ranks this rank has only parts of the model.
    with torch.device("meta"):
        model = Aria(config)
    targets.apply(model, recipe.targets)
    save_adapter(model, folder, base_model=recipe.model.path, revision=recipe.model.revision, state=weights)
