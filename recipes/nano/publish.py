"""Puts a trained model and what was measured of it into the package: the road from training to ``aria/nano/``.

``python -m recipes.nano.publish runs/nano/export runs/nano/results.json`` writes the weights in one file, the
configuration and the table of the card. What the card says around the table is for people to keep true.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aria.checkpoint import Checkpoint, parameter_shapes, save_checkpoint
from aria.config import AriaConfig
from recipes.nano.tokenizer import NANO_FOLDER

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
MOST_BYTES = 41 * 2**20
"""What the package has room for: 40 MiB of weights and the file's header."""


class Row(NamedTuple):
    """A line of the card's table: what people read, the evaluation's name of the task, and the goal if there is one."""

    title: str
    task: str
    goal: str = ""


ROWS = (
    Row("one word, faces of training", "words, seen fonts", ">= 95 %"),
    Row("one word, held-out faces", "words, unseen fonts", ">= 78 %"),
    Row("meaningless string, faces of training", "strings, seen fonts"),
    Row("meaningless string, held-out faces", "strings, unseen fonts"),
    Row("colour of a shape", "colour", ">= 98 %"),
    Row("name of a shape", "shape", ">= 98 %"),
    Row("how many, 1 to 5", "count 1-5", ">= 95 %"),
    Row("which shape is where", "position"),
    Row("description of one to three shapes, word for word", "describe shapes"),
    Row("two or three lines of text at 448 px, all letters", "lines at 448 px"),
    Row("emoji by name, styles of training", "emoji, trained styles", ">= 95 %"),
    Row("emoji by name, OpenMoji (never seen), 853 concrete ones", "emoji, unseen style", ">= 40 %"),
    Row("held-out photographs: says that it is not sure", "not sure", ">= 90 %"),
    Row("known tasks: wrongly says that it is not sure", "false not sure", "<= 2 %"),
    Row("greetings and talk (questions as in training)", "talk"),
)


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The card's table from what ``evaluate --json`` wrote.

    Raises:
        ValueError: tasks are missing, or the table has no line for one.
    """
    wrong = sorted({row.task for row in ROWS} ^ results.keys())
    if wrong:
        raise ValueError(f"results and the card's table differ in these tasks: {', '.join(wrong)}")
    lines = ["| task | items | exact | goal |", "|---|---|---|---|"]
    for title, task, goal in ROWS:
        measured = results[task]
        lines.append(f"| {title} | {measured['items']:,.0f} | {100 * measured['exact']:.1f} % | {goal} |")
    return "\n".join(lines)


def with_table(card: str, new: str) -> str:
    """The card with the text between its two markers replaced.

    Raises:
        ValueError: the markers do not stand there once each, in order.
    """
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"the card should hold {BEGIN} and {END} once each, in this order, around its table")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def publish(export: Path, results: Path, package: Path = NANO_FOLDER) -> None:
    """Write weights, configuration and the card's table into ``package``; everything is checked before.

    Args:
        export: folder that training wrote; its weights may be in shards.
        results: what ``evaluate --json`` wrote about that export.

    Raises:
        ValueError: results, card or weights are not what the package needs.
    """
    card = package / "README.md"
    text = with_table(card.read_text(encoding="utf-8"), table(json.loads(results.read_text(encoding="utf-8"))))
    config = AriaConfig.from_pretrained(export)
    state = Checkpoint(export, parameter_shapes(config)).load()
    total = sum(tensor.nbytes for tensor in state.values())
    if total > MOST_BYTES:
        raise ValueError(f"{export} holds {total / 2**20:.1f} MiB of weights; the package has room for 40 MiB")
    save_checkpoint(state, config, package)
    card.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Publish, and say what to look at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder that training wrote: OUT/export")
    parser.add_argument("results", type=Path, help="what evaluate wrote with --json")
    parser.add_argument("--package", type=Path, default=NANO_FOLDER, help="folder with the card; default: aria/nano")
    options = parser.parse_args(arguments)
    publish(options.export, options.results, options.package)
    print(
        f"Wrote weights, configuration and table into {options.package}. Read README.md there: is its text still true?"
    )


if __name__ == "__main__":
    main()
