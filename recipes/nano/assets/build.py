"""Build ``.nano/assets.npz`` for training and ``.nano/eval.npz`` for evaluation from public packages.

Run once as ``python -m recipes.nano.assets.build`` (Debian 12, npm, pip; about three minutes). Neither file is shipped.
"""

import argparse
import csv
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from recipes.nano.assets import fonts, sources
from recipes.nano.assets.archive import FOLDER, Assets, pack_files, pack_json

TRAINING_STYLES = ("noto", "fluent", "twemoji")
SPRITE_SIZE = 128  # pixels; images of 224 px seldom show them much larger
EVAL_SPRITE_SIZE = 160
PHOTO_SIZE = 384  # pixels of the longer side

# Groups of emojibase that show things; the rest are faces, people, signs and flags.
CONCRETE_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
# Plain shapes and signs with letters belong to other tasks; flags do not exist in every style.
SKIPPED_SUBGROUPS = ("geometric", "alphanum", "keycap", "heart", "country-flag", "subdivision-flag", "flag")


def held_out_word(word: str) -> bool:
    """Return whether training never draws this word: one in twelve, by checksum."""
    return zlib.crc32(word.lower().encode()) % 12 == 0


# --- emoji -----------------------------------------------------------------------------------------------------------


def clean_label(label: str) -> str:
    """Return the label in lower case ASCII: "piñata" -> "pinata"."""
    plain = unicodedata.normalize("NFKD", label.replace("’", "'")).encode("ascii", "ignore").decode()
    return plain.lower()


def list_emoji(root: sources.Sources) -> list[dict]:
    """List emoji that all four styles draw: label, hexcode, and whether it shows a thing (``CONCRETE_GROUPS``)."""
    folder = root.npm(sources.EMOJI_LABELS) / "package" / "en"
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    icons = [IconSet(root.npm(spec)) for spec in sources.EMOJI_PACKAGES.values()]
    found: dict[str, dict] = {}
    for entry in json.loads((folder / "data.json").read_text(encoding="utf-8")):
        group = groups.get(entry.get("group"), "component")
        subgroup = subgroups.get(entry.get("subgroup"), "")
        if group == "component" or subgroup in SKIPPED_SUBGROUPS:
            continue
        if all(icon.name(entry["hexcode"]) for icon in icons):
            label = clean_label(entry["label"])
            record = {"label": label, "hexcode": entry["hexcode"], "concrete": group in CONCRETE_GROUPS}
            found.setdefault(label, record)
    return list(found.values())


class IconSet:
    """An iconify package: SVG images by code point."""

    def __init__(self, folder: Path) -> None:
        package = folder / "package"
        self.characters = json.loads((package / "chars.json").read_text(encoding="utf-8"))
        data = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        self.icons, self.aliases = data["icons"], data.get("aliases", {})
        self.width, self.height = data.get("width", 16), data.get("height", 16)

    def name(self, hexcode: str) -> str | None:
        """Return the icon's name for a code such as ``1F436`` or ``2764-FE0F``, or None."""
        code = hexcode.lower()
        name = self.characters.get(code) or self.characters.get(code.replace("-fe0f", ""))
        return name if name in self.icons or name in self.aliases else None

    def draw(self, hexcode: str, size: int) -> Image.Image:
        """Draw an RGBA image of ``size`` x ``size`` pixels."""
        from resvg_py import svg_to_bytes  # optional: only building assets needs it

        name = self.name(hexcode)
        icon = self.icons.get(name) or self.icons[self.aliases[name]["parent"]]
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{size}" height="{size}">'
        svg = f"{head}{icon['body']}</svg>"
        image = Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA")
        return image if image.size == (size, size) else image.resize((size, size))


