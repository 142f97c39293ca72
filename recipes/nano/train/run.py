"""Train nano from scratch: ``python -m recipes.nano.train.run --out runs/nano`` runs the four recipes in turn.

Each stage is an ``aria train`` in its own folder under OUT and starts from the export of the previous one. Rerun to
resume; finished stages are skipped.
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
    """Return whether a stage is complete: its export is written at the end."""
    return (folder / EXPORT / "processor_config.json").is_file()  # the file that is written last


def command(recipe: Path, out: Path, before: Path | None, settings: list[str]) -> list[str]:
    """Return the ``aria train`` command of a stage.

    Args:
        recipe: File of the recipe.
        out: Folder of all stages.
        before: Folder of the previous stage, None for the first.
        settings: Overrides of the recipe, ``SECTION.KEY=VALUE``.
    """
    chosen = [*([f"model.path={before / EXPORT}"] if before else []), *settings]
    sets = [part for setting in chosen for part in ("--set", setting)]
    return [sys.executable, "-m", "aria.cli", "train", str(recipe), "--out", str(out / recipe.stem), *sets]


def run(arguments: list[str]) -> None:
    """Run a stage in its own process, so that compiled graphs and memory do not accumulate.

    SIGTERM is forwarded to it; it saves a checkpoint and stops.
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
    """Run the stages that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/nano"), help="folder that gets a folder per stage (default: runs/nano)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a recipe key in every stage"
    )
    options = parser.parse_args(argv)
    before: Path | None = None
    for recipe in RECIPES:
        folder = options.out / recipe.stem
        if finished(folder):
            print(f"{recipe.stem}: already finished, in {folder}", flush=True)
        else:
            print(f"{recipe.stem}: training in {folder}", flush=True)
            run(command(recipe, options.out, before, options.set))
            if not finished(folder):
                print(f"{recipe.stem}: stopped early; rerun to resume")
                return
        before = folder
    print(f"nano is in {options.out / RECIPES[-1].stem / EXPORT}")


if __name__ == "__main__":
    main()
