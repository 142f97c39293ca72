"""Several adapters in one step on a GPU: graphs, grouped products and kernels against plain passes of merged models."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from aria import ops
from aria.checkpoint.adapter import merged
from aria.engine.core import EngineCore
from aria.model import Aria, Packed
from aria.ops import LoRA, Segments
from tests.helpers.gpu_models import CONFIG, WIDE, relative_error, requests_of
from tests.helpers.tiny_core import answer

pytestmark = pytest.mark.gpu


LAYERS = "language_model.model.layers"
PARTS = {
    "attention": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "experts": ("mlp.experts.fc1", "mlp.experts.fc2"),
    "all": (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        "mlp.experts.fc1",
        "mlp.experts.fc2",
        *(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")),
    ),
}


def changes_of(model: Aria, name: str, rank: int, size: float) -> dict[str, LoRA]:
    """A random adapter of some parts in every layer, in the dtype of their weights."""
    modules = [f"{LAYERS}.{i}.{part}" for i in range(model.config.text.num_hidden_layers) for part in PARTS[name]]
    if name == "all":
        modules.append("language_model.lm_head")
    generator = torch.Generator("cuda").manual_seed(rank)
    made = {}
    for module in modules:
        weight = model.get_parameter(f"{module}.weight")
        if weight.ndim == 2:
            shapes = (rank, weight.shape[1]), (weight.shape[0], rank)
        else:
            shapes = (weight.shape[0], weight.shape[1], rank), (weight.shape[0], rank, weight.shape[2])
        # Rounded already, so that what is merged and what is served differ in their arithmetic alone.
        a, b = (torch.randn(shape, generator=generator, device="cuda").mul_(size).to(weight.dtype) for shape in shapes)
        made[module] = LoRA(a, b, 1.0)
    return made


def merge(model: Aria, changes: dict[str, LoRA]) -> Aria:
    """The model with an adapter merged; unchanged weights are shared."""
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module, change in changes.items():
        owner = made.get_submodule(module)
        owner.weight = nn.Parameter(merged(owner.weight.data, change), requires_grad=False)
    return made


@torch.no_grad()
def plain_logits(models: dict[str | None, Aria], requests, seen, dtype: torch.dtype) -> torch.Tensor:
    """The same positions in plain PyTorch over whole sequences, by the merged model of each request."""
    by_request = {}
    with ops.use("reference"):
        for request in requests:
            model = models[request.adapter]
            ids = torch.tensor([*request.prompt, *request.outputs], device="cuda")
            features = [image.data.to(dtype) for image in request.images]
            context = Packed(model.config.text, Segments.of([len(ids)], "cuda"))
            hidden = model(ids, context, torch.cat(features) if features else None).hidden
            by_request[request] = model.logits(hidden).float().cpu()
    return torch.stack([by_request[request][len(request.prompt) + n - 1] for request, n, _ in seen])


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["small", "wide"])
def test_float32_equals_merged_models(config):
    std = 0.02 if config is WIDE else 0.05
    model = Aria.random(config, dtype=torch.float32, device="cuda", std=std)
    changes = {name: changes_of(model, name, rank, 0.05) for name, rank in (("attention", 3), ("all", 8))}
    models = {None: model} | {name: merge(model, one) for name, one in changes.items()}
    core = EngineCore(
        model, max_batch=8, max_model_len=1024, cache_blocks=24, step_tokens=256, mixed_step_tokens=128,
        adapters=changes,
    )  # fmt: skip
    work = requests_of(config.text.vocab_size, config.text.hidden_size, 15, 300)
    requests, seen = answer(core, work, torch.float32, [None, *changes])
    got = torch.stack([logits for *_, logits in seen])
    assert relative_error(got, plain_logits(models, requests, seen, torch.float32)) < 1e-5


@pytest.mark.parametrize(
    ("few", "many"), [(128, 64), (0, 64), (0, 0)], ids=["kernels", "kernels of many tokens", "grouped products"]
)
def test_bfloat16_is_as_near_to_float32_as_merged_weights(few, many, monkeypatch):
    monkeypatch.setattr("aria.ops.kernels.multi_lora_decode.MOST_RANKS", few)
    monkeypatch.setattr("aria.ops.kernels.multi_lora_prefill.MOST_RANKS", many)
    std = 0.02
    model = Aria.random(WIDE, dtype=torch.bfloat16, device="cuda", std=std)
    ranks = {"attention": 4, "experts": 8, "all": 16}
    changes = {name: changes_of(model, name, rank, 0.05) for name, rank in ranks.items()}
    names = [None, *changes]
    core = EngineCore(
        model, max_batch=16, max_model_len=1024, cache_blocks=80, step_tokens=1024, mixed_step_tokens=256,
        adapters=changes,
    )  # fmt: skip
    work = requests_of(WIDE.text.vocab_size, WIDE.text.hidden_size, 24, 900)
    requests, seen = answer(core, work, torch.bfloat16, names)
    graphs = core.runner._graphs._captured
    captured = {key[-1] for key, graph in graphs.items() if graph is not None and key[0] == "decode"}
    hopper = torch.cuda.get_device_capability()[0] in (9, 10)
    assert (True in captured) == hopper, (
        "steps with adapters run as graphs where grouped products do not wait for the host"
    )
    got = torch.stack([logits for *_, logits in seen])
    models = {name: merge(model, changes[name]) if name else model for name in names}
    plain = plain_logits(models, requests, seen, torch.bfloat16)
    del models
    wide = copy.deepcopy(model).float()
    exact = plain_logits(
        {name: merge(wide, changes[name]) if name else wide for name in names}, requests, seen, torch.float32
    )
    ours, theirs = ((logits - exact).double().square().sum().sqrt().item() for logits in (got, plain))
    print(f"error of the engine by that of plain passes of merged weights: {ours / theirs:.3f}")
    assert ours <= 1.15 * theirs


def test_base_model_requests_are_not_affected_by_adapters():
    model = Aria.random(WIDE, dtype=torch.bfloat16, device="cuda")
    work = requests_of(WIDE.text.vocab_size, WIDE.text.hidden_size, 8, 300)
    outputs = []
    for adapters in (None, {"all": changes_of(model, "all", 8, 0.02)}):
        core = EngineCore(model, max_batch=8, max_model_len=1024, cache_blocks=80, adapters=adapters)
        requests, seen = answer(core, work, torch.bfloat16, [None])
        outputs.append((torch.stack([logits for *_, logits in seen]), [request.outputs for request in requests]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1] == outputs[1][1]


def test_loading_and_unloading_adapters_drops_stale_graphs():
    model = Aria.random(WIDE, dtype=torch.bfloat16, device="cuda", std=0.02)
    changes = {name: changes_of(model, name, rank, 0.05) for name, rank in (("attention", 4), ("all", 8))}
    models = {None: model} | {name: merge(model, one) for name, one in changes.items()}
    core = EngineCore(
        model, max_batch=8, max_model_len=1024, cache_blocks=80, adapters={"attention": changes["attention"]}
    )
    work = requests_of(WIDE.text.vocab_size, WIDE.text.hidden_size, 12, 300)

    def check(names: list[str | None]) -> None:
        requests, seen = answer(core, work, torch.bfloat16, names)
        chosen = [i for i, (request, *_) in enumerate(seen) if request.adapter is not None]
        got = torch.stack([logits for *_, logits in seen])[chosen]
        right, base = (
            relative_error(got, plain_logits(one, requests, seen, torch.bfloat16)[chosen])
            for one in (models, dict.fromkeys(models, model))
        )
        print(f"error beside merged weights {right:.4f}, beside the model's own {base:.4f}")
        assert right < 0.2 * base

    check([None, "attention"])
    core.add_adapter("all", changes["all"])
    check([None, "attention", "all"])
    core.remove_adapter("attention")
    assert not core.adapters.retired
    check(["all", None])
    assert any(graph is not None for graph in core.runner._graphs._captured.values()), "graphs are captured anew"


def test_adapters_reduce_the_kv_cache():
    model = Aria.random(WIDE, dtype=torch.bfloat16, device="cuda")
    capacities, sizes = [], []
    for adapters in (None, {"all": changes_of(model, "all", 64, 0.02)}):
        torch.cuda.empty_cache()
        # So many answers that memory is the limit, and not what they could need.
        core = EngineCore(model, max_batch=256, memory_utilization=0.3, adapters=adapters)
        free, total = torch.cuda.mem_get_info()
        assert total - free < 0.3 * total
        capacities.append(core.pool.total * core.runner._cache.nbytes / (core.pool.total + 1))
        sizes.append(core.adapters.nbytes)
        del core
        gc.collect()
    assert sizes[0] == 0 and sizes[1] > 50e6
    assert capacities[0] - capacities[1] > sizes[1]
