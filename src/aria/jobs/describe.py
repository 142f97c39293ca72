"""Describing folders of images, videos and documents, one record per file, for ``aria describe``."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aria.engine import AsyncEngine, SamplingParams
from aria.engine.outputs import Result, Usage
from aria.processor.image_inputs import Medium

PROMPTS = {
    "image": "Describe this picture.",
    "video": "Describe what happens in this clip.",
    "document": "Summarize this document.",
}
"""Default prompts by kind."""

_SUFFIXES = {
    "image": "jpg jpeg jpe jfif mpo png apng gif webp bmp dib tif tiff avif jp2 j2k jpx pbm pgm ppm pnm tga ico",
    "video": "mp4 m4v mov mkv webm avi mpg mpeg mpe m2v ts m2ts mts wmv asf flv 3gp 3g2 ogv vob mxf y4m",
    "document": "pdf",
}
_KINDS = {f".{suffix}": kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_IMAGE_SETTINGS = ("max_image_size", "split_image")
_SETTINGS = {
    "image": _IMAGE_SETTINGS,
    "video": (*_IMAGE_SETTINGS, "num_frames"),
    "document": (*_IMAGE_SETTINGS, "pages"),
}


@dataclass(frozen=True)
class MediaItem:
    """A file to describe."""

    path: str
    """Its path as it was found, relative to the given folder."""
    kind: str
    """image, video or document, by its suffix."""


def find_media(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[MediaItem], int]:
    """Find images, videos and documents in files and folders.

    Folders are searched recursively, in alphabetical order. Names that begin with a dot are ignored, and links to
    folders are not followed. A file that is found twice is listed once.

    Returns:
        The media files, and the number of other files.

    Raises:
        FileNotFoundError: A path does not exist.
        OSError: A folder cannot be read.
    """
    media: dict[str, MediaItem] = {}
    others = 0
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder at {str(path)!r}; check the path")
        for file in _walk(path) if path.is_dir() else [path]:
            kind = _KINDS.get(file.suffix.lower())
            if kind is None:
                others += 1
            else:
                media.setdefault(str(file), MediaItem(str(file), kind))
    return list(media.values()), others


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for at, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at, name) for name in sorted(files) if not name.startswith("."))


@dataclass(frozen=True)
class Describer:
    """Makes a record of each file: prompt, answer and cost."""

    model: str
    """Name of the model, for the records."""
    params: SamplingParams
    prompt: str | None = None
    """None: :data:`PROMPTS`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of content parts: ``max_image_size``, ``split_image``, ``num_frames`` (videos), ``pages`` (documents)."""
    adapter: str | None = None
    """The engine's name of the adapter to use."""
    weights: Mapping[str, str | None] = field(default_factory=dict)
    """Paths of ``base`` and ``adapter``, for the records, since folders of adapters often have the same name."""

    def name(self, medium: MediaItem) -> str:
        """The path."""
        return medium.path

    def heavy(self, medium: MediaItem) -> bool:
        """Videos and documents consist of many images."""
        return medium.kind != "image"

    async def do(self, engine: AsyncEngine, medium: MediaItem) -> dict[str, Any]:
        """Make a file's record; if it cannot be read or does not fit, the reason is under ``error``.

        Raises:
            Exception: The engine failed, which is not the fault of the file.
        """
        start = time.perf_counter()
        try:
            prepared = await engine.prepare(self.messages(medium))
            content = await asyncio.to_thread(_content, medium.path)  # after preparing, which checks limits
        except (ValueError, OSError) as error:
            return self._record(medium, time.perf_counter() - start, error=error)
        result = await engine.chat(prepared, self.params, adapter=self.adapter)
        seconds = time.perf_counter() - start
        fault = ValueError("following the schema exceeded its limits") if result.finish_reason == "error" else None
        return self._record(medium, seconds, content=content, result=result, shown=prepared.media[0], error=fault)

    def give_up(self, medium: MediaItem, error: Exception) -> dict[str, Any]:
        """The record of a file on which the engine failed."""
        return self._record(medium, 0.0, error=error)

    def messages(self, medium: MediaItem) -> list[dict[str, Any]]:
        """The question about a file. Frames and pages end with a newline by themselves; an image gets one."""
        settings = {name: self.settings[name] for name in _SETTINGS[medium.kind] if name in self.settings}
        part = {"type": medium.kind, "path": medium.path, **settings}
        text = "\n" * (medium.kind == "image") + self._prompt(medium)
        return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]

    def recognize(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """Path of a record's file, and whether it failed.

        Raises:
            ValueError: Not a record of this kind, or one of another prompt, other settings or another model.
        """
        path, kind = record.get("path"), record.get("kind")
        if not isinstance(path, str) or kind not in PROMPTS or "error" not in record:
            raise ValueError(f"the output holds {str(record)[:80]}, not a record of this kind; name another file")
        now = {
            "prompt": self._prompt(MediaItem(path, kind)),
            "model": self.model,
            **self.weights,
            "settings": self._settings(kind),
        }
        for name, value in now.items():
            # Older records lack base, adapter and settings: the model's name stands for the first.
            before = record.get(name, value if name in ("base", "settings") else None)
            if before != value:
                raise ValueError(
                    f"the output describes {path!r} with the {name} {before!r:.200}, but now it is {value!r:.200}; "
                    f"name another file, or use the same {name}"
                )
        return path, record["error"] is not None

    def changed(self, medium: MediaItem, record: Mapping[str, Any]) -> str | None:
        """Whether a file's content has changed since its record was made.

        Raises:
            OSError: The file cannot be read.
        """
        recorded = record.get("content")
        if not isinstance(recorded, Mapping):  # an older record, or one of a file that could not be read
            return None
        found = Path(medium.path).stat()
        if (found.st_size, found.st_mtime_ns) == (recorded.get("bytes"), recorded.get("modified")):
            return None
        same = found.st_size == recorded.get("bytes") and _digest(medium.path) == recorded.get("blake2b")
        return None if same else "the content"

    def _settings(self, kind: str) -> dict[str, Any]:
        """Media options and sampling parameters that differ from their defaults."""
        shown = {name: self.settings[name] for name in _SETTINGS[kind] if name in self.settings}
        params = {
            field.name: getattr(self.params, field.name)
            for field in dataclasses.fields(self.params)
            if getattr(self.params, field.name) not in (field.default, ())
        }
        if isinstance(schema := params.get("json_schema"), Mapping):
            text = json.dumps(schema, sort_keys=True).encode()
            params["json_schema"] = f"blake2b {hashlib.blake2b(text, digest_size=16).hexdigest()}"
        settings: dict[str, Any] = json.loads(json.dumps({**shown, **params}, default=str))
        return settings

    def _record(
        self,
        medium: MediaItem,
        seconds: float,
        *,
        content: Mapping[str, Any] | None = None,
        result: Result | None = None,
        shown: Medium | None = None,
        error: Exception | None = None,
    ) -> dict[str, Any]:
        return {
            "path": medium.path,
            "kind": medium.kind,
            "prompt": self._prompt(medium),
            "text": None if result is None else result.text,
            "finish_reason": None if result is None else result.finish_reason,
            "usage": None if result is None or shown is None else _usage(result.usage, shown),
            "model": self.model,
            "seconds": round(seconds, 3),
            "error": None if error is None else str(error) or type(error).__name__,
            **self.weights,
            "settings": self._settings(medium.kind),
            "content": content,
        }

    def _prompt(self, medium: MediaItem) -> str:
        return PROMPTS[medium.kind] if self.prompt is None else self.prompt


def _content(path: str) -> dict[str, Any]:
    """Size, modification time and digest of a file.

    If size and time are unchanged, the file need not be read again; copies have other times.
    """
    found = Path(path).stat()
    return {"bytes": found.st_size, "modified": found.st_mtime_ns, "blake2b": _digest(path)}


def _digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _usage(usage: Usage, shown: Medium) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "media": {"count": shown.count, "crops": shown.crops, "tokens": shown.tokens},
    }
