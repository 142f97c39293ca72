"""Layout and dtype of a Hub repository's weights from the headers of its safetensors files, a few kilobytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from aria.checkpoint.layouts import Layout, Shape, detect, main_dtype, place
from aria.checkpoint.stored import StoredTensor, dtype_of_code


def read_remote(
    repo_id: str, shapes: Mapping[str, Shape], *, revision: str | None = None
) -> tuple[Layout, torch.dtype]:
    """Layout and dtype of a Hub repository's weights, checked name by name and shape by shape as loading would.

    Args:
        repo_id: Repository such as ``rhymes-ai/Aria``.
        shapes: Name and shape of each parameter of the model, see :func:`aria.checkpoint.parameter_shapes`.
        revision: Branch, tag or commit.

    Raises:
        FileNotFoundError: The Hub cannot be reached.
        ValueError: The repository has no safetensors, or they are damaged or do not fit the model.
    """
    stored = _headers(repo_id, revision)
    try:
        layout = detect({name: tensor.shape for name, tensor in stored.items()}, shapes)
        plan = place(layout, stored, shapes)
    except ValueError as error:
        raise ValueError(f"{repo_id}: {error}") from None
    return layout, main_dtype(tensor for parts in plan.values() for _, tensor in parts)


def _headers(repo_id: str, revision: str | None) -> dict[str, StoredTensor]:
    try:
        files = get_safetensors_metadata(repo_id, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        raise ValueError(
            f"{repo_id} has no safetensors, the only weights whose headers the Hub can show; fetch PaddlePaddle's "
            "model_state.pdparams whole and give its folder (pickles of torch, .bin or .pth, are not read at all)"
        ) from None
    except SafetensorsParsingError as error:
        raise ValueError(f"{repo_id} has a damaged safetensors file: {error}") from None
    except Exception as error:  # errors of the HTTP client, which differs between major versions of huggingface_hub
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"the weights of {repo_id} are not on this machine, and their headers cannot be read on the Hub: {reason}"
        ) from None
    return {
        key: StoredTensor(dtype_of_code(tensor.dtype, key, f"{repo_id}/{name}"), tuple(tensor.shape), segments=())
        for name, file in files.items()
        for key, tensor in file.tensors.items()
    }
