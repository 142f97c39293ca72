"""Train nano: ``python -m recipes.nano.train --out runs/nano``.

One GPU, and the schedule in parts if need be: ``--minutes 9 --until 0.5``, then ``--minutes 9 --resume OUT/last.pt``.
``--smoke`` measures where the time goes instead of training; ``--tiny`` rehearses everything on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aria.checkpoint.save import save_checkpoint
from aria.model import Aria
from aria.train import TimeBudget, Trainer, TrainerConfig
from recipes.nano import smoke, tokenizer
from recipes.nano.data import Plan
from recipes.nano.learn import Learner
from recipes.nano.model import nano_config, tiny_config
from recipes.nano.pictures import Pictures

RESERVE = 20.0
"""Seconds kept at the end of a run for the last checkpoint and the export."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="folder of checkpoints, curves and export")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from (OUT/last.pt of the run before)")
    parser.add_argument("--minutes", type=float, default=18.0, help="of this run, start and export included")
    parser.add_argument("--until", type=float, default=1.0, help="progress to reach in this run; 1 ends the schedule")
    parser.add_argument("--batch", type=int, default=512, help="pictures of 224 px a step (a quarter at 448 px)")
    parser.add_argument("--workers", type=int, default=14, help="processes that plan pictures")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="5GB", help="largest weight file of the export; the model needs 40MiB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the layers as they are")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.2M parameters, to rehearse")
    parser.add_argument("--smoke", action="store_true", help="measure speed for a minute or so and stop")
    return parser.parse_args(argv)


def build(options: argparse.Namespace, num_classes: int) -> Learner:
    """A started model with its dense heads on the device, in float32."""
    vocabulary = -(-tokenizer.vocab_size() // 8) * 8  # rows in eights suit the matrix units; the last few stand idle
    config = (tiny_config if options.tiny else nano_config)(vocabulary)
    return Learner(Aria(config), num_classes, seed=options.seed).to(options.device)


def trainer_config(options: argparse.Namespace) -> TrainerConfig:
    on_gpu = torch.device(options.device).type == "cuda"
    return TrainerConfig(
        learning_rate=options.learning_rate,
        warmup_steps=300,
        average=0.999,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        log_every=50 if on_gpu else 5,
        save_seconds=180.0,
        max_skipped=10,
    )


def warm_up(trainer: Trainer, samples: Iterable[dict[str, Any]]) -> None:
    """Compile for every picture size before the clock of the schedule starts; no weight changes."""
    for batch in samples:
        trainer.loss(batch, 1.0)[0].backward()
        trainer.clear_gradients()


def export(trainer: Trainer, learner: Learner, folder: Path, shard_size: str) -> None:
    """The averaged weights in bfloat16, today's Hub layout."""
    weights = trainer.average or trainer.masters
    state = {
        name.removeprefix("aria."): weight.to("cpu", torch.bfloat16)
        for name, weight in weights.items()
        if name.startswith("aria.")
    }
    save_checkpoint(state, learner.aria.config, folder, max_shard_size=shard_size)


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    options = arguments(argv)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    counts = {"small": options.batch, "large": max(1, options.batch // 4)}
    pictures = Pictures(options.device, Plan(seed=options.seed, pictures=counts, workers=options.workers))
    if options.smoke:
        smoke.measure(lambda: build(options, pictures.num_classes), trainer_config(options), pictures, options.out)
        return
    learner = build(options, pictures.num_classes)
    trainer = Trainer(learner, learner.loss, trainer_config(options), options.out)
    if options.resume:
        trainer.resume(options.resume)
    pictures.start(trainer.step)
    if options.compile:
        learner.compile()
    warm_up(trainer, pictures.samples())
    left = options.minutes * 60.0 - RESERVE - (time.monotonic() - started)
    print(f"warm after {time.monotonic() - started:.0f} s; from progress {trainer.progress:.3f} to {options.until}")
    budget = TimeBudget(left, start=trainer.progress, until=options.until)
    reason = trainer.run(pictures.batches, budget, until=options.until)
    export(trainer, learner, options.out / "export", options.shard_size)
    print(
        f"{reason} at step {trainer.step}, progress {trainer.progress:.3f}; {time.monotonic() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
