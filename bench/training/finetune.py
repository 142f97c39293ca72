"""Fine-tuning as a user would do it, on the CPU: ``python -m bench.training.finetune`` teaches nano flags.

Draws the data of ``examples/flags.py``, lets nano answer the rehearsal questions, runs ``aria train
recipes/flags.toml`` and ``aria merge`` as commands, and evaluates before and after on held-out flags and on tasks of
nano's own evaluation (``.nano/eval.npz``). Then compares the texts of the merged folder, of ``aria serve --adapter``,
and of transformers' Aria with the merged folder.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aria import AriaProcessor, Engine, SamplingParams
from aria.train.data import DataSettings, Question, questions
from bench import measure
from bench.server.client import ask
from bench.server.process import COMMAND, ROOT, environment, served
from recipes.nano.assets.archive import FOLDER
from recipes.nano.eval.evaluate import answers, made, portions, score
from recipes.nano.eval.items import Held, Questions
from recipes.nano.text.tokenizer import NANO_FOLDER

ARIA = COMMAND[1:]
EVAL_FILE = FOLDER.resolve() / "eval.npz"
OLD_TASKS = (
    *("words, seen fonts", "words, unseen fonts", "colour", "shape", "count 1-5", "position"),
    *("emoji, trained styles", "not sure", "talk", "sums", "definitions"),
    *("lines, seen fonts", "chart, printed value", "chart, largest bar", "clip, direction"),
)
LONGEST = 64
MEDIA_TYPES = {"image": "image/png", "video": "image/gif"}


class Cost(NamedTuple):
    """Cost of a command: wall-clock seconds, and CPU seconds of all cores."""

    wall: float
    cpu: float


def run(*arguments: object, cwd: Path) -> Cost:
    """Run a Python process that has to succeed."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment(), check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(time.perf_counter() - began, cpu)


# --- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(engine: Engine, asked: Sequence[Question]) -> float:
    """Return the share of exact answers."""
    said = texts(engine, asked)
    return sum(text == question.answer for text, question in zip(said, asked, strict=True)) / len(asked)


def texts(engine: Engine, asked: Sequence[Question]) -> list[str]:
    """Return greedy answers."""
    found = engine.chat([list(question.messages) for question in asked], SamplingParams(max_tokens=LONGEST))
    return [result.text for result in found]


def old_tasks(engine: Engine, count: int, tasks: Sequence[str]) -> dict[str, float]:
    """Return the share of exact answers in nano's own evaluation, by task."""
    asked = Questions(Held(EVAL_FILE), count)
    places = [portion for portion in portions(asked, tasks) if portion[0][0] in tasks]
    given = list(answers(engine, made(places, (EVAL_FILE, count, NANO_FOLDER), 1), 32))
    given.sort(key=lambda one: tasks.index(one.task))
    return {task: row["exact"] for task, row in score(given).items() if task in tasks}


# --- equality of texts -----------------------------------------------------------------------------------------------


def served_texts(model: str | None, adapter: Path, asked: Sequence[Question]) -> list[str]:
    """Return greedy answers over HTTP, with media in low detail, the size used in training."""

    def openai(part: dict[str, Any]) -> dict[str, Any]:
        if (kind := part["type"]) not in MEDIA_TYPES:
            return part
        data = base64.b64encode(Path(part[kind]).read_bytes()).decode()
        settings = {name: value for name, value in part.items() if name not in ("type", kind)}
        url = {"url": f"data:{MEDIA_TYPES[kind]};base64,{data}", "detail": "low", **settings}
        return {"type": f"{kind}_url", f"{kind}_url": url}

    async def all_of_them(port: int) -> list[str]:
        found = []
        for question in asked:
            said = [
                {**message, "content": [openai(part) for part in message["content"]]} for message in question.messages
            ]
            body = {"model": "flags", "messages": said, "temperature": 0, "max_tokens": LONGEST}
            reply = await ask("127.0.0.1", port, body)
            if reply.status != 200:
                raise RuntimeError(f"the server answered {reply.status}: {reply.error}")
            found.append(reply.text)
        return found

    options = [*([model] if model else []), "--adapter", f"flags={adapter}"]
    with served(*options) as (port, _):
        return asyncio.run(all_of_them(port))


