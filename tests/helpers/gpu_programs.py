"""Programs for fake GPUs, run as a script that prints results as JSON; see :mod:`tests.helpers.fake_gpu`.

python gpu_programs.py QUESTION [ARGUMENT ...]
"""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from aria import AriaConfig, AriaForConditionalGeneration, Engine, SamplingParams
from aria.engine import engine as engine_module
from aria.model import Aria
from aria.ops import LoRA
from aria.ops.kernels import chunk_attention, lora_train, moe_train, pointwise, swiglu
from tests.helpers.fake_gpu import GPU, GPUS, KB, Launch, Machine

ARIA = AriaConfig.aria()
# All layers are alike.
CONFIG = replace(
    ARIA, text=replace(ARIA.text, num_hidden_layers=2), vision=replace(ARIA.vision, num_hidden_layers=1)
)  # fmt: skip


def model(dtype: torch.dtype, device: torch.device) -> Aria:
    with torch.device("meta"):
        made = Aria(CONFIG).to(dtype)
    return made.to_empty(device=device).eval()


def adapter(rank: int) -> Any:
    """Make LoRA of everything in the decoder, as read from an adapter folder."""
    text, new = CONFIG.text, torch.empty
    D, F, E, V = text.hidden_size, text.intermediate_size, text.moe_num_experts, text.vocab_size
    W = F * text.moe_num_shared_experts
    sizes = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"}
    sizes |= {f"mlp.shared_experts.{name}_proj": (D, W) for name in ("gate", "up")}
    sizes["mlp.shared_experts.down_proj"] = W, D
    weights = {"language_model.lm_head": LoRA(new(rank, D), new(V, rank), 1.0)}
    for layer in range(text.num_hidden_layers):
        at = f"language_model.model.layers.{layer}."
        weights |= {at + name: LoRA(new(rank, i), new(o, rank), 1.0) for name, (i, o) in sizes.items()}
        weights[at + "mlp.experts.fc1"] = LoRA(new(E, D, rank), new(E, rank, 2 * F), 1.0)
        weights[at + "mlp.experts.fc2"] = LoRA(new(E, F, rank), new(E, rank, D), 1.0)
    return SimpleNamespace(weights=weights)


def engine(dtype: torch.dtype, rank: int = 0, device: str = "cuda:0", max_batch: int = 20) -> Engine:
    """Make an engine of Aria's widths on a running machine; with an adapter "a" if ``rank`` is not 0."""
    engine_module.load_model = lambda *_, **__: model(dtype, torch.device(device))
    engine_module.read_adapter = lambda *_: adapter(rank)
    # The number of rows per expert is unknown: give all to the first.
    moe_train._split = lambda x, ends: x.split([len(x), *[0] * (len(ends) - 1)])
    return Engine(CONFIG, device=device, max_batch=max_batch, adapters={"a": "."} if rank else None)


def train(dtype: torch.dtype, rank: int) -> None:
    """Launch the training kernels, forward and backward, with LoRA in float32."""
    text, device, noise = CONFIG.text, torch.device("cuda:0"), lora_train.Noise(0.1)
    D, F, E, A, T = text.hidden_size, text.intermediate_size, text.moe_num_experts, text.moe_topk, 300

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    matrices = [LoRA(new(E, D, rank, dtype=torch.float32), new(E, rank, 2 * F, dtype=torch.float32), 1.0)]
    ends, source = new(E, dtype=torch.int32), new(T * A, dtype=torch.int32)
    gate_up, thin = new(T * A, 2 * F), new(T * A, rank)
    gate, up = gate_up.chunk(2, dim=1)
    if moe_train.fits_ranks(gate, *matrices):
        a, b = matrices[0].a, matrices[0].b
        lora_train.gather(new(T, D), a, 2.0, noise, ends=ends, source=source)
        lora_train.expand(gate_up, thin, b, noise, ends=ends)
        sides = swiglu.Sides(thin, b, new(E, F, rank, dtype=torch.float32), (1.0, 1.0), noise)
        swiglu.forward(gate, up, sides, ends)
        rest = {"grad_thin_PR": thin, "weights_P": new(T * A), "out": True, "dropped": True}
        swiglu.backward(gate, up, new(T * A, F), sides, ends, **rest)
    swiglu.backward(gate, up, new(T * A, F))
    moe_train.combine(new(T * A, D), source, new(T, A), A)
    pointwise.rotary_train(new(T, 20, 128), new(T, 128), new(T, 128))


def needs(launches: Iterable[Launch], gpu: GPU) -> dict[str, int]:
    """Return the maximum bytes of shared memory of each kernel over its variants."""
    distinct = {(launch.name, str(launch.constants)): launch for launch in launches}
    found: dict[str, int] = {}
    for launch in distinct.values():
        found[launch.name] = max(found.get(launch.name, 0), launch.shared(gpu))
    return found


