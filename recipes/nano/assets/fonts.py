"""Font faces: which files are used, which families are held out, and glyphs as bitmaps."""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageFont

CHARACTERS = "".join(map(chr, range(33, 127)))  # drawn characters besides the space
EM_SIZES = (20, 36, 64)  # pixels; the renderer scales down from the next larger size

# Families that training never sees: sans, serif, typewriter and hand-drawn.
HELD_OUT_FAMILIES = (
    *("Cabin", "Karla", "Clear Sans", "EB Garamond", "Gentium", "Vollkorn"),
    *("JetBrains Mono", "Courier Prime", "Comic Neue"),
)
STYLES = ("Regular", "Bold", "Italic")
STYLE_NAMES = {"Regular": 0, "Book": 0, "Roman": 0, "Normal": 0, "Bold": 1, "Italic": 2, "Oblique": 2}
STYLE_NAMES |= {"12 Regular": 0, "12 Bold": 1, "12 Italic": 2}  # EB Garamond's cut for text sizes
# Faces of symbols or outlines, and faces that print lower case as capitals.
SKIPPED = (
    *("Math", "Integrals", "NonUnicode", "Sym", "Variants", "Outline", "Smallcaps", "Caps", "Initials"),
    *("Dingbats", "D050000L", "Display", "Condensed", "Tamil", "Monoisome", "Alta", "Upright", "Thin", "LinBiolinum_K"),
    # Designs that are already included under another name.
    *("Arimo", "Tinos", "Cousine", "Heros", "Termes", "Cursor", "Schola", "Pagella", "Bonum", "Adventor"),
    *("STIXGeneral", "No2", "No3", "Minus", "Classical", "Variable Width", "Caption", "Medium", "Style"),
)


@dataclass(frozen=True)
class Face:
    """A font file in one style."""

    family: str
    style: str
    path: Path

    @property
    def held_out(self) -> bool:
        """Whether the family is reserved for evaluation."""
        return self.family.startswith(HELD_OUT_FAMILIES)


def find_faces(folder: Path) -> list[Face]:
    """Find usable faces under ``folder``: one file per family and style (regular, bold, italic), sorted by name."""
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
    """Return whether every printable character has a glyph and lower case differs from capitals."""
    masks = {character: bytes(font.getmask(character)) for character in CHARACTERS}
    missing = bytes(font.getmask("\u0378"))
    blank = any(not any(mask) for mask in masks.values())
    return not blank and missing not in masks.values() and masks["a"] != masks["A"]


def rasterise(faces: list[ImageFont.FreeTypeFont], em: int) -> tuple[np.ndarray, bytes]:
    """Rasterise the glyphs of faces opened at size ``em``.

    Returns:
        Boxes ``(faces, characters, 4)`` int16 in pixels: left bearing, top (negative above the baseline), width,
        height; and the xz-compressed 8-bit bitmaps end to end, row-major. They have 16 shades, which halves their size
        without a visible difference.
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
    """Measure advances of space and ``CHARACTERS``, then the heights of "x" and "H": ``(97,)`` float32 in ems."""
    size = font.size
    advances = [font.getlength(character) for character in " " + CHARACTERS]
    heights = [-font.getbbox(letter, anchor="ls")[1] for letter in "xH"]
    return np.array(advances + heights, np.float32) / size