def transformers_texts(merged: Path, asked: Sequence[Question]) -> list[str]:
    """Return greedy answers of transformers' Aria."""
    from transformers import AriaForConditionalGeneration

    model = AriaForConditionalGeneration.from_pretrained(merged, dtype=torch.float32).eval()
    processor, found = AriaProcessor.from_pretrained(merged), []
    for question in asked:
        inputs = processor.apply_chat_template(
            list(question.messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        places = [processor.tokenizer.image_token_id]
        ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, suppress_tokens=places)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.split("<|im_end|>")[0].strip())
    return found


# --- all of it ------------------------------------------------------------------------------------------------------


def teach(folder: Path, model: str | None, recipe: Path, sets: Sequence[str]) -> dict[str, Cost]:
    """Make the data, train and merge, as commands in ``folder``."""
    if model is not None:
        sets = [f"model.path={json.dumps(model)}", *sets]
    options = [part for one in sets for part in ("--set", one)]
    named = [] if model is None else ["--model", model]
    return {
        "drawing": run(ROOT / "examples/flags.py", "flags", cwd=folder),
        "rehearsal's answers": run(
            ROOT / "examples/rehearse.py", "flags/known.jsonl", "flags/old.jsonl", *named, cwd=folder
        ),
        "training": run(*ARIA, "train", recipe.resolve(), "--out", "run", *options, cwd=folder),
        "merging": run(*ARIA, "merge", "run/export", "merged", cwd=folder),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, evaluate, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a nano other than the packaged one")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/flags.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="recipe key, as in aria train"
    )
    parser.add_argument("--count", type=int, default=100, help="questions per old task")
    parser.add_argument("--tasks", nargs="+", default=list(OLD_TASKS), help="names of old tasks")
    parser.add_argument("--compare", type=int, default=20, help="number of prompts whose texts are compared")
    parser.add_argument("--out", type=Path, help="folder of all files (default: a temporary one)")
    parser.add_argument("--ask-only", action="store_true", help="only evaluate what is in --out")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        model = None if chosen.model is None else str(chosen.model.resolve())
        costs = {} if chosen.ask_only else teach(folder, model, chosen.recipe, chosen.set)
        results: dict[str, Any] = {"costs": {name: cost._asdict() for name, cost in costs.items()}}
        rows = [(name, f"{cost.wall:.0f}", f"{cost.cpu:.0f}") for name, cost in costs.items()]
        print(measure.table(rows, ("command", "seconds", "CPU seconds")), flush=True)

        def read(name: str, most: int) -> list[Question]:
            path = (folder / "flags" / f"{name}.jsonl").as_posix()
            return questions(DataSettings(paths=(path,)), before.processor, most)

        before, after = (Engine(path, device="cpu") for path in (model, folder / "merged"))
        test = read("test", 10_000)
        found = {"flags, held out": [accuracy(engine, test) for engine in (before, after)]}
        old = [old_tasks(engine, chosen.count, chosen.tasks) for engine in (before, after)]
        found |= {task: [scores[task] for scores in old] for task in chosen.tasks}
        found["old tasks, mean"] = [sum(scores.values()) / len(scores) for scores in old]
        lines = [(task, f"{a:.1%}", f"{b:.1%}", f"{100 * (b - a):+.1f}") for task, (a, b) in found.items()]
        print(measure.table(lines, ("task", "before", "after", "points")), flush=True)

        asked = test[: chosen.compare // 2] + read("old", chosen.compare - chosen.compare // 2)
        merged = texts(after, asked)
        others = {
            "aria serve --adapter": served_texts(model, folder / "run/export", asked),
            "transformers, merged folder": transformers_texts(folder / "merged", asked),
        }
        same = {name: sum(map(str.__eq__, merged, said)) for name, said in others.items()}
        counts = [(name, f"{number} of {len(asked)}") for name, number in same.items()]
        print(measure.table(counts, ("same text as the merged folder", "prompts")), flush=True)
        results |= {"tasks": found, "same": same, "prompts": len(asked)}
    results["machine"] = measure.machine(torch.device("cpu"))
    measure.report(results, chosen.json)


if __name__ == "__main__":
    main()
