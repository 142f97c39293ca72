"""Locate the files of a model (local path, Hub repository, or the packaged nano model), and read and write small files.

Model files are untrusted, so JSON is parsed within limits, and errors say what is wrong.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from aria.json_walk import iter_containers, trail_keys

NANO = Path(__file__).parent / "nano"
"""Folder of the packaged small model, the default wherever a model is expected."""

ADAPTER_NAME = "adapter_config.json"
"""A folder with this file is an adapter."""

MAX_JSON_BYTES = 16 << 20
"""Maximum size of a JSON file. The largest of a published Aria, the index of 5,800 tensors, has 0.6 MB."""
MAX_JSON_DEPTH = 100
"""Maximum nesting of objects and lists."""
_MAX_NUMBER = 1e300
"""Larger numbers overflow in arithmetic."""

_REVISION = re.compile(r"\w[\w./+-]*")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    path_or_repo_id: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Return the local path of a model's files, downloading them from the Hub if necessary.

    Args:
        path_or_repo_id: A folder or file on disk, a Hub repository such as ``rhymes-ai/Aria``, or None for nano.
        revision: Branch, tag or commit of a Hub repository.
        allow_patterns: Glob patterns of the files needed from a Hub repository; None means all.

    Raises:
        FileNotFoundError: Not a path on disk, and not available from the Hub either.
        ValueError: ``revision`` is given for a local path, or is malformed.
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
    if revision is not None and (".." in revision or not _REVISION.fullmatch(revision)):
        raise ValueError(f"revision={revision!r:.100} is not a branch, tag or commit")
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
    """The display name of a model: the last part of its path or repository, or ``aria-nano``."""
    if path_or_repo_id is None:
        return "aria-nano"
    return Path(path_or_repo_id).expanduser().resolve().name


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: See :func:`parse_json`.
    """
    if not file.is_file():
        adapter = (file.parent / ADAPTER_NAME).is_file()
        hint = "it is an adapter: pass it as --adapter, beside the model" if adapter else "a model folder needs one"
        raise FileNotFoundError(f"{file.parent} has no {file.name}; {hint}")
    return parse_json(read_bytes(file, MAX_JSON_BYTES), file)


def read_bytes(file: Path, most: int) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises:
        ValueError: The file is larger.
    """
    with file.open("rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; at most {most:,} are read")
    return data


def read_text(file: Path, most: int) -> str:
    """Read a UTF-8 text file of at most ``most`` bytes.

    Raises:
        ValueError: The file is larger or not UTF-8.
    """
    try:
        return read_bytes(file, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(data: bytes, name: str | os.PathLike[str]) -> dict[str, Any]:
    """Parse a JSON object in UTF-8; ``name`` is used in error messages.

    Raises:
        ValueError: Not JSON, not an object, nested deeper than :data:`MAX_JSON_DEPTH`, a duplicate key, or a number
            that is not finite.
    """
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, but it holds a {type(found).__name__}")
        _check_values(found)
    except RecursionError:
        raise ValueError(f"{name} is not valid JSON: it is deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject duplicate keys: parsers differ in which one they use."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {twice!r:.80} twice")
    return found


def _check_values(found: dict[str, Any]) -> None:
    for container, trail, depth in iter_containers(found):
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"it is deeper than {MAX_JSON_DEPTH} levels")
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, int | float) and not abs(value) < _MAX_NUMBER:  # also true for NaN
                where = ".".join(map(str, (*trail_keys(trail), key)))
                raise ValueError(f"{where:.200} is {value!r:.40}; expected a finite number below {_MAX_NUMBER:g}")


def write_file(file: Path, data: str | bytes) -> None:
    """Write a file atomically, text as UTF-8.

    Raises:
        OSError: It could not be written. An existing file is left unchanged.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as out:
            out.write(data.encode() if isinstance(data, str) else data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write an object as JSON atomically, with the same bytes on every system. Creates the folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if os.name == "nt":  # cannot sync folders, and only files open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems do not support it; they write in order.
        pass
    finally:
        os.close(descriptor)
