"""The held-out evaluation: images drawn by PIL as users would send them, answered by the public ``Engine``.

Run as ``python -m recipes.nano.eval.evaluate [MODEL] --json results.json``; MODEL is a folder or a repository, by
default the packaged model. ``items.py`` makes the questions. Worker processes draw and preprocess images meanwhile.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from aria import AriaProcessor, Engine, SamplingParams
from aria.engine.engine import Answer
from aria.processor.image_inputs import Prepared
from recipes.nano.assets.archive import FOLDER
from recipes.nano.eval.items import REFUSALS, Held, Item, Questions
from recipes.nano.text.tokenizer import NANO_FOLDER

LONGEST_ANSWER = 200  # tokens, which are letters
NEAR = 0.1
"""An answer is near the right one if it differs by edits of at most this share of its letters."""
REFUSED = ("i am not sure", "i do not know", "i see no picture")
FALSE = "false not sure"
PORTION = 12
"""Items per task of a worker process; a quarter of it for items with many images."""
CACHE = {"cpu": 1 << 16, "cuda": 1 << 19}  # tokens; several evaluations may share a GPU
COLUMNS = ("exact", "near", "letters", "not sure")


class Answered(NamedTuple):
    """A question, the right answer, and the model's answer."""

    task: str
    question: str
    wanted: str
    given: str


Place = tuple[str, int]  # an item: its task and number


# --- drawing ---------------------------------------------------------------------------------------------------------


class ItemFactory:
    """Plans items, paints their images and prepares them for the engine."""

    def __init__(self, eval_file: Path, count: int, processor: str | Path):
        self.questions = Questions(Held(eval_file), count)
        self.processor = AriaProcessor.from_pretrained(processor)

    def make(self, places: Sequence[Place]) -> list[tuple[Item, Prepared]]:
        """Return the prepared items at ``places``."""
        items = [self.questions.item(*place) for place in places]
        return [(item, self.processor.prepare(item.messages(self.questions.paint(item)))) for item in items]


_factory: ItemFactory


def _start(*settings: object) -> None:
    global _factory
    torch.set_num_threads(1)
    _factory = ItemFactory(*settings)  # type: ignore[arg-type]


def _make(places: Sequence[Place]) -> list[tuple[Item, Prepared]]:
    return _factory.make(places)


def made(
    portions: Iterable[Sequence[Place]], settings: tuple[Path, int, str | Path], processes: int
) -> Iterator[tuple[Item, Prepared]]:
    """Yield items in order, prepared by worker processes that stay little ahead, since images take memory."""
    if processes <= 1:
        factory = ItemFactory(*settings)
        for portion in portions:
            yield from factory.make(portion)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[list[tuple[Item, Prepared]]]] = deque()
    with ProcessPoolExecutor(processes, context, _start, settings) as pool:
        for portion in portions:
            waiting.append(pool.submit(_make, portion))
            if len(waiting) > 4 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


# --- answering -------------------------------------------------------------------------------------------------------


