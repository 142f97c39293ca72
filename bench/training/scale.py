"""Scaling of training over GPUs: ``torchrun --nproc-per-node 4 -m bench.training.scale``, after a run with 1.

First the losses of a small model with full weights, which should not depend on the world size; then the speed of layers
of Aria's widths with full weights, the same number of tokens on each rank, the same batches in every step. A run with
one process saves its results to a file; runs with more report the differences.

T tokens, E experts.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aria import AriaConfig
from aria.model import Aria
from aria.train import targets
from aria.train.batch import Batch, Sample
from aria.train.cost import Trained, batch_flops
from aria.train.objective import Objective, ObjectiveSettings, Step
from aria.train.optimizer import OptimizerSettings, clip_gradients, make_optimizer
from aria.train.parallel import Parallel, ParallelSettings
from aria.train.targets import Targets
from bench import measure
from bench.measure import Spread

FULL = Targets(method="full")
CURVE_PARTS = 8
"""Micro-batches of a step of the small model, split among the ranks."""
FIRST_FILE = Path("scale-1.json")


@dataclass(frozen=True)
class Work:
    """A model, and the work of a rank per step."""

    config: AriaConfig
    tokens: int
    sequences: int
    accumulate: int
    settings: OptimizerSettings


def small(device: torch.device) -> AriaConfig:
    """Return a small configuration that the kernels support, with the released number of experts."""
    aria = AriaConfig.aria()
    text = replace(
        aria.text, vocab_size=1024, hidden_size=256, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    return replace(_without_images(aria), text=text, projector=replace(aria.projector, output_size=256))


def large(layers: int) -> AriaConfig:
    """Return Aria with fewer decoder layers."""
    aria = AriaConfig.aria()
    return replace(_without_images(aria), text=replace(aria.text, num_hidden_layers=layers))


def _without_images(config: AriaConfig) -> AriaConfig:
    # The encoder is frozen and gets no input here, so one layer suffices.
    return replace(config, vision=replace(config.vision, num_hidden_layers=1))


def batch(config: AriaConfig, tokens: int, sequences: int, seed: int) -> Batch:
    """Make learnable random text: each sequence repeats a few tokens; all tokens but the last have targets."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(sequences):
        length = tokens // sequences
        ids = torch.randint(10, config.text.vocab_size, (16,), generator=generator).repeat(-(-length // 16))[:length]
        labels = ids.roll(-1)
        labels[-1] = -100
        samples.append(Sample(ids, labels))
    return Batch.pack(samples, tokens, 2)


class Training:
    """A parallelised model and its steps."""

    def __init__(self, work: Work, parallel: Parallel, seed: int = 0):
        self.work, self.parallel = work, parallel
        model = Aria.random(work.config, dtype=measure.dtype_of(parallel.device), device=parallel.device, seed=seed)
        targets.apply(model, FULL)
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.model = parallel.apply(model.train())
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._trained = list(named.values())
        self._optimizer = make_optimizer(named.items(), work.settings)
        self._objective = Objective(self.model, ObjectiveSettings(), ranks=parallel)

    def step(self, batches: list[Batch]) -> torch.Tensor:
        """Run a step over this rank's micro-batches (as many on every rank); return the loss of the whole step."""
        ranks = self.parallel.data_world
        labels = sum(one.labels for one in batches) * ranks
        loss = torch.zeros((), device=self.parallel.device)
        for one in batches:
            found = self._objective(one, Step(float(labels), len(batches) * ranks, 0.0))
            found.total.backward()
            loss += found.metrics["loss"]
        clip_gradients(self._trained, self.work.settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self.parallel.sum(loss)


def curve(parallel: Parallel, steps: int, tokens: int) -> list[float]:
    """Return losses of the small model; batches do not depend on the world size."""
    config = small(parallel.device)
    work = Work(config, tokens, 4, CURVE_PARTS // parallel.data_world, OptimizerSettings(learning_rate=1e-3, eps=1e-6))
    training = Training(work, parallel)
    losses = []
    for number in range(steps):
        parts = [batch(config, tokens, 4, seed=number * CURVE_PARTS + part) for part in range(CURVE_PARTS)]
        mine = parts[parallel.data_rank :: parallel.data_world]
        losses.append(training.step([part.to(parallel.device) for part in mine]))
    return torch.stack(losses).tolist()


def speed(parallel: Parallel, work: Work, repeats: int) -> dict[str, Any]:
    """Measure losses, seconds per step, tokens per second of all ranks, and FLOP/s and memory of one."""
    training = Training(work, parallel)
    device = parallel.device
    seed = 1000 * (1 + parallel.data_rank)
    batches = [batch(work.config, work.tokens, work.sequences, seed + part) for part in range(work.accumulate)]
    batches = [one.to(device) for one in batches]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    losses: list[torch.Tensor] = []
    seconds = measure.clock(lambda: losses.append(training.step(batches)), device, repeats=repeats, warm_up=2)
    trained = Trained(vision=False, projector=False, decoder=True, full=True)
    flops = sum(batch_flops(work.config, trained, one.lengths, one.labels, ()) for one in batches)
    tokens = work.tokens * work.accumulate * parallel.data_world
    return {
        "parameters": training.parameters,
        "losses": torch.stack(losses).tolist(),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds.median,
        "flops_per_s_of_a_rank": flops / seconds.median,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="layers of the large model; 0 skips it")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per rank and step")
    parser.add_argument("--expert", type=int, nargs="*", help="ranks of expert parallelism (default: 1 and all)")
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit", "muon"))
    parser.add_argument("--rounding", default="masters", choices=("masters", "stochastic", "nearest"))
    parser.add_argument("--steps", type=int, default=20, help="steps of the small model")
    parser.add_argument("--curve-tokens", type=int, default=1024, help="tokens of a micro-batch of the small model")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of the large model")
    parser.add_argument("--first", type=Path, default=FIRST_FILE, help="results file of the run with one process")
    parser.add_argument("--out", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    parallel = Parallel.start()
    ways = sorted({1, parallel.world} if given.expert is None else set(given.expert))
    results: dict[str, Any] = {"benchmark": "scale", "world": parallel.world, "ways": {}}
    for expert in ways:
        settings = ParallelSettings(expert=expert, checkpointing=given.checkpointing)
        ranks = Parallel(settings, parallel.rank, parallel.world, parallel.device)
        found: dict[str, Any] = {"losses": curve(ranks, given.steps, given.curve_tokens)}
        _free(parallel.device)
        if given.layers:
            optimizer = OptimizerSettings(kind=given.optimizer, rounding=given.rounding, learning_rate=1e-5)
            work = Work(large(given.layers), given.tokens, max(1, given.tokens // 2048), given.accumulate, optimizer)
            found["speed"] = speed(ranks, work, given.repeats)
        _free(parallel.device)
        results["ways"][expert] = found
    if parallel.rank == 0:
        _report(results, given.first, measure.machine(parallel.device))
        measure.report(results, given.out)
    parallel.close()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _report(results: dict[str, Any], file: Path, machine: dict[str, str]) -> None:
    """Print the table; a run with one process saves its results, later runs are compared with them."""
    if results["world"] == 1:
        file.write_text(json.dumps(results["ways"][1], default=vars), encoding="utf-8")
    first = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    results["machine"] = machine
    rows = []
    for expert, found in results["ways"].items():
        row: list[object] = [results["world"], expert, f"{found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}"]
        if first is not None:
            pairs = zip(found["losses"], first["losses"], strict=True)
            found["curve_distance"] = max(abs(a - b) / abs(b) for a, b in pairs)
        row.append(f"{found['curve_distance']:.1e}" if first is not None else "")
        if (fast := found.get("speed")) is not None:
            if first is not None and "speed" in first:
                fast["efficiency"] = fast["tokens_per_s"] / first["speed"]["tokens_per_s"] / results["world"]
            seconds: Spread = fast["seconds"]
            row += [f"{seconds.median * 1000:,.0f}", f"{fast['tokens_per_s']:,.0f}"]
            row += [f"{fast['flops_per_s_of_a_rank'] / 1e12:,.0f}"]
            row += [f"{fast['efficiency']:.1%}" if "efficiency" in fast else ""]
            row += [f"{fast['peak_bytes'] / 2**30:.1f}" if fast["peak_bytes"] else ""]
        rows.append(row)
    header = ["ranks", "expert", "small model's loss", "vs. one rank", "ms per step", "tokens/s", "TFLOP/s per rank"]
    header += ["efficiency", "GiB"]
    print(measure.table([[*row, *[""] * (len(header) - len(row))] for row in rows], header))


if __name__ == "__main__":
    main()
