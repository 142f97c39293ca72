"""Folders of pictures, clips and documents, each told of by itself: the work behind ``aria describe``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aria.engine import AsyncEngine, SamplingParams
from aria.engine.outputs import Result, Usage
from aria.processor.pictures import Medium

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
class MediaFile:
    """A file to tell of."""

    path: str
    """As it was found: below the folder that was named."""
    kind: str
    """image, video or document, by the end of its name."""


def find_media(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[MediaFile], int]:
    """Pictures, clips and documents among files and in folders, and how many other files were passed over.

    Folders are walked to the bottom, in the order of names. What begins with a dot is neither taken nor counted there;
    links to folders are not followed. A file that is found twice is taken once.

    Raises:
        FileNotFoundError: there is nothing at one of the paths.
        OSError: a folder cannot be read.
    """
    media: dict[str, MediaFile] = {}
    others = 0
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder at {str(path)!r}; check the path")
        for file in _walk(path) if path.is_dir() else [path]:
            kind = _KINDS.get(file.suffix.lower())
            if kind is None:
                others += 1
            else:
                media.setdefault(str(file), MediaFile(str(file), kind))
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

    def name(self, medium: MediaFile) -> str:
        """Its path."""
        return medium.path

    def heavy(self, medium: MediaFile) -> bool:
        """Clips and documents are many pictures each."""
        return medium.kind != "image"

    async def do(self, engine: AsyncEngine, medium: MediaFile) -> dict[str, Any]:
        """The medium's record; a file that cannot be read or does not fit has the reason under ``error``.

        Raises:
            Exception: the engine failed, which says nothing about the file.
        """
        start = time.perf_counter()
        try:
            prepared = await engine.prepare(self.messages(medium))
        except (ValueError, OSError) as error:
            return self._record(medium, time.perf_counter() - start, error=error)
        result = await engine.chat(prepared, self.params, adapter=self.adapter)
        seconds = time.perf_counter() - start
        fault = ValueError("the schema's grammar grew beyond its limits") if result.finish_reason == "error" else None
        return self._record(medium, seconds, result=result, shown=prepared.media[0], error=fault)

    def give_up(self, medium: MediaFile, error: Exception) -> dict[str, Any]:
        """The record of a medium that the engine failed at."""
        return self._record(medium, 0.0, error=error)

    def messages(self, medium: MediaFile) -> list[dict[str, Any]]:
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
        now = {"prompt": self._asked(MediaFile(path, kind)), "model": self.model, **self.weights}
        for name, value in now.items():
            # Records of old tell neither base nor adapter: the model's name stands for the one, none for the other.
            before = record.get(name, value if name == "base" else None)
            if before != value:
                raise ValueError(
                    f"the output tells of {path!r} with the {name} {before!r}, and now it is {value!r}; "
                    f"name another file, or use the same {name}"
                )
        return path, record["error"] is not None

    def _record(
        self,
        medium: MediaFile,
        seconds: float,
        *,
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
        }

    def _asked(self, medium: MediaFile) -> str:
        return PROMPTS[medium.kind] if self.prompt is None else self.prompt


def _usage(usage: Usage, shown: Medium) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "media": {"count": shown.pictures, "crops": shown.crops, "tokens": shown.tokens},
    }