def open_engine(model: str | None, processor: str | Path | None, device: str | None, batch: int | None) -> Engine:
    """Open the engine; ``processor`` is the source of processor files if the model's folder has none."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    cache = CACHE["cuda" if cuda else "cpu"]
    if processor is None:
        return Engine(model, device=device, max_batch=batch, cache_tokens=cache)
    if model is None or not Path(model).is_dir():
        raise ValueError(f"--processor needs a model in a folder, but MODEL is {model}")
    with tempfile.TemporaryDirectory() as folder:
        AriaProcessor.from_pretrained(processor).save_pretrained(folder)
        shutil.copytree(model, folder, dirs_exist_ok=True)
        return Engine(folder, device=device, max_batch=batch, cache_tokens=cache)


def answers(engine: Engine, items: Iterable[tuple[Item, Prepared]], ahead: int) -> Iterator[Answered]:
    """Yield greedy answers in the order of completion; the engine always has ``ahead`` requests."""
    params = SamplingParams(max_tokens=LONGEST_ANSWER)
    source = iter(items)
    pending: list[tuple[Item, Answer]] = []
    while True:
        while len(pending) < ahead and (new := next(source, None)) is not None:
            pending.append((new[0], engine.queue(new[1], params)))
        if not pending:
            return
        for _ in range(8):
            engine.step()
        left = []
        for item, answer in pending:
            if answer.done:
                yield Answered(item.task, item.question, item.answer, answer.result().text.strip())
            else:
                left.append((item, answer))
        pending = left


def portions(questions: Questions, wanted: Sequence[str] = ("",)) -> list[list[Place]]:
    """Split the items of tasks whose names contain one of ``wanted`` into portions for workers."""
    found: list[list[Place]] = []
    for task, made in questions.tasks.items():
        size = PORTION // 4 if task.startswith(("search", "several", "clip")) else PORTION
        if any(part in task for part in wanted):
            places = [(task, n) for n in range(made.count)]
            found += [places[at : at + size] for at in range(0, len(places), size)]
    return found


# --- scoring ---------------------------------------------------------------------------------------------------------


def score(answered: Iterable[Answered]) -> dict[str, dict[str, float]]:
    """Score answers, grouped by task.

    Returns:
        For each task: number of items; shares of exact and of near answers; share of right letters
        (1 - edits / length); share of refusals. The last entry is the share of refusals in tasks that the model should
        know.
    """
    results: dict[str, dict[str, float]] = {}
    for task, group in groupby(answered, key=lambda one: one.task):
        rows = list(group)
        assert task not in results, "answers of a task should stand together"
        edits = [min(distance(row.wanted, row.given), len(row.wanted)) for row in rows]
        exact = [same(row.wanted, row.given) for row in rows]
        near = [right or n <= NEAR * len(row.wanted) for right, n, row in zip(exact, edits, rows, strict=True)]
        results[task] = {
            "items": len(rows),
            "exact": sum(exact) / len(rows),
            "near": sum(near) / len(rows),
            "letters": 1 - sum(edits) / sum(len(row.wanted) for row in rows),
            "not sure": sum(row.given.lower().startswith(REFUSED) for row in rows) / len(rows),
        }
    known = [row for task, row in results.items() if task not in (*REFUSALS, "talk")]
    total = sum(row["items"] for row in known)
    results[FALSE] = {"items": total, "exact": sum(row["items"] * row["not sure"] for row in known) / max(total, 1)}
    return results


def same(wanted: str, given: str) -> bool:
    """Return whether answers are equal except for white space at the ends of lines."""
    return [line.strip() for line in wanted.split("\n")] == [line.strip() for line in given.strip().split("\n")]


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def table(results: dict[str, dict[str, float]]) -> str:
    """Format the results as text, a line per task."""
    lines = [f"{'task':32}{'items':>7}" + "".join(f"{name:>10}" for name in COLUMNS)]
    for task, row in results.items():
        cells = [f"{row[name]:>10.1%}" if name in row else "" for name in COLUMNS]
        lines.append(f"{task:32}{row['items']:>7.0f}{''.join(cells)}")
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """Evaluate a model and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or repository (default: the packaged model)")
    parser.add_argument("--processor", help="folder of the tokenizer and processor files, if MODEL has none")
    parser.add_argument("--eval-file", type=Path, default=FOLDER / "eval.npz")
    parser.add_argument("--count", type=int, default=500, help="items of most tasks (default: 500)")
    parser.add_argument("--tasks", nargs="+", default=[""], help="only tasks whose names contain one of these")
    parser.add_argument("--batch", type=int, help="maximum number of concurrent sequences (default: the engine's)")
    parser.add_argument("--processes", type=int, default=max(1, (multiprocessing.cpu_count() or 2) - 1))
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path, help="write results to this file")
    parser.add_argument("--misses", type=Path, help="write wrong answers to this file, as JSON lines")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    started = time.monotonic()
    processor = options.processor or options.model or NANO_FOLDER
    asked = portions(Questions(Held(options.eval_file), options.count), options.tasks)
    if not asked:
        parser.error(f"no task name contains {' or '.join(map(repr, options.tasks))}")
    engine = open_engine(options.model, options.processor, options.device, options.batch)
    ahead = 2 * (options.batch or (256 if engine.device.type == "cuda" else 16))
    items = made(asked, (options.eval_file, options.count, processor), options.processes)
    found = []
    for one in answers(engine, items, ahead):
        found.append(one)
        if len(found) % 1000 == 0:
            print(f"{len(found)} answered in {time.monotonic() - started:.0f} s", flush=True)
    order = {portion[0][0]: n for n, portion in enumerate(asked)}
    found.sort(key=lambda one: order[one.task])
    results = score(found)
    print(f"{len(found)} answered in {time.monotonic() - started:.0f} s")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if options.misses:
        missed = [one._asdict() for one in found if not same(one.wanted, one.given)]
        options.misses.write_text("".join(json.dumps(row) + "\n" for row in missed), encoding="utf-8")
    print(json.dumps({task: round(row["exact"], 4) for task, row in results.items()}))


if __name__ == "__main__":
    main()
