"""Publish a trained nano: write its weights, configuration, results and learning curves into ``src/aria/nano/``.

Run as ``python -m recipes.nano.eval.publish runs/nano``. It reads the last stage's export, and ``results.json`` (from
``evaluate --json``) and ``log.jsonl`` of each stage. The card's table of results is replaced; the text around it has to
be updated by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aria.checkpoint import Checkpoint, parameter_shapes, save_checkpoint
from aria.config import AriaConfig
from recipes.nano.eval import curves
from recipes.nano.text.tokenizer import NANO_FOLDER
from recipes.nano.train.run import EXPORT, RECIPES

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
MOST_BYTES = 40 * 2**20
"""Maximum size of the packaged weights."""
BEFORE = Path(__file__).parents[1] / "first-edition.json"
"""Results of ``evaluate --json`` for the previous edition."""
CURVES = "curves.png"
NOT_MEASURED = "–"

Results = Mapping[str, Mapping[str, float]]


class Row(NamedTuple):
    """A row of the card's table.

    Attributes:
        title: Text of the first column.
        task: The evaluation's name of the task.
        goal: Text of the goal, if any.
        measure: One of :data:`recipes.nano.eval.evaluate.COLUMNS`, or ``wrong letters``.
    """

    title: str
    task: str
    goal: str = ""
    measure: str = "exact"

    def cell(self, results: Results) -> str:
        """Format the result in percent."""
        found = results.get(self.task)
        if found is None:
            return NOT_MEASURED
        share = 1 - found["letters"] if self.measure == "wrong letters" else found[self.measure]
        return f"{100 * share:.1f} %"


ROWS = (
    Row("one word, faces of training", "words, seen fonts", ">= 97 %"),
    Row("one word, held-out faces", "words, unseen fonts", ">= 85 %"),
    Row("meaningless string, faces of training", "strings, seen fonts"),
    Row("meaningless string, held-out faces", "strings, unseen fonts"),
    Row(
        "two to four lines at 448 px, faces of training: wrong letters", "lines, seen fonts", "<= 10 %", "wrong letters"
    ),
    Row("the same, held-out faces: wrong letters", "lines, unseen fonts", "", "wrong letters"),
    Row("the same, faces of training: all letters right", "lines, seen fonts"),
    Row("colour of a shape", "colour", ">= 98 %"),
    Row("name of a shape", "shape", ">= 98 %"),
    Row("how many, 1 to 5", "count 1-5", ">= 97 %"),
    Row("left, right, above, below", "position", ">= 95 %"),
    Row("description of one to three shapes, word for word", "describe shapes"),
    Row("emoji by name, styles of training", "emoji, trained styles", ">= 95 %"),
    Row("emoji by name, OpenMoji (never seen), concrete ones", "emoji, unseen style", ">= 45 %"),
    Row("charts: the largest bar", "chart, largest bar", ">= 95 %"),
    Row("charts: a printed value", "chart, printed value", ">= 85 %"),
    Row("charts: description, word for word", "chart, description"),
    Row("charts: all else that is asked", "chart, other questions"),
    Row("clips of 3 to 6 frames: which way it moves", "clip, direction", ">= 95 %"),
    Row("clips: all else that is asked", "clip, other questions"),
    Row("two to six pictures: about one of them", "several pictures"),
    Row("10 to 40 pictures: about one of them", "search among 10 to 40 pictures"),
    Row(
        "definition of a word, asked in other forms: at most a tenth of the letters wrong",
        "definitions",
        ">= 85 %",
        "near",
    ),
    Row("sums of two numbers of two digits, pairs never taught", "sums", ">= 90 %"),
    Row("differences, pairs never taught", "reckoning"),
    Row("spelling, letters and plurals of words never taught", "spelling"),
    Row("days, months, opposites (questions as in training)", "facts"),
    Row("a number in a text of 512 tokens", "needle, 512 tokens"),
    Row("a number in a text of 2,048 tokens", "needle, 2,048 tokens"),
    Row("a number in a text of 4,096 tokens, eight times stage 2's longest", "needle, 4,096 tokens", ">= 95 %"),
    Row("held-out photographs: says that it is not sure", "not sure", ">= 90 %"),
    Row("words that it was not taught: says so", "unknown words"),
    Row("questions beyond it: says so", "beyond"),
    Row("asked about a picture where there is none: says so", "no picture"),
    Row("known tasks: wrongly says that it is not sure or does not know", "false not sure", "<= 2 %"),
    Row("greetings and talk (questions as in training)", "talk"),
)


def table(before: Results, stages: Mapping[str, Results]) -> str:
    """Format the card's table.

    Args:
        before: Results of the previous edition.
        stages: Results of each evaluated stage by title of its column, in order.

    Raises:
        ValueError: The tasks of the last results and the rows of the table differ.
    """
    columns = {"first edition": before, **stages}
    last = list(columns.values())[-1]
    wrong = sorted({row.task for row in ROWS} ^ last.keys())
    if wrong:
        raise ValueError(f"results and the card's table differ in these tasks: {', '.join(wrong)}")
    lines = [f"| task | items | {' | '.join(columns)} | goal |", "|---" * (len(columns) + 3) + "|"]
    for row in ROWS:
        cells = " | ".join(row.cell(results) for results in columns.values())
        lines.append(f"| {row.title} | {last[row.task]['items']:,.0f} | {cells} | {row.goal} |")
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


def publish(runs: Path, package: Path = NANO_FOLDER, before: Path = BEFORE) -> None:
    """Write weights, configuration, the card's table and the curves into ``package``, after checking everything.

    Args:
        runs: Folder with a folder per stage; the last needs an export and results, the others may lack them.
        package: Folder of the packaged model.
        before: File with the results of the previous edition.

    Raises:
        ValueError: Results, card or weights are incomplete or do not fit.
    """
    names = [recipe.stem for recipe in RECIPES]
    measured = {name.replace("-", " ", 1): _read(runs / name / "results.json") for name in names}
    if not measured[names[-1].replace("-", " ", 1)]:
        raise ValueError(
            f"{runs / names[-1]} has no results.json; make it with: python -m recipes.nano.eval.evaluate --json"
        )
    stages = {f"after {name}": found for name, found in measured.items() if found}
    card = package / "README.md"
    text = with_table(card.read_text(encoding="utf-8"), table(_read(before), stages))
    export = runs / names[-1] / EXPORT
    config = AriaConfig.from_pretrained(export)
    state = Checkpoint(export, parameter_shapes(config)).load()
    total = sum(tensor.nbytes for tensor in state.values())
    if total > MOST_BYTES:
        raise ValueError(f"{export} holds {total / 2**20:.1f} MiB of weights; the package has room for 40 MiB")
    logs = {name: curves.read(runs / name / "log.jsonl") for name in names}
    save_checkpoint(state, config, package)
    if any(logs.values()):
        curves.draw(logs, package / CURVES)
    card.write_text(text, encoding="utf-8")


def _read(file: Path) -> Results:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def main(arguments: list[str] | None = None) -> None:
    """Publish, and remind of the card's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with a folder per stage: OUT of the training")
    parser.add_argument("--before", type=Path, default=BEFORE, help="results of the previous edition")
    parser.add_argument("--package", type=Path, default=NANO_FOLDER, help="folder with the card")
    options = parser.parse_args(arguments)
    publish(options.runs, options.package, options.before)
    print(
        f"Wrote weights, table and curves into {options.package}. Check that the text of README.md there is still true."
    )


if __name__ == "__main__":
    main()
