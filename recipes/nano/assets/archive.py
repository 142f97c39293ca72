"""What nano's images are drawn from, in memory and in one npz file: faces, emoji sprites, photographs and words."""

import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from recipes.nano.assets.excluded_words import is_excluded

FOLDER = Path(__file__).resolve().parents[3] / ".nano"


@dataclass
class Assets:
    """Everything that the planner and the renderer draw from.

    Attributes:
        families: Font family of each face.
        face_metrics: ``(faces, 97)`` float32, as ``fonts.measure`` returns it.
        glyph_boxes: Size in pixels -> ``(faces, 94, 4)`` int16, as ``fonts.rasterise`` returns it.
        glyph_bits: Size in pixels -> packed bitmaps, as ``fonts.rasterise`` returns them.
        emoji: Records with ``label``, ``hexcode`` and ``concrete``.
        sprites: PNG files, style after style, each in the order of ``emoji``.
        photos: JPEG files.
        words: English words.
    """

    families: list[str]
    face_metrics: np.ndarray
    glyph_boxes: dict[int, np.ndarray]
    glyph_bits: dict[int, bytes]
    emoji: list[dict]
    sprites: list[bytes]
    photos: list[bytes]
    words: list[str]

    @cached_property
    def labels(self) -> list[str]:
        """Emoji labels in the order of one style's sprites."""
        return [entry["label"] for entry in self.emoji]

    @property
    def num_styles(self) -> int:
        """Number of drawings of each emoji."""
        return len(self.sprites) // max(len(self.emoji), 1)

    def save(self, path: Path) -> None:
        """Write one npz file."""
        meta = {"families": self.families, "emoji": self.emoji, "words": self.words}
        arrays: dict[str, np.ndarray] = {"meta": pack_json(meta), "face_metrics": self.face_metrics}
        for em, boxes in self.glyph_boxes.items():
            arrays[f"glyph_boxes_{em}"] = boxes
            arrays[f"glyph_bits_{em}"] = np.frombuffer(self.glyph_bits[em], np.uint8)
        arrays["sprites"], arrays["sprite_ends"] = pack_files(self.sprites)
        arrays["photos"], arrays["photo_ends"] = pack_files(self.photos)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path = FOLDER / "assets.npz", images: bool = True) -> "Assets":
        """Read ``path``; without ``images``, bitmaps, sprites and photos stay empty, which suffices for planning."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; build it with: python -m recipes.nano.assets.build")
        with np.load(path) as file:
            meta = unpack_json(file["meta"])
            ems = [int(name.rsplit("_", 1)[1]) for name in file if name.startswith("glyph_boxes_")]
            bits = {em: file[f"glyph_bits_{em}"].tobytes() if images else b"" for em in ems}
            files = {}
            for kind in ("sprite", "photo"):
                ends = file[f"{kind}_ends"]
                files[kind] = unpack_files(file[f"{kind}s"], ends) if images else [b""] * len(ends)
            boxes = {em: file[f"glyph_boxes_{em}"] for em in ems}
            return cls(
                meta["families"],
                file["face_metrics"],
                boxes,
                bits,
                meta["emoji"],
                files["sprite"],
                files["photo"],
                [word for word in meta["words"] if not is_excluded(word)],
            )


def pack_json(value: object) -> np.ndarray:
    """Return ``value`` as zlib-compressed JSON in a uint8 array."""
    return np.frombuffer(zlib.compress(json.dumps(value).encode()), np.uint8)


def unpack_json(array: np.ndarray) -> dict:
    """Invert ``pack_json``."""
    return json.loads(zlib.decompress(array.tobytes()))


def pack_files(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate files; return the bytes and the end of each file."""
    ends = np.cumsum([len(content) for content in files], dtype=np.int64)
    return np.frombuffer(b"".join(files), np.uint8), ends


def unpack_files(content: np.ndarray, ends: np.ndarray) -> list[bytes]:
    """Invert ``pack_files``."""
    starts = [0, *ends[:-1]] if len(ends) else []
    return [content[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]
