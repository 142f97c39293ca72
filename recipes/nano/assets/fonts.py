"""Faces: which font files are used, which families are held out, and their glyphs as bitmaps."""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageFont

CHARACTERS = "".join(map(chr, range(33, 127)))  # what is drawn besides the space
EM_SIZES = (20, 36, 64)  # glyphs exist at these sizes; the renderer scales the nearest larger one down

# Whole families that training never sees: sans, serif, typewriter and hand-drawn.
HELD_OUT_FAMILIES = (
    *("Cabin", "Karla", "Clear Sans", "EB Garamond", "Gentium", "Vollkorn"),
    *("JetBrains Mono", "Courier Prime", "Comic Neue"),
)
STYLES = ("Regular", "Bold", "Italic")
STYLE_NAMES = {"Regular": 0, "Book": 0, "Roman": 0, "Normal": 0, "Bold": 1, "Italic": 2, "Oblique": 2}
STYLE_NAMES |= {"12 Regular": 0, "12 Bold": 1, "12 Italic": 2}  # EB Garamond's cut for text sizes
# Faces whose letters are not letters (symbols, outlines) or that print small letters as capitals.
SKIPPED = (
    *("Math", "Integrals", "NonUnicode", "Sym", "Variants", "Outline", "Smallcaps", "Caps", "Initials"),
    *("Dingbats", "D050000L", "Display", "Condensed", "Tamil", "Monoisome", "Alta", "Upright", "Thin", "LinBiolinum_K"),
    # Second copies of designs that are there under another name.
    *("Arimo", "Tinos", "Cousine", "Heros", "Termes", "Cursor", "Schola", "Pagella", "Bonum", "Adventor"),
    *("STIXGeneral", "No2", "No3", "Minus", "Classical", "Variable Width", "Caption", "Medium", "Style"),
)


@dataclass(frozen=True)
class Face:
    """One font file in one style."""

    family: str
    style: str
    path: Path

    @property
    def held_out(self) -> bool:
        """Whether the face's family is kept for evaluation."""
        return self.family.startswith(HELD_OUT_FAMILIES)


def find_faces(folder: Path) -> list[Face]:
    """Every usable face under ``folder``: one file for each family in regular, bold and italic, sorted by name."""
    found: dict[tuple[str, str], Face] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf") or not path.is_file():
            continue
        font = ImageFont.truetype(str(path), 40)
        family, style = (name or "" for name in font.getname())
        if style not in STYLE_NAMES or any(word in f"{family} {path.stem}" for word in SKIPPED):
            continue
        face = Face(family, STYLES[STYLE_NAMES[style]], path)
        if _draws_letters(font):
            found.setdefault((family.lower(), face.style), face)
    return [found[key] for key in sorted(found)]


def _draws_letters(font: ImageFont.FreeTypeFont) -> bool:
    """Every printable character has its own glyph, and small letters differ from capitals."""
    masks = {character: bytes(font.getmask(character)) for character in CHARACTERS}
    missing = bytes(font.getmask("\u0378"))
    blank = any(not any(mask) for mask in masks.values())
    return not blank and missing not in masks.values() and masks["a"] != masks["A"]


def rasterise(faces: list[ImageFont.FreeTypeFont], em: int) -> tuple[np.ndarray, bytes]:
    """Glyph bitmaps of faces opened at size ``em``.

    Returns boxes ``(faces, characters, 4)`` int16 (left bearing, top above the baseline as a negative number, width,
    height in pixels) and the xz-packed concatenation of the 8-bit bitmaps, row-major, in 16 shades: nobody sees more
    on the edge of a letter, and they take half the room.
    """
    boxes = np.zeros((len(faces), len(CHARACTERS), 4), np.int16)
    bitmaps: list[bytes] = []
    for f, font in enumerate(faces):
        for c, character in enumerate(CHARACTERS):
            mask, (left, top) = font.getmask2(character, mode="L", anchor="ls")
            boxes[f, c] = (left, top, *mask.size)
            bitmaps.append(bytes(mask))
    shades = np.frombuffer(b"".join(bitmaps), np.uint8).astype(np.uint16)
    return boxes, lzma.compress(((shades + 8) // 17 * 17).astype(np.uint8).tobytes())


def measure(font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Advances of space and ``CHARACTERS``, then the height of "x" and of "H", all in ems, float32 ``(97,)``."""
    size = font.size
    advances = [font.getlength(character) for character in " " + CHARACTERS]
    heights = [-font.getbbox(letter, anchor="ls")[1] for letter in "xH"]
    return np.array(advances + heights, np.float32) / size
