"""Cost of multi-LoRA: ``python -m bench.engine.adapters --batch 1 8 64 256 --adapters 4 --rank 8``.

Reports the time of decoding steps with requests of no adapter, of one, and of all in turn. Every linear layer of the
decoder, the experts and the head are adapted, as the authors train them. Weights and adapters are random, tokens are
drawn at temperature 2, as in :mod:`bench.engine.decode`. R rank, E experts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from aria import SamplingParams
from aria.engine.core import EngineCore
from aria.engine.request import Request
from aria.model import Aria
from aria.model.lora import lora_targets
from aria.ops import LoRA
from bench import measure, script
from bench.engine.decode import SETTLE, clock_steps, finish
from bench.shapes import SHAPES


def random_adapter(model: Aria, rank: int) -> dict[str, LoRA]:
    """Make random LoRA of everything in the decoder, by module name."""
    made = {}
    for name in lora_targets(model):
        if name.startswith("language_model."):
            weight = model.get_parameter(f"{name}.weight")
            *E, size, out = (weight.shape[1], weight.shape[0]) if weight.ndim == 2 else weight.shape
            a, b = ((*E, size, rank), (*E, rank, out)) if E else ((rank, size), (out, rank))
            made[name] = LoRA(torch.randn(a).mul_(0.02), torch.randn(b).mul_(0.02), 4.0)
    return made


def grow(core: EngineCore, names: Sequence[str | None], batch: int, context: int, steps: int) -> list[Request]:
    """Prefill ``batch`` prompts so that all are decoding; ``names`` are their adapters in turn."""
    generator = torch.Generator().manual_seed(batch)
    requests = []
    for seed in range(batch):
        prompt = measure.random_prompt(core.model.config, context, generator)
        params = SamplingParams(max_tokens=steps + 256, temperature=2.0, seed=seed, ignore_eos=True)
        requests += core.add(prompt, params, adapter=names[seed % len(names)])
    while not all(request.outputs for request in requests):
        core.step()
    for _ in range(SETTLE):
        core.step()
    return requests


def read(core: EngineCore, names: Sequence[str | None], tokens: int, repeats: int = 5) -> float:
    """Return seconds to the first token of a prompt, the best of ``repeats``."""
    seconds = []
    for seed in range(repeats):
        prompt = measure.random_prompt(core.model.config, tokens, torch.Generator().manual_seed(seed))
        start = time.perf_counter()
        [request] = core.add(prompt, SamplingParams(max_tokens=1), adapter=names[-1])
        while core.busy:
            core.step()
        seconds.append(time.perf_counter() - start)
        assert request.outputs, "no token was sampled"
    return min(seconds)


def run(core: EngineCore, batches: Sequence[int], context: int, steps: int, tokens: int) -> dict[str, Any]:
    """Return milliseconds per step, by the requests' adapters."""
    names = core.adapters.names
    kinds: dict[str, list[str | None]] = {"none": [None], "one": [names[0]], "all": list(names)}
    rows = []
    for batch in batches:
        row: dict[str, Any] = {"batch": batch}
        for kind, chosen in kinds.items():
            requests = grow(core, chosen, batch, context, steps)
            row[f"{kind}_ms"] = clock_steps(core, requests, steps)[0] * 1000
            finish(core, requests)
        rows.append(row)
    reading = {f"{kind}_ms": read(core, chosen, tokens) * 1000 for kind, chosen in kinds.items() if kind != "all"}
    return {"decode": rows, "read": {"tokens": tokens, **reading}, "adapter_bytes": core.adapters.nbytes}


def main(argv: Sequence[str] | None = None) -> None:
    def add_work(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N")
        parser.add_argument("--context", type=int, default=128)
        parser.add_argument("--steps", type=int, default=32)
        parser.add_argument(
            "--read", type=int, default=2048, metavar="T", help="tokens of the prompt whose prefill is timed"
        )
        parser.add_argument("--adapters", type=int, default=4)
        parser.add_argument("--rank", type=int, default=8)

    arguments = script.parse(__doc__, add_work, argv)
    device = arguments.device
    model = Aria.random(SHAPES[arguments.model](), dtype=measure.dtype_of(device), device=device)
    # All are the same: their values do not matter.
    adapter = random_adapter(model, arguments.rank)
    longest = arguments.context + arguments.steps + 512
    cache = arguments.cache_tokens or (
        None if device.type == "cuda" else max(arguments.batch) * longest + arguments.read
    )
    core = EngineCore(
        model,
        max_batch=max(arguments.batch),
        cache_blocks=None if cache is None else EngineCore.blocks_for(device, cache),
        max_model_len=min(max(longest, arguments.read + 64), model.config.text.max_position_embeddings),
        adapters={f"adapter {i}": adapter for i in range(1, arguments.adapters + 1)},
    )
    results = run(core, arguments.batch, arguments.context, arguments.steps, arguments.read)
    cells = [
        (f"batch {row['batch']}", *(f"{row[f'{k}_ms']:.3f}" for k in ("none", "one", "all")))
        for row in results["decode"]
    ]
    print(measure.table(cells, ("ms per step", "no adapter", "one", "all in turn")))
    read_ms = results["read"]
    without, with_one = read_ms["none_ms"], read_ms["one_ms"]
    print(f"prefill of {read_ms['tokens']} tokens: {without:.1f} ms, with an adapter {with_one:.1f} ms")
    print(f"{arguments.adapters} adapters of rank {arguments.rank} take {results['adapter_bytes'] / 1e6:.0f} MB")
    measure.report(
        {"machine": measure.machine(device), "adapters": arguments.adapters, "rank": arguments.rank} | results,
        arguments.json,
    )


if __name__ == "__main__":
    main()
