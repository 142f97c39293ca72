"""A small training whose result does not depend on the world size, to check that it does not.

``torchrun --nproc-per-node 2 -m tests.helpers.spread FOLDER`` runs every case for that world size; rank 0 writes the
result of :func:`train` to ``FOLDER/NAME.pt``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from aria.config import AriaConfig
from aria.model import Aria
from aria.processor.image_inputs import Crops
from aria.train import targets
from aria.train.batch import Batch, Sample
from aria.train.objective import Objective, ObjectiveSettings, Step
from aria.train.optimizer import OptimizerSettings, clip_gradients, make_optimizer
from aria.train.parallel import Parallel, ParallelSettings
from aria.train.state import gathered
from aria.train.targets import Targets
from tests.helpers.tiny import tiny_config, tiny_model

PARTS = 4
"""Micro-batches of a step, split among the ranks."""
TOKENS = 64
FULL = Targets(method="full", freeze_vit=False, freeze_projector=False)
# Adam's first steps are signs of gradients, even of rounding errors; a large eps avoids that.
ADAMW = OptimizerSettings(learning_rate=0.02, eps=1e-2, clip_norm=0.5)


@dataclass(frozen=True)
class Case:
    """One configuration of training."""

    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    targets: Targets = FULL
    optimizer: OptimizerSettings = ADAMW
    pictures: tuple[int, ...] = (0, 3)
    """Micro-batches of each step with images; of two ranks, the second has none in the first half."""
    one_sided: bool = False
    """Route every token to the first experts, so that a rank with the last ones gets none."""
    dtype: torch.dtype = torch.float32
    steps: int = 4


TWO = {
    "shards": Case(),
    "experts": Case(ParallelSettings(expert=2)),
    "experts, recomputed": Case(ParallelSettings(expert=2, checkpointing="full")),
    "experts, one_sided": Case(ParallelSettings(expert=2), replace(FULL, freeze=("*.router.weight",)), one_sided=True),
    "adapters": Case(ParallelSettings(checkpointing="selective"), Targets(dropout=0.0)),
    "adapters, experts": Case(
        ParallelSettings(expert=2, checkpointing="full"), Targets(dropout=0.0, freeze_vit=False, freeze_projector=False)
    ),
    "projector": Case(ParallelSettings(expert=2), replace(FULL, freeze_vit=True, freeze_llm=True), pictures=(3,)),
    "sequence": Case(ParallelSettings(sequence=2)),
    "sequence, experts": Case(ParallelSettings(sequence=2, expert=2, checkpointing="full")),
    "muon": Case(ParallelSettings(expert=2), optimizer=replace(ADAMW, kind="muon", learning_rate=2e-3)),
}
FOUR = {
    "shards of experts": Case(ParallelSettings(expert=2)),
    "experts on four": Case(ParallelSettings(expert=4, checkpointing="full")),
    "adapters, shards of experts": Case(ParallelSettings(expert=2), Targets(dropout=0.0)),
    "sequence, shards of experts": Case(ParallelSettings(sequence=2, expert=2)),
}
CASES = {2: TWO, 4: FOUR}
"""Cases by world size."""


def small_config() -> AriaConfig:
    """Return a configuration with images of 56 px and 8 tokens; only heads and experts divide evenly among ranks."""
    return tiny_config(vocab_size=301, image_size=56, table={16: 8})


def batches(step: int, pictures: tuple[int, ...], config: AriaConfig) -> list[Batch]:
    """Make the micro-batches of a step: sequences, filler, images in some; every other step has the same."""
    generator = torch.Generator().manual_seed(1000 + step % 2)
    made = []
    for part in range(PARTS):
        samples = []
        for length in (17 + part, 26):
            ids = torch.randint(10, config.text.vocab_size, (length,), generator=generator)
            crops: tuple[Crops, ...] = ()
            if part in pictures:
                ids[1:9] = config.image_token_index
                pixels = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8, generator=generator)
                crops = (Crops(pixels, ((56, 56),)),)
            labels = ids.roll(-1)
            labels[: length // 2] = labels[-1] = -100
            samples.append(Sample(ids, labels, crops))
        made.append(Batch.pack(samples, TOKENS, 2))
    return made


def model_of(case: Case, device: torch.device, config: AriaConfig | None = None) -> Aria:
    """Make the model before it is parallelised, the same on every rank."""
    model = tiny_model(config or small_config())
    torch.manual_seed(7)
    targets.apply(model, case.targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(0, 0.05)
            if case.one_sided and name.endswith("router.weight"):
                parameter.zero_()
    return model.to(device, case.dtype).train()


def train(case: Case, parallel: Parallel) -> dict[str, Any]:
    """Train; return losses, gradient norms, and trained weights (on rank 0 only)."""
    model = parallel.apply(model_of(case, parallel.device), case.parallel)
    # Router losses are means over a rank's tokens, which depend on how sequences are split.
    apart = {"z_coefficient": 0.0, "balance_coefficient": 0.0} if case.parallel.sequence > 1 else {}
    settings = ObjectiveSettings(**apart)
    objective = Objective(model, settings, ranks=parallel)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(named.items(), case.optimizer)
    losses, norms = [], []
    for number in range(case.steps):
        parts = batches(number, case.pictures, model.config)
        step = Step(float(sum(part.labels for part in parts)), PARTS, 0.0)
        found = torch.zeros((), device=parallel.device)
        for batch in parts[parallel.data_rank :: parallel.data_world]:
            given = objective(batch.to(parallel.device), step)
            given.total.backward()
            found += given.metrics["loss"]
        norms.append(clip_gradients(named.values(), case.optimizer.clip_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parallel.sum(found).item())
    return {"losses": losses, "norms": norms, "weights": gathered(model, trained=True)}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    parallel = Parallel.start(ParallelSettings(timeout=60.0))
    for name, case in CASES[parallel.world].items():
        own = Parallel(case.parallel, parallel.rank, parallel.world, parallel.device)
        result = train(case, own)
        if parallel.rank == 0:
            torch.save(result, Path(folder) / f"{name}.pt")
    parallel.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
