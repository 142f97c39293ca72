"""Folders of pictures, clips and documents, each told of by itself: the work behind ``aria describe``."""

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
"""What is asked where nothing else is said."""

_SUFFIXES = {
    "image": "jpg jpeg jpe jfif mpo png apng gif webp bmp dib tif tiff avif jp2 j2k jpx pbm pgm ppm pnm tga ico",
    "video": "mp4 m4v mov mkv webm avi mpg mpeg mpe m2v ts m2ts mts wmv asf flv 3gp 3g2 ogv vob mxf y4m",
    "document": "pdf",
}
_KINDS = {f".{suffix}": kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
_PICTURE_SETTINGS = ("max_image_size", "split_image")
_SETTINGS = {
    "image": _PICTURE_SETTINGS,
    "video": (*_PICTURE_SETTINGS, "num_frames"),
    "document": (*_PICTURE_SETTINGS, "pages"),
}


@dataclass(frozen=True)
class MediaItem:
    """A file to tell of."""

    path: str
    """As it was found: below the folder that was named."""
    kind: str
    """image, video or document, by the end of its name."""


def find_media(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[MediaItem], int]:
    """Pictures, clips and documents among files and in folders, and how many other files were passed over.

    Folders are walked to the bottom, in the order of names. What begins with a dot is neither taken nor counted there;
    links to folders are not followed. A file that is found twice is taken once.

    Raises:
        FileNotFoundError: there is nothing at one of the paths.
        OSError: a folder cannot be read.
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
    """Makes one record of each medium: what was asked, what was answered, and what it cost."""

    model: str
    """Its name, for the records."""
    params: SamplingParams
    prompt: str | None = None
    """None means :data:`PROMPTS`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of content parts: ``max_image_size`` and ``split_image``, ``num_frames`` of clips, ``pages`` of documents."""
    adapter: str | None = None
    """The name, in the engine, of the adapter that answers."""
    weights: Mapping[str, str | None] = field(default_factory=dict)
    """Where ``base`` and ``adapter`` lie, for the records: trained adapters lie in folders of one name."""

    def name(self, medium: MediaItem) -> str:
        """Its path."""
        return medium.path

    def heavy(self, medium: MediaItem) -> bool:
        """Clips and documents are many pictures each."""
        return medium.kind != "image"

    async def do(self, engine: AsyncEngine, medium: MediaItem) -> dict[str, Any]:
        """The medium's record; a file that cannot be read or does not fit has the reason under ``error``.

        Raises:
            Exception: the engine failed, which says nothing about the file.
        """
        start = time.perf_counter()
        try:
            prepared = await engine.prepare(self.messages(medium))
            content = await asyncio.to_thread(_content, medium.path)  # of what could be read, which has limits
        except (ValueError, OSError) as error:
            return self._record(medium, time.perf_counter() - start, error=error)
        result = await engine.chat(prepared, self.params, adapter=self.adapter)
        seconds = time.perf_counter() - start
        fault = ValueError("the schema's grammar grew beyond its limits") if result.finish_reason == "error" else None
        return self._record(medium, seconds, content=content, result=result, shown=prepared.media[0], error=fault)

    def give_up(self, medium: MediaItem, error: Exception) -> dict[str, Any]:
        """The record of a medium that the engine failed at."""
        return self._record(medium, 0.0, error=error)

    def messages(self, medium: MediaItem) -> list[dict[str, Any]]:
        """The question about a medium. Frames and pages end with a newline themselves; a picture gets one."""
        settings = {name: self.settings[name] for name in _SETTINGS[medium.kind] if name in self.settings}
        part = {"type": medium.kind, "path": medium.path, **settings}
        text = "\n" * (medium.kind == "image") + self._asked(medium)
        return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]

    def recognize(self, record: Mapping[str, Any]) -> tuple[str, bool]:
        """Path and failure of a record that answers the same question.

        Raises:
            ValueError: it is no record of this kind, or of another question, or other weights answered.
        """
        path, kind = record.get("path"), record.get("kind")
        if not isinstance(path, str) or kind not in PROMPTS or "error" not in record:
            raise ValueError(f"the output holds {str(record)[:80]}, no record of this kind; name another file")
        now = {
            "prompt": self._asked(MediaItem(path, kind)),
            "model": self.model,
            **self.weights,
            "settings": self._settings(kind),
        }
        for name, value in now.items():
            # Records of old tell neither base, adapter nor settings: the model's name stands for the first.
            before = record.get(name, value if name in ("base", "settings") else None)
            if before != value:
                raise ValueError(
                    f"the output tells of {path!r} with the {name} {before!r:.200}, and now it is {value!r:.200}; "
                    f"name another file, or use the same {name}"
                )
        return path, record["error"] is not None

    def changed(self, medium: MediaItem, record: Mapping[str, Any]) -> str | None:
        """Whether a file's content is another one than the record tells of.

        Raises:
            OSError: it cannot be read.
        """
        told = record.get("content")
        if not isinstance(told, Mapping):  # a record of old, or of what could not be read
            return None
        found = Path(medium.path).stat()
        if (found.st_size, found.st_mtime_ns) == (told.get("bytes"), told.get("modified")):
            return None
        same = found.st_size == told.get("bytes") and _digest(medium.path) == told.get("blake2b")
        return None if same else "the content"

    def _settings(self, kind: str) -> dict[str, Any]:
        """What is asked for besides the prompt, where it is no default."""
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
            "prompt": self._asked(medium),
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

    def _asked(self, medium: MediaItem) -> str:
        return PROMPTS[medium.kind] if self.prompt is None else self.prompt


def _content(path: str) -> dict[str, Any]:
    """What a file is known again by.

    The time of its last change saves reading it where it is the same, and a copy has another one.
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
