"""Where a model's files are, be it a local path, a Hub repository, or the nano model that ships with the package, and
how its small files are read and written.

Whoever publishes a model writes its files, so JSON is read within limits, and what does not fit is named.
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

NANO = Path(__file__).parent / "nano"
"""Folder of the packaged small model, the default wherever a model is asked for."""

ADAPTER_NAME = "adapter_config.json"
"""What makes a folder an adapter."""

MAX_JSON_BYTES = 16 << 20
"""Of a JSON file. The largest of a published Aria, the index of 5,800 tensors, takes 0.6 MB."""
MAX_JSON_DEPTH = 100
"""Of objects and lists in each other."""
_MAX_NUMBER = 1e300
"""Numbers beyond it do not survive arithmetic."""

_REVISION = re.compile(r"\w[\w./+-]*")
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
        ValueError: ``revision`` is given for a local path, or can be none.
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
        raise ValueError(f"revision={revision!r:.100} is not the name of a branch or tag, nor a commit")
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
        ValueError: see :func:`parse_json`.
    """
    if not file.is_file():
        adapter = (file.parent / ADAPTER_NAME).is_file()
        mend = "it is an adapter: name the model, and this as --adapter" if adapter else "a model folder needs one"
        raise FileNotFoundError(f"{file.parent} has no {file.name}; {mend}")
    return parse_json(read_bytes(file, MAX_JSON_BYTES), file)


def read_bytes(file: Path, most: int) -> bytes:
    """All of a file that has at most so many bytes.

    Raises:
        ValueError: it has more.
    """
    with file.open("rb") as opened:
        data = opened.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; at most {most:,} are read")
    return data


def read_text(file: Path, most: int) -> str:
    """A text in UTF-8 of at most so many bytes.

    Raises:
        ValueError: it has more, or is not UTF-8.
    """
    try:
        return read_bytes(file, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(data: bytes, name: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that JSON in UTF-8 holds; ``name`` is what errors call it.

    Raises:
        ValueError: it is not JSON, not an object, deeper than :data:`MAX_JSON_DEPTH`, has a key twice, or holds a
            number that is not finite.
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
    """Refuse keys that stand twice: readers differ in which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {twice!r:.80} twice")
    return found


def _check_values(found: dict[str, Any]) -> None:
    todo: list[tuple[Any, tuple[Any, ...]]] = [(found, ())]
    while todo:
        container, path = todo.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, dict | list):
                if len(path) + 2 > MAX_JSON_DEPTH:
                    raise ValueError(f"it is deeper than {MAX_JSON_DEPTH} levels")
                todo.append((value, (*path, key)))
            elif isinstance(value, int | float) and not abs(value) < _MAX_NUMBER:  # NaN is not below anything
                where = ".".join(map(str, (*path, key)))
                raise ValueError(f"{where:.200} is {value!r:.40}; expected a finite number below {_MAX_NUMBER:g}")


def write_file(file: Path, data: str | bytes) -> None:
    """Write a file, texts in UTF-8; it has its name only once it is whole.

    Raises:
        OSError: it could not be written; what was there before still is.
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
    """Write an object as JSON, the same bytes on every system, making the folder if needed; see :func:`write_file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself."""
    if os.name == "nt":  # which syncs no folders, and only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot; they write in order.
        pass
    finally:
        os.close(descriptor)
