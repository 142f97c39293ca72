"""Where a training step's time goes, in one short call: parts, pictures a second, memory, compile time, loss.

Predictions written down before the first run are in SPEED.md; the table prints them beside what was measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from aria.config import AriaConfig
from aria.train import StepBudget, Trainer, TrainerConfig
from recipes.nano.learn import Learner, Stages
from recipes.nano.pictures import Pictures, worth

Batch = dict[str, Any]
_PEAK_FLOPS = 800e12
"""What a large bfloat16 matrix product reaches on an H100."""

_RAW_BATCHES = 24
_REPEATS = 5
_SECONDS = 12.0


def step_flops(config: AriaConfig, batch: Batch, num_classes: int, share: float) -> float:
    """Floating-point operations of one step, forward and backward, top-k experts only and no recomputation.

    ``share``: of the patches and queries, with dense losses.
    """
    vision, text = config.vision, config.text
    N, _, S, _ = batch["pixel_values"].shape
    P, T, Q = (S // vision.patch_size) ** 2, batch["input_ids"].shape[0], batch["query_labels"].shape[1]
    D = vision.hidden_size
    vit = P * (vision.num_parameters() - vision.patches_per_side**2 * D) + 2 * vision.num_hidden_layers * P * P * D
    projector = P * 4 * D * D + 2 * P * Q * D + Q * (2 * D * D + D * text.hidden_size + text.hidden_size**2)
    dense = P * D * num_classes + Q * batch["query_labels"].shape[2] * 128 * (num_classes + text.hidden_size)
    decoder = T * text.active_parameters() + text.num_hidden_layers * T * (T // N) * text.hidden_size
    return 6.0 * (N * (vit + projector + share * dense) + decoder)


def measure(build: Callable[[], Learner], config: TrainerConfig, pictures: Pictures, out: Path) -> None:
    """Measure the loader alone, then the step as it is and compiled, and print a table last."""
    began = time.monotonic()
    raw_batches = pictures.raw(0)
    first: dict[int, Batch] = {}
    while len(first) < 2:
        raw = next(raw_batches)
        first.setdefault(raw["size"], raw)
    loader_ready = time.monotonic() - began
    began = time.monotonic()
    count = sum(worth(raw) for raw in islice(raw_batches, _RAW_BATCHES))
    loader_rate = count / (time.monotonic() - began)
    print(
        f"loader: first of both sizes after {loader_ready:.1f} s; {loader_rate:,.0f} pictures of 224 px a second alone"
    )
    check(build, pictures, first)
    rows = []
    # On a CPU the packed loops read lengths, which a compiler cannot; there only the code itself is rehearsed.
    for variant in ("eager", "compiled") if pictures.device.type == "cuda" else ("eager",):
        learner = build()
        learner.stages = Stages(queries=0.0, answers=0.0, settled=1e-6, beside=1.0)
        trainer = Trainer(learner, learner.loss, config, out / f"smoke-{variant}")
        if variant == "compiled":
            learner.compile()
        rows += [parts(variant, learner, trainer, pictures, raw) for raw in first.values()]
        rows.append(loop(variant, trainer, pictures.drawn(raw_batches)))
    print_table(rows)
    (out / "smoke.json").write_text(json.dumps({"loader pictures/s": loader_rate, "rows": rows}, indent=1))


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def parts(variant: str, learner: Learner, trainer: Trainer, pictures: Pictures, raw: Batch) -> dict[str, Any]:
    """Milliseconds of each part of a step on one batch, the host waiting after each; the first call apart."""
    share = learner.stages.share(1.0)
    spent = dict.fromkeys(("render", "see", "project", "answer", "backward", "optimizer"), 0.0)
    first_call = 0.0
    for repeat in range(_REPEATS + 1):
        marks = [_clock()]
        batch = pictures.render(pictures.to_device(raw))
        marks.append(_clock())
        patches, hidden = learner.see(batch)
        loss = learner.patch_loss(batch, patches, hidden, share).loss
        marks.append(_clock())
        tokens = learner.project(patches, hidden)
        loss = loss + learner.query_loss(batch, tokens, share).loss
        marks.append(_clock())
        loss = loss + learner.answer(batch, tokens)[0]
        marks.append(_clock())
        loss.backward()
        marks.append(_clock())
        trainer.descend({"loss": loss})
        marks.append(_clock())
        if repeat == 0:
            first_call = marks[-1] - marks[0]
            continue
        for name, start, end in zip(spent, marks, marks[1:], strict=False):
            spent[name] += 1e3 * (end - start) / _REPEATS
    total = sum(spent.values())
    flops = step_flops(learner.aria.config, batch, learner.heads.patch_head.out_features, share)
    pictures_a_step = batch["pixel_values"].shape[0]
    return {
        "variant": f"{variant} {batch['size']}",
        "first call s": first_call,
        **{f"{name} ms": value for name, value in spent.items()},
        "step ms": total,
        "pictures/s": pictures_a_step / total * 1e3,
        "TFLOP/s": flops / total / 1e9,
        "floor ms": 1e3 * flops / _PEAK_FLOPS,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    }


def loop(variant: str, trainer: Trainer, batches: Iterator[Batch]) -> dict[str, Any]:
    """The real loop for some seconds, nothing waiting but for data: pictures (224 px worth) a second, loss from, to."""
    waited = 0.0
    seen = 0

    def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
        nonlocal waited, seen
        while True:
            start = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - start
            seen += worth(batch)
            yield batch
            if time.monotonic() > stop:
                return

    next(batches)
    trainer.out.joinpath("log.jsonl").unlink(missing_ok=True)
    began = _clock()
    stop = began + _SECONDS
    steps = trainer.step
    trainer.run(lambda step: counted(batches), StepBudget(10**6))
    elapsed = _clock() - began
    lines = [json.loads(line) for line in (trainer.out / "log.jsonl").read_text().splitlines()]
    return {
        "variant": f"{variant} loop",
        "step ms": 1e3 * elapsed / max(1, trainer.step - steps),
        "pictures/s": seen / elapsed,
        "waiting share": waited / elapsed,
        **{
            f"{name} {when}": line[name]
            for when, line in (("from", lines[0]), ("to", lines[-1]))
            for name in ("patch loss", "query loss", "answer loss")
        },
    }


def check(build: Callable[[], Learner], pictures: Pictures, first: dict[int, Batch]) -> None:
    """Fixed shapes on the device against the plain model in float32 on the CPU, on a few pictures with padding."""
    for size, raw in first.items():
        batch = pictures.render(pictures.to_device(raw))
        few = 3
        learner, plain = build(), build().to("cpu")
        plain.load_state_dict(learner.state_dict())
        learner.to(trainable_dtype(batch["pixel_values"].device))
        cut = {name: batch[name][:few] for name in ("pixel_values", "pixel_mask", "patch_labels", "query_labels")}
        results = []
        for one, device in ((learner, batch["pixel_values"].device), (plain, torch.device("cpu"))):
            here = {name: tensor.to(device) for name, tensor in cut.items()} | {"size": size}
            patches, hidden = one.see(here)
            tokens = one.project(patches, hidden)
            loss = one.patch_loss(here, patches, hidden).loss + one.query_loss(here, tokens).loss
            loss.backward()
            gradient = one.aria.vision_tower.embeddings.patch_embedding.weight.grad
            assert gradient is not None
            results.append((tokens.detach().float().cpu(), gradient.float().cpu(), loss.item()))
        ours, theirs = results
        print(
            f"check {size} px: tokens off by {_distance(ours[0], theirs[0]):.1e}, "
            f"gradient by {_distance(ours[1], theirs[1]):.1e}, loss {ours[2]:.4f} and {theirs[2]:.4f}"
        )


def trainable_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a variant, one column a figure, blanks where a row has none."""
    for row in rows:
        figures = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print(" | ".join(figures))
