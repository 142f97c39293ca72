"""Training speed on one device: ``python -m bench.training.train --model aria --method lora --peer transformers``.

Times steps of forward, backward and optimizer with random weights on packed sequences that each start with an image;
then the same work with transformers and peft. Ours keeps all activations, about 2.6 MB per token of Aria's shape, so
8,192 tokens just fit beside 50.6 GB of weights on an 80 GB GPU.

T tokens, S tokens of a sequence, Q image tokens, C crops.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aria import AriaConfig
from aria.model import Aria
from aria.processor.image_inputs import Crops
from aria.train.batch import Batch
from aria.train.cost import Trained, batch_flops
from aria.train.loss import IGNORE_INDEX
from aria.train.objective import Objective, Step
from aria.train.targets import Targets, apply
from bench import measure, script
from bench.engine.peer import Peer
from bench.measure import Ceilings, Spread
from bench.shapes import SHAPES

RANK, ALPHA = 8, 32
PEER_LINEARS = r".*(language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head)"
PEER_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def make_batch(
    config: AriaConfig, sequences: int, length: int, side: int, device: torch.device, seed: int = 0
) -> Batch:
    """Make sequences of an image followed by text; all text has targets."""
    queries = config.image_sizes()[side]
    generator = torch.Generator().manual_seed(seed)
    ids, targets, crops = [], [], []
    for _ in range(sequences):
        text = torch.tensor(measure.random_prompt(config, length - queries, generator))
        ids.append(torch.cat((torch.full((queries,), config.image_token_index), text)))
        # Targets are the next tokens; image tokens (but the last) and the last token have none.
        after = torch.cat((text, torch.tensor([IGNORE_INDEX])))
        targets.append(torch.cat((torch.full((queries - 1,), IGNORE_INDEX), after)))
        shape = (1, config.vision.num_channels, side, side)
        crops.append(Crops(torch.randint(256, shape, dtype=torch.uint8, generator=generator), ((side, side),)))
    batch = Batch(
        input_ids=torch.cat(ids),
        targets=torch.cat(targets),
        lengths=(length,) * sequences,
        crops=tuple(crops),
        labels=sequences * (length - queries),
    )
    return batch.to(device)


class Marks:
    """Times of the parts of a step on the device; by the host's clock without CUDA."""

    NAMES = ("images", "forward", "backward", "optimizer")

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """End the part ``name``, which began at the previous mark."""
        moment: Any = time.perf_counter()
        if self._device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((name, moment))

    def seconds(self) -> dict[str, float]:
        """Return seconds of each part since the first mark, and reset."""
        measure.synchronize(self._device)
        found = dict.fromkeys(self.NAMES, 0.0)
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            found[name] += before.elapsed_time(after) / 1000 if self._device.type == "cuda" else after - before
        self._marks = []
        return found


