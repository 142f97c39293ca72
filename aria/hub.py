"""Where a model's files are: a local path, a Hub repository, or the nano model that ships with the package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

NANO = Path(__file__).parent / "nano"
"""Folder of the packaged small model, the default wherever a model is asked for."""

ADAPTER_NAME = "adapter_config.json"
"""What makes a folder an adapter."""

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    path_or_repo_id: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Local path of a model's files.

    Args:
        path_or_repo_id: a folder or file on disk, a Hub repository such as ``rhymes-ai/Aria``, or None for nano.
        revision: branch, tag or commit of a Hub repository.
        allow_patterns: glob patterns of the files needed from a Hub repository; None means all.

    Raises:
        FileNotFoundError: nothing on disk has this path and it cannot be fetched from the Hub either.
        ValueError: ``revision`` is given for a local path.
    """
    if path_or_repo_id is None:
        return NANO
    path = Path(path_or_repo_id).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for Hub repositories, but {str(path)!r} is a local path; leave it out"
            )
        return path
    name = str(path_or_repo_id)
    if not _REPO_ID.fullmatch(name):
        raise FileNotFoundError(
            f"no file or folder {name!r}, and it is not a Hub repository id (owner/name); check the path"
        )
    patterns = list(allow_patterns) if allow_patterns is not None else None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is neither a local path nor a Hub repository that could be fetched{at}: {reason}; "
            "check the name and the network, or give the folder of a copy"
        ) from None


def model_name(path_or_repo_id: str | os.PathLike[str] | None = None) -> str:
    """What a model is called where people name it: the last part of its path or repository, or ``aria-nano``."""
    if path_or_repo_id is None:
        return "aria-nano"
    return Path(path_or_repo_id).expanduser().resolve().name


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object.
    """
    if not file.is_file():
        adapter = (file.parent / ADAPTER_NAME).is_file()
        mend = "it is an adapter: name the model, and this as --adapter" if adapter else "a model folder needs one"
        raise FileNotFoundError(f"{file.parent} has no {file.name}; {mend}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} should hold a JSON object, but holds a {type(data).__name__}")
    return data