def shared(capability: str, dtype: str, rank: str, only: str = "") -> dict[str, int]:
    """Return shared memory of the kernels that an engine and a training launch, if their names contain ``only``."""
    machine = Machine(GPUS[capability])
    with machine.running():
        engine(getattr(torch, dtype), int(rank)).warm_up()
        for each in {8, 64, int(rank)} - {0}:
            train(getattr(torch, dtype), each)
    wanted = only.split(",")
    return needs((one for one in machine.launches.values() if any(x in one.name for x in wanted)), machine.gpu)


def warmed(capability: str, rank: str) -> dict[str, Any]:
    """Return what an engine still compiles or plans after warm-up, and the tuned constants of compiled kernels."""
    machine = Machine(GPUS[capability])
    chunk_attention._sdpa = lambda q, k, v, causal: _plan(machine, q, k, v, causal)
    choice = random.Random(0)
    with machine.running():
        made = engine(torch.bfloat16, int(rank))
        made.warm_up()
        known = dict(machine.launches)
        kinds = {}, {"logprobs": 2, "temperature": 1.0}, {"presence_penalty": 0.5}, {"prompt_logprobs": 1}
        for longest, requests in (50, 20), (700, 20), (5_000, 4), (50_000, 2):
            for seed in range(requests):
                ids = [choice.randrange(20, 4000) for _ in range(choice.randrange(1, longest))]
                params = SamplingParams(
                    max_tokens=choice.randrange(1, 9), ignore_eos=True, seed=seed, **choice.choice(kinds)
                )  # fmt: skip
                made.queue(made.prepare_text(ids), params, adapter=choice.choice([None, *made.adapters]))
                for _ in range(choice.randrange(4)):
                    made.step()
            while made.busy:
                made.step()
        for size, limit in ((980, 700), 980), ((300, 200), 490), ((2000, 1500), 980):
            image = {"type": "image", "image": Image.new("RGB", size), "max_image_size": limit}
            made.queue(made.prepare([{"role": "user", "content": [image]}]), SamplingParams(max_tokens=2, seed=0))
            while made.busy:
                made.step()
        new = [f"{name}: {key}" for name, key in machine.launches.keys() - known.keys()]
        plans = sum(name == "plan" for name, _ in known)
        train(torch.bfloat16, 8)
    return {"new": new, "plans": plans, "compiled": len(known), "tiles": tiles(machine.launches.values())}


def _plan(machine: Machine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
    """Replace cuDNN's attention, which plans once per distinct arguments."""
    made_by = [(list(x.shape), x.stride()) for x in (q, k, v)]
    machine.launches["plan", f"{made_by} {causal}"] = None
    return q.new_empty(q.shape[1], len(q), q.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


def tiles(launches: Iterable[Launch | None]) -> dict[str, list[dict[str, Any]]]:
    """Return tuned constants by kernel."""
    tuned = "STAGES", "HELD", "QUERIES", "KEYS", "GROUP", "TILE", "num_warps", "num_stages"
    found: dict[str, list[dict[str, Any]]] = {}
    for launch in launches:
        if launch is not None:
            constants = launch.constants
            some = {name: constants[name] for name in sorted(constants) if "BLOCK" in name or name in tuned}
            if some not in found.setdefault(launch.name, []):
                found[launch.name].append(some)
    return found


def unfit() -> dict[str, Any]:
    """Run an engine on a GPU that is too old for the kernels."""
    machine, heard = Machine(GPU((7, 5), 64 * KB)), []
    logging.getLogger("aria.ops.device").addHandler(handler := logging.Handler())
    handler.emit = lambda record: heard.append(record.getMessage())
    with machine.running():
        made = engine(torch.float32, max_batch=4)
        at_start = list(heard)
        answer = made.queue(made.prepare_text("Aria"), SamplingParams(max_tokens=3, seed=0, ignore_eos=True))
        while made.busy:
            made.step()
    return {
        "launches": len(machine.launches),
        "tokens": len(answer.requests[0].outputs),
        "at start": at_start,
        "heard": heard,
    }


def placed() -> dict[str, Any]:
    """Launch all kernels on the second of two GPUs."""
    machine, device = Machine(GPUS["9.0"]), torch.device("cuda:1")
    by_entry: dict[str, int] = {}

    def count(entry: str) -> None:
        by_entry[entry] = len(machine.launches)
        machine.launches.clear()

    with machine.running(), torch.no_grad():
        made = engine(torch.bfloat16, 8, "cuda:1", max_batch=4)
        count("engine")
        made.warm_up()
        made.close()
        count("steps")
        whole = AriaForConditionalGeneration(model(torch.bfloat16, device))
        whole._encode = lambda *_: None  # it counts image tokens, whose number is unknown
        ids = torch.ones(1, 1, dtype=torch.int64)
        whole(ids.to(device))
        count("forward")
        whole.generate(ids, max_new_tokens=3, seed=0, do_sample=True)
        count("generate")
    return {"misplaced": machine.misplaced, "launches": by_entry}


if __name__ == "__main__":
    question, *arguments = sys.argv[1:]
    print(json.dumps(globals()[question](*arguments)))
