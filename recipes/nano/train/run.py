"""Train nano from nothing: ``python -m recipes.nano.train.run --out runs/nano`` runs the four recipes in turn.

Each is an ``aria train`` in a folder of its own under OUT and begins with the export of the one before. Run again, it
skips what is finished and goes on with what was begun.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

RECIPES = tuple(sorted(Path(__file__).parents[1].glob("[0-9]-*.toml")))
EXPORT = "export"


def finished(folder: Path) -> bool:
    """Whether a stage's run has come to its end: only then is its export written."""
    return (folder / EXPORT / "processor_config.json").is_file()  # the last that is written


def command(recipe: Path, out: Path, before: Path | None, settings: list[str]) -> list[str]:
    """The ``aria train`` of a stage.

    Args:
        recipe: of the stage.
        out: folder of all stages.
        before: folder of the stage before, None for the first.
        settings: ``SECTION.KEY=VALUE``, in place of what the recipe says.
    """
    chosen = [*([f"model.path={before / EXPORT}"] if before else []), *settings]
    sets = [part for setting in chosen for part in ("--set", setting)]
    return [sys.executable, "-m", "aria.cli", "train", str(recipe), "--out", str(out / recipe.stem), *sets]


def run(arguments: list[str]) -> None:
    """Run a stage in a process of its own, so that it leaves no compiled shapes and no memory behind.

    SIGTERM is handed on to it: it saves and stops.
    """
    with subprocess.Popen(arguments) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(code)


def main(argv: list[str] | None = None) -> None:
    """Run what is left of the four stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder of the stages' folders")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every stage")
    options = parser.parse_args(argv)
    before: Path | None = None
    for recipe in RECIPES:
        folder = options.out / recipe.stem
        if finished(folder):
            print(f"{recipe.stem}: finished before, in {folder}", flush=True)
        else:
            print(f"{recipe.stem}: training in {folder}", flush=True)
            run(command(recipe, options.out, before, options.set))
            if not finished(folder):
                print(f"{recipe.stem}: stopped before its end; the same command goes on")
                return
        before = folder
    print(f"nano is in {options.out / RECIPES[-1].stem / EXPORT}")


if __name__ == "__main__":
    main()