def draw_sprites(icons: IconSet, emoji: Iterable[dict], size: int) -> list[bytes]:
    """Draw each emoji as a PNG of up to 255 colours with transparency."""
    files = []
    for entry in emoji:
        image = icons.draw(entry["hexcode"], size)
        out = io.BytesIO()
        image.quantize(255, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
        files.append(out.getvalue())
    return files


# --- words and photographs -------------------------------------------------------------------------------------------


def list_words(root: sources.Sources, labels: Iterable[str]) -> list[str]:
    """List English words of 2 to 12 letters: WordNet lemmas that its tagged texts use, and words of the labels."""
    folder = root.debian(sources.WORD_PACKAGES) / "usr" / "share" / "wordnet"
    words = {word for label in labels for word in re.findall(r"[a-z]+", label)}
    for part in ("noun", "verb", "adj", "adv"):
        with (folder / f"index.{part}").open(encoding="ascii") as file:
            for row in csv.reader(file, delimiter=" ", quoting=csv.QUOTE_NONE):
                if row and row[0] and _tagged_senses(row) > 0:
                    words.add(row[0])
    return sorted(word for word in words if re.fullmatch(r"[a-z]{2,12}", word))


def _tagged_senses(row: list[str]) -> int:
    # lemma pos synset_cnt p_cnt [pointer]... sense_cnt tagsense_cnt offset...
    return int(row[5 + int(row[3])])


def photo_paths(root: sources.Sources) -> tuple[list[Path], list[Path]]:
    """Return photograph files for training and, from other packages, for evaluation."""
    training = [path for spec in sources.TRAINING_PHOTOS for path in _photo_files(root.npm(spec) / "package" / "dist")]
    image, learn, earth = (root.wheel(spec) for spec in sources.WHEELS)
    names = ["rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "astronaut.png", "brick.png", "camera.png"]
    names += ["chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png", "ihc.png", "moon.png"]
    training += [image / "skimage" / "data" / name for name in [*names, "motorcycle_left.png"]]
    training += [*_photo_files(learn), *_photo_files(earth)]
    backgrounds = root.debian(sources.PHOTO_PACKAGES) / "usr" / "share" / "backgrounds"
    held_out = [path for spec in sources.HELD_OUT_PHOTOS for path in _photo_files(root.npm(spec) / "package")]
    held_out += [path for path in _photo_files(backgrounds) if "no-logo" not in path.name]
    return training, held_out


def _photo_files(folder: Path) -> list[Path]:
    suffixes = (".jpg", ".jpeg")
    # Drawings, screenshots and gradients are not photographs.
    skipped = [
        "placeholder",
        "presentation",
        "landing",
        "profile-page",
        "profile.jpg",
        "logo",
        "curved",
        "boxed",
        "blurred",
    ]
    skipped += ["abstract", "desktop/", "painting", "umang", "analogpattern", "free_by"]
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.stat().st_size > 3_000
        and not any(word in path.as_posix().lower() for word in skipped)
    )


def pack_photos(paths: Iterable[Path], known: list[int], cuts: int = 1) -> list[bytes]:
    """Pack photographs as JPEGs of at most ``PHOTO_SIZE`` px, without near-duplicates.

    Args:
        paths: Image files.
        known: Fingerprints so far; extended.
        cuts: Images over 4000 px wide (maps of the earth) are cut into ``cuts`` x ``cuts`` parts.
    """
    files = []
    for path in paths:
        with Image.open(path) as opened:
            opened.draft("RGB", (1600, 1600)) if opened.width <= 4000 else None
            image = opened.convert("RGB")
        n = cuts if image.width > 4000 else 1
        width, height = image.width // n, image.height // n
        for x, y in np.ndindex(n, n):
            part = image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            part.thumbnail((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.LANCZOS)
            mark = fingerprint(part)
            if min(part.size) < 64 or any((mark ^ other).bit_count() <= 6 for other in known):
                continue
            known.append(mark)
            out = io.BytesIO()
            part.save(out, "JPEG", quality=85)
            files.append(out.getvalue())
    return files


def fingerprint(image: Image.Image) -> int:
    """Return a 64-bit difference hash (which neighbour is brighter on a 9 x 8 grid); near-duplicates share most."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int("".join("1" if bit else "0" for bit in (grey[:, 1:] > grey[:, :-1]).ravel()), 2)


# --- the two files ---------------------------------------------------------------------------------------------------


def build(folder: Path = FOLDER) -> None:
    """Fetch missing packages and write both files."""
    root = sources.Sources(folder / "src")
    faces = fonts.find_faces(root.debian(sources.FONT_PACKAGES))
    emoji = list_emoji(root)
    print(f"{len(faces)} faces, {len(emoji)} emoji ({sum(entry['concrete'] for entry in emoji)} of things)", flush=True)
    training, held_out = photo_paths(root)
    known: list[int] = []
    photos, unseen_photos = pack_photos(training, known, cuts=3), pack_photos(held_out, known)
    words = list_words(root, (entry["label"] for entry in emoji))
    print(f"{len(photos)} photographs, {len(unseen_photos)} held out, {len(words)} words", flush=True)
    icons = {style: IconSet(root.npm(spec)) for style, spec in sources.EMOJI_PACKAGES.items()}
    build_training(folder / "assets.npz", faces, emoji, icons, photos, words)
    build_evaluation(folder / "eval.npz", faces, emoji, icons, unseen_photos, words)
    for name in ("assets.npz", "eval.npz"):
        print(f"{name}: {(folder / name).stat().st_size / 2**20:.1f} MiB")


def build_training(
    path: Path,
    faces: list[fonts.Face],
    emoji: list[dict],
    icons: dict[str, IconSet],
    photos: list[bytes],
    words: list[str],
) -> None:
    """Write the training file, without held-out faces, held-out words and the held-out emoji style."""
    seen = [face for face in faces if not face.held_out]
    rasters = {em: fonts.rasterise([ImageFont.truetype(str(f.path), em) for f in seen], em) for em in fonts.EM_SIZES}
    Assets(
        families=[face.family for face in seen],
        face_metrics=np.stack([fonts.measure(ImageFont.truetype(str(face.path), 200)) for face in seen]),
        glyph_boxes={em: boxes for em, (boxes, _) in rasters.items()},
        glyph_bits={em: bits for em, (_, bits) in rasters.items()},
        emoji=emoji,
        sprites=[png for style in TRAINING_STYLES for png in draw_sprites(icons[style], emoji, SPRITE_SIZE)],
        photos=photos,
        words=[word for word in words if not held_out_word(word)],
    ).save(path)


def build_evaluation(
    path: Path,
    faces: list[fonts.Face],
    emoji: list[dict],
    icons: dict[str, IconSet],
    photos: list[bytes],
    words: list[str],
) -> None:
    """Write the evaluation file: font files, larger sprites, held-out photographs and words."""
    rng = np.random.default_rng(0)
    seen = [face for face in faces if not face.held_out]
    chosen = [seen[i] for i in sorted(rng.choice(len(seen), 24, replace=False))] + [f for f in faces if f.held_out]
    trained = sorted(rng.choice(len(emoji), 600, replace=False))
    concrete = [i for i, entry in enumerate(emoji) if entry["concrete"]]
    sprites, sprite_meta = [], []
    for style, indices in [
        *((style, trained[s::3]) for s, style in enumerate(TRAINING_STYLES)),
        ("openmoji", concrete),
    ]:
        sprites += draw_sprites(icons[style], (emoji[i] for i in indices), EVAL_SPRITE_SIZE)
        sprite_meta += [{"style": style, "label": emoji[i]["label"]} for i in indices]
    arrays: dict[str, np.ndarray] = {
        "meta": pack_json(
            {
                "faces": [{"family": f.family, "style": f.style, "held_out": f.held_out} for f in chosen],
                "sprites": sprite_meta,
                "words": [word for word in words if held_out_word(word) and len(word) >= 3],
            }
        )
    }
    fonts_packed = [zlib.compress(face.path.read_bytes(), 9) for face in chosen]
    for name, files in (("font", fonts_packed), ("sprite", sprites), ("photo", photos)):
        arrays[f"{name}s"], arrays[f"{name}_ends"] = pack_files(files)
    np.savez(path, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder for packages and the two files")
    build(parser.parse_args().folder)