def run_steps(step: Callable[[], None], marks: Marks, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time steps, after two untimed ones."""
    rows = []
    for number in range(2 + repeats):
        if number == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        marks.mark("begin")
        step()
        rows.append(marks.seconds())
    rows = rows[2:]
    parts = {name: Spread.of([row[name] for row in rows]) * 1000 for name in Marks.NAMES}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": Spread.of([sum(row.values()) for row in rows]), "ms": parts, "peak_bytes": peak}


def train(
    config: AriaConfig, batch: Batch, targets: Targets, device: torch.device, repeats: int, seed: int = 0
) -> dict[str, Any]:
    """Time our steps: the model's objective, and AdamW over trained parameters."""
    torch.manual_seed(seed)
    model = Aria.random(config, dtype=measure.dtype_of(device), device=device).train()
    trained = apply(model, targets)
    objective = Objective(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    marks, losses = Marks(device), []
    hook = model.multi_modal_projector.register_forward_hook(lambda *_: marks.mark("images"))

    def step() -> None:
        found = objective(batch, Step(batch.labels, 1, 0.0))
        losses.append(found.metrics["loss"])
        marks.mark("forward")
        found.total.backward()
        marks.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        marks.mark("optimizer")

    found = run_steps(step, marks, repeats, device)
    hook.remove()
    loss = torch.stack(losses)
    assert loss.isfinite().all(), "the loss is not finite"
    return found | {"parameters": trained.parameters, "loss": [float(x) for x in loss]}


def _rates(found: dict[str, Any], batch: Batch, config: AriaConfig, full: bool, limits: Ceilings) -> dict[str, Any]:
    """Add tokens per second, and MFU without and with the work of encoding images."""
    trained = Trained(vision=False, projector=False, decoder=True, full=full)
    seconds = found["seconds"].median
    text, whole = (
        batch_flops(config, trained, batch.lengths, batch.labels, crops) / seconds / limits.product
        for crops in ((), batch.crops)
    )
    return {"tokens_per_s": len(batch.input_ids) / seconds, "mfu": text, "mfu_with_images": whole, **found}


# transformers and peft


class Way(NamedTuple):
    """A way to run transformers."""

    checkpointing: bool
    on_experts: bool
    """Whether experts have LoRA, too."""
    together: bool
    """All sequences at once, or one at a time with gradient accumulation."""

    def __str__(self) -> str:
        return (
            f"gradient checkpointing {'on' if self.checkpointing else 'off'}, "
            f"LoRA on linear layers {'and experts' if self.on_experts else 'only'}, "
            f"{'all sequences at once' if self.together else 'a sequence at a time'}"
        )


WAYS = (Way(False, True, True), Way(True, True, True), Way(True, True, False), Way(True, False, False))
"""The first that fits into memory is measured."""


def peer_inputs(config: AriaConfig, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the batch for transformers: rows of one length, preprocessed images, unshifted labels."""
    ids = batch.input_ids.view(len(batch.lengths), -1)
    labels = ids.masked_fill(ids == config.image_token_index, IGNORE_INDEX)
    pixels = torch.cat([crops.pixels for crops in batch.crops]).to(dtype).div(127.5).sub(1)
    mask = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.bool, device=pixels.device)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels,
        "pixel_mask": mask,
    }  # fmt: skip


def train_peer(
    config: AriaConfig, batch: Batch, full: bool, device: torch.device, repeats: int
) -> tuple[dict[str, Any], str]:
    """Time the same steps with transformers and peft; also return the way they were run."""
    for way in WAYS:
        try:
            return _train_peer(config, batch, full, device, repeats, way), str(way)
        except torch.cuda.OutOfMemoryError:
            print(f"transformers, {way}: out of memory", flush=True)
        free(device)
    return {}, "out of memory in all ways"


def _train_peer(
    config: AriaConfig, batch: Batch, full: bool, device: torch.device, repeats: int, way: Way
) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = measure.dtype_of(device)
    model: Any = Peer(config, dtype, device).model
    model.set_experts_implementation("grouped_mm" if device.type == "cuda" else "eager")
    model.requires_grad_(full)
    projector = model.model.multi_modal_projector
    for frozen in (model.model.vision_tower, projector):
        frozen.requires_grad_(False)
    if not full:
        model = _with_peft(model, way.on_experts)
    model.train()
    if way.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    inputs = peer_inputs(config, batch, dtype)
    rows = [inputs] if way.together else [dict(zip(inputs, row, strict=True)) for row in _rows(inputs)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")
    marks = Marks(device)
    hook = projector.register_forward_hook(lambda *_: marks.mark("images"))

    def step() -> None:
        for row in rows:
            loss = model(**row).loss / len(rows)
            marks.mark("forward")
            loss.backward()
            marks.mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        marks.mark("optimizer")

    found = run_steps(step, marks, repeats, device)
    hook.remove()
    return found | {"parameters": sum(p.numel() for p in parameters)}


def _rows(inputs: dict[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield each sequence with its image."""
    yield from zip(*(tensor.split(1) for tensor in inputs.values()), strict=True)


def _with_peft(model: nn.Module, on_experts: bool) -> nn.Module:
    # Optional: only this benchmark needs it.
    from peft import LoraConfig, get_peft_model

    # peft has no dropout for LoRA on parameters, so there is none here either.
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PEER_LINEARS,
        target_parameters=PEER_EXPERTS if on_experts else None,
    )  # fmt: skip
    return get_peft_model(model, settings)


# Reports


def show(name: str, found: dict[str, Any]) -> None:
    """Print a line for a run, and one for its parts."""
    seconds = found["seconds"] * 1000
    memory = "" if found["peak_bytes"] is None else f", peak {found['peak_bytes'] / 1e9:.1f} GB"
    print(
        f"{name}: {found['tokens_per_s']:,.0f} tokens/s, {seconds.median:.1f} ms per step ({seconds.low:.1f} to "
        f"{seconds.high:.1f}), MFU {found['mfu']:.1%}, with images {found['mfu_with_images']:.1%}{memory}"
    )
    parts = (f"{part} {ms.median:.1f} ({ms.low:.1f} to {ms.high:.1f})" for part, ms in found["ms"].items())
    print(f"  ms: {', '.join(parts)}; {found['parameters']:,} trained parameters", flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time ours without and with LoRA dropout, then the peer."""
    device, config = arguments.device, SHAPES[arguments.model]()
    limits = measure.ceilings(device, measure.dtype_of(device))
    print(measure.describe(limits))
    full = arguments.method == "full"
    length = min(arguments.length, arguments.tokens)
    side = max(config.image_sizes())
    batch = make_batch(config, arguments.tokens // length, length, side, device)
    results: dict[str, Any] = {
        "machine": measure.machine(device), "ceilings": limits, "model": arguments.model, "method": arguments.method,
        "tokens": len(batch.input_ids), "length": length, "side": side, "runs": {},
    }  # fmt: skip
    for dropout in (0.0,) if full else (0.0, 0.05):
        targets = Targets(method="full") if full else Targets(rank=RANK, alpha=ALPHA, dropout=dropout)
        found = train(config, batch, targets, device, arguments.repeats)
        name = "aria, full weights" if full else f"aria, dropout {dropout:g}"
        results["runs"][name] = _rates(found, batch, config, full, limits)
        show(name, results["runs"][name])
        free(device)
        measure.write(results, arguments.json)
    if arguments.peer:
        found, how = train_peer(config, batch, full, device, arguments.repeats)
        results["peer"] = {"name": f"transformers {results['machine']['transformers']}", "how": how}
        if found:
            results["peer"] |= _rates(found, batch, config, full, limits)
            show(f"{results['peer']['name']}, {how}", results["peer"])
            ours = next(iter(results["runs"].values()))
            results["ratio"] = ours["tokens_per_s"] / results["peer"]["tokens_per_s"]
            print(f"aria has {results['ratio']:.2f} times its throughput")
        else:
            print(f"{results['peer']['name']}: {how}")
    return results


def free(device: torch.device) -> None:
    """Free memory before the next model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step (default: 8192)")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of a sequence, its image included (default: 2048)"
    )
    parser.add_argument("--repeats", type=int, default=8, help="timed steps (default: 8)")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    measure.report(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
