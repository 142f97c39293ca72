"""The preflight's arithmetic against real tensors, its refusals, and the FLOPs of a batch."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aria import ops
from aria.config import AriaConfig
from aria.model import Packed
from aria.ops import Segments
from aria.processor.image_inputs import Crops
from aria.train import targets
from aria.train.batch import Batch, Sample
from aria.train.cost import Trained, batch_flops
from aria.train.objective import Objective, Step
from aria.train.optimizer import make_optimizer
from aria.train.preflight import Estimator, check, saved_bytes, size
from aria.train.recipe import Recipe
from tests.helpers.tiny import tiny_config, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FULL = {"method": "full", "freeze_vit": False, "freeze_projector": False}


def recipe(**sections) -> Recipe:
    return Recipe.from_table({"budget": {"steps": 10}, **sections})


def trained_model(chosen: Recipe):
    model = tiny_model(tiny_config())
    targets.apply(model, chosen.targets)
    return model.train()


@pytest.mark.parametrize(
    "chosen", [FULL, {"method": "lora"}, {**FULL, "freeze_llm": True}], ids=["full", "lora", "some"]
)
def test_weights_gradients_and_optimizer_are_those_of_real_tensors(chosen):
    output = recipe(targets=chosen)
    model = trained_model(output)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(named.items(), output.optimizer)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim)
    memory = Estimator(tiny_config(), CPU).memory(output)
    assert memory.weights + memory.adapters == sum(p.nbytes for p in model.parameters())
    assert (memory.adapters > 0) == (chosen["method"] == "lora")
    assert memory.gradients == sum(p.nbytes for p in named.values())
    assert memory.optimizer == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("chosen", [FULL, {"method": "lora"}], ids=["full", "lora"])
def test_activations_are_within_a_tenth_of_what_autograd_keeps(chosen):
    output = recipe(targets=chosen | {"freeze_vit": True}, batch={"tokens": 640})
    model = trained_model(output)
    ids = torch.randint(10, 300, (640,), generator=torch.Generator().manual_seed(0))
    with saved_bytes(model) as count:
        hidden = model(ids, Packed(model.config.text, Segments.of([300, 340])), router_logits=True).hidden
        found = count()
    del hidden
    memory = Estimator(tiny_config(), CPU).memory(output)
    assert memory.activations == pytest.approx(found, rel=0.1)


def test_activations_of_a_trained_vision_encoder_count_every_patch():
    frozen = Estimator(tiny_config(), CPU).memory(recipe(targets={"method": "full", "freeze_vit": True}))
    seen = Estimator(tiny_config(), CPU).memory(recipe(targets=FULL))
    few = Estimator(tiny_config(), CPU).memory(recipe(targets=FULL, data={"paths": ["a"], "max_crops": 1}))
    assert frozen.activations < few.activations < seen.activations


def test_a_vision_encoder_that_trains_on_text_keeps_nothing():
    output = recipe(targets=FULL, batch={"tokens": 640})
    estimator, model = Estimator(tiny_config(), CPU), trained_model(output)
    with saved_bytes(model) as count:
        hidden = model(torch.arange(640) % 250 + 10, Packed(model.config.text, Segments.of([640]))).hidden
        found = count()
    del hidden
    text, pictures = estimator.memory(output, density=0.0), estimator.memory(output)
    assert text.activations == pytest.approx(found, rel=0.1) and 5 * text.activations < pictures.activations
    # As dense as a crop and its tokens are all that a batch can be.
    [(patches, queries)] = [max(tiny_config().projector.patch_to_query.items())]
    assert estimator.memory(output, density=patches / queries).activations == pictures.activations
    few = estimator.memory(output, density=patches / queries / 8)
    assert text.activations < few.activations < pictures.activations


def test_images_that_do_not_fit_are_refused_with_the_number_that_does():
    output, config = recipe(targets=FULL, batch={"tokens": 2048}), tiny_config()
    side = max(config.projector.patch_to_query)
    most = 2048 // config.projector.patch_to_query[side]
    bound = dataclasses.replace(output, data=dataclasses.replace(output.data, max_crops=most // 2))
    need = Estimator(config, CPU).memory(bound).most
    with pytest.raises(ValueError, match=rf"data\.max_crops={most // 2} \({re.escape(size(need))}\)"):
        check(output, config, CPU, available=need)
    check(bound, config, CPU, available=need)
    with pytest.raises(ValueError, match="What would fit") as refused:
        check(output, config, CPU, available=need // 8, density=0.0)
    assert "max_crops" not in str(refused.value), "without pictures it changes nothing"


def test_a_plan_includes_host_memory_and_disk_space(tmp_path, monkeypatch):
    output, config = recipe(targets=FULL, checkpoint={"keep": 3}, schedule={"average": 0.9}), tiny_config()
    model = trained_model(output)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(named.items(), output.optimizer)
    saved = {"weights": named, "optimizer": optimizer.state_dict(), "average": {n: p.clone() for n, p in named.items()}}
    torch.save(saved, tmp_path / "all.pt")
    one = (tmp_path / "all.pt").stat().st_size
    plan = check(output, config, CPU, available=1 << 40, out=tmp_path / "runs" / "not yet")
    assert plan.storage.checkpoint == pytest.approx(one, rel=0.02)
    assert plan.memory.saving == plan.storage.checkpoint, "on the CPU a save's copy is in the same memory"
    whole = sum(p.nbytes for p in model.parameters())
    assert plan.storage.disk == 4 * plan.storage.checkpoint + whole and plan.storage.export == whole
    cells = list(plan.table().columns[0].cells)
    assert {"host, a save's copy", "disk, 4 checkpoints and export", "disk, free"} <= set(cells)
    assert not list(plan.storage.warnings())
    # Eight ranks, four of which are on this host, which has less than their copies take.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    full = shutil.disk_usage(tmp_path)._replace(free=plan.storage.disk - 1)
    monkeypatch.setattr("aria.train.storage.shutil.disk_usage", lambda folder: full)
    monkeypatch.setattr("aria.train.storage.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    many = Estimator(config, GPU).storage(output, 8, tmp_path / "runs")
    assert many.host == pytest.approx(many.checkpoint / 2, rel=0.01)
    memory, disk = many.warnings()
    assert f"copies {size(many.host)} of state into this host's memory" in memory
    assert size(many.disk) in disk and size(many.checkpoint) in disk and "checkpoint.keep" in disk
    # Existing checkpoints need no more space.
    (tmp_path / "runs" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "runs" / "checkpoints" / "step-1" / "x").write_bytes(bytes(100))
    assert len(list(Estimator(config, GPU).storage(output, 8, tmp_path / "runs").warnings())) == 1


def test_checkpointing_averages_and_ranks_change_what_they_should():
    estimator = Estimator(tiny_config(), CPU)
    plain = estimator.memory(recipe(targets=FULL))
    assert (
        estimator.memory(recipe(targets=FULL, parallel={"checkpointing": "full"})).activations < plain.activations / 4
    )
    averaged = estimator.memory(recipe(targets=FULL, schedule={"average": 0.9}))
    assert averaged.average == plain.gradients
    spread = estimator.memory(recipe(targets=FULL), world=4)
    assert spread.gradients == pytest.approx(plain.gradients / 4, rel=0.01) and spread.weights < plain.weights


@pytest.mark.slow
def test_ranks_that_share_sequences_keep_their_part_of_the_tokens():
    estimator = Estimator(tiny_config(), CPU)
    chosen = {"targets": {"method": "full", "freeze_vit": True}}

    def memory(tokens: int, sequence: int):
        return estimator.memory(recipe(**chosen, batch={"tokens": tokens}, parallel={"sequence": sequence}), world=4)

    whole, shared, half = memory(1024, 1), memory(1024, 2), memory(512, 1)
    embedded = 2 * 64 * 4 * 512
    assert shared.activations == half.activations + embedded, "embeddings are those of all tokens"
    assert shared.logits == half.logits < whole.logits
    assert shared.activations < 0.55 * whole.activations and shared.working <= whole.working
    config, limit = AriaConfig.aria(), Estimator(AriaConfig.aria(), GPU)
    pretrain = Recipe.read(Path(__file__).parents[2] / "recipes" / "pretrain.toml")
    spread = dataclasses.replace(pretrain, parallel=dataclasses.replace(pretrain.parallel, sequence=4))
    need = limit.memory(spread, 8).most
    with pytest.raises(ValueError, match=r"parallel\.sequence=4 and batch\.accumulate=256") as refused:
        check(pretrain, config, GPU, available=need, world=8)
    assert size(need) in str(refused.value)
    assert check(spread, config, GPU, available=need, world=8).step_tokens * 4 == 65536 * 64 * 8


@pytest.mark.slow
def test_every_rank_needs_memory_for_the_unsharded_model():
    config = AriaConfig.aria()
    output = recipe(batch={"tokens": 4096})
    memory = Estimator(config, GPU).memory(output, 8)
    alone = Estimator(config, GPU).memory(output)
    assert alone.whole == 0 and memory.whole == alone.weights + alone.adapters + alone.reserve > memory.total
    with pytest.raises(ValueError, match="every rank reads the whole model onto its device") as refused:
        check(output, config, GPU, available=memory.whole - 1, world=8)
    assert "nothing that was tried" in str(refused.value)
    plan = check(output, config, GPU, available=memory.whole, world=8)
    assert plan.memory == memory and "unsharded model, before training" in plan.table().columns[0].cells
    with pytest.raises(ValueError, match="nothing that was tried"):
        check(output, config, GPU, available=memory.whole - 1)


def test_what_cannot_fit_is_refused_with_settings_that_do():
    output = recipe(targets=FULL, batch={"tokens": 4096})
    config = tiny_config()
    estimator = Estimator(config, CPU)
    need = estimator.memory(output).total
    fits = estimator.memory(dataclasses.replace(output, batch=dataclasses.replace(output.batch, tokens=1024))).total
    assert check(output, config, CPU, available=need).memory.total == need
    with pytest.raises(ValueError, match=r"takes about .* on each device, but .* is free") as refused:
        check(output, config, CPU, available=fits + 1000)
    said = str(refused.value)
    assert f"batch.tokens=1024 and batch.accumulate=4 ({size(fits)})" in said
    assert "parallel.checkpointing=full" in said
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert part in said
    with pytest.raises(ValueError, match="nothing that was tried"):
        check(output, config, CPU, available=1000)


@pytest.mark.slow
def test_the_published_shape_on_one_gpu_of_80_gb():
    gpu = 78 << 30
    config = AriaConfig.aria()
    adapters = check(recipe(batch={"tokens": 4096}), config, GPU, available=gpu)
    assert 47.1 < adapters.memory.weights / 2**30 < 47.2
    with pytest.raises(ValueError, match=r"targets\.method=lora \(.*; \d+ devices") as refused:
        check(recipe(targets={**FULL, "freeze_vit": True}, batch={"tokens": 4096}), config, GPU, available=gpu)
    assert "optimizer" in str(refused.value)


@pytest.mark.slow
def test_recipes_of_full_weights_fit_the_gpus_that_they_name():
    gpu, config, folder = int(79e9), AriaConfig.aria(), Path(__file__).parents[2] / "recipes"
    for name, gpus in (("full", 8), ("full-8bit", 4)):
        output = Recipe.read(folder / f"{name}.toml")
        assert check(output, config, GPU, available=gpu, world=gpus).memory.total < gpu
        with pytest.raises(ValueError, match=r"about .* of memory on each device"):
            check(output, config, GPU, available=gpu, world=gpus // 2)


def test_a_plan_includes_tokens_steps_and_time():
    output = recipe(batch={"tokens": 1000, "accumulate": 3}, budget={"steps": 7})
    plan = check(output, tiny_config(), CPU, available=1 << 40, flops_rate=1e9)
    assert plan.step_tokens == 3000 and plan.steps == 7
    assert plan.seconds == pytest.approx(7 * 3000 * 4 * tiny_config().active_parameters() / (1e9 * 0.3))
    assert plan.table().row_count > 8


# FLOPs


def test_flops_of_a_batch_by_hand():
    config = tiny_config()
    text = config.text
    head = text.vocab_size * text.hidden_size
    layers = config.active_parameters() - head
    width = text.num_attention_heads * text.head_dim * text.num_hidden_layers
    lora, everything = Trained(False, False, True, False), Trained(True, True, True, True)
    attention = 2 * (10**2 + 30**2) * width
    assert batch_flops(config, lora, [10, 30], 5) == 4 * (40 * layers + 5 * head) + 3 * attention
    assert batch_flops(config, everything, [10, 30], 5) == 6 * (40 * layers + 5 * head) + 3 * attention


def test_an_image_costs_its_unpadded_patches():
    config = tiny_config()
    lora = Trained(False, False, True, False)
    bare = batch_flops(config, lora, [10], 5)
    whole, half = (
        batch_flops(config, lora, [10], 5, [Crops(torch.zeros(1, 3, 490, 490), ((490, width),))]) - bare
        for width in (490, 245)
    )
    # Half the patches: products half, attention among them a quarter.
    assert 0.25 < half / whole < 0.5
    trained = batch_flops(config, Trained(True, True, True, True), [10], 5)
    seen = batch_flops(
        config, Trained(True, True, True, True), [10], 5, [Crops(torch.zeros(1, 3, 490, 490), ((490, 490),))]
    )
    assert seen - trained == pytest.approx(3 * whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "a_token"),
    [
        (FULL | {"freeze_vit": True}, 6.0),
        (FULL | {"freeze_vit": True, "freeze_llm": True}, 4.0),
        ({"method": "full", "freeze_llm_layers": [0, 1], "freeze": ["*embed_tokens*"]}, None),
        ({"method": "full", "freeze_llm_layers": [0, 1]}, None),
        ({"method": "full", "freeze_llm_layers": [1], "freeze": ["*.experts.*", "*lm_head*"]}, None),
        ({"method": "lora", "rank": 1, "dropout": 0.0}, 4.0),
    ],
    ids=["full", "projector", "first layers frozen", "embeddings before frozen layers", "some of all", "adapters"],
)
def test_flops_are_those_that_pytorch_counts(chosen, a_token):
    config = tiny_config()
    output = recipe(targets=chosen, batch={"tokens": 1000})
    model, full = trained_model(output), chosen["method"] == "full"
    generator = torch.Generator().manual_seed(0)
    # Short ones, so that causal attention, of which PyTorch counts both halves, is little.
    rows = torch.randint(10, 300, (64, 12), generator=generator)
    batch = Batch.pack([Sample(ids, ids.roll(-1)) for ids in rows], 64 * 12, 2)
    trained = Trained.of(model, full=full)
    # Where it trains, the projector reads a grey patch at least.
    grey = [Crops(torch.zeros(1, 3, 490, 490), ((14, 14),))] if trained.projector else []
    counted = batch_flops(config, trained, batch.lengths, batch.labels, grey)
    with FlopCounterMode(display=False) as counter, ops.use("reference"):
        Objective(model)(batch, Step(batch.labels, 1, 0.0)).total.backward()
    # The products of adapters of rank one are left out, and are as little.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.04)
    if a_token is not None:
        each = a_token * config.active_parameters()
        assert batch_flops(config, trained, [1] * 1000, 1000) == pytest.approx(1000 * each, rel=0.01)
        plan = check(output, config, CPU, available=1 << 40, flops_rate=1e9)
        assert plan.seconds == pytest.approx(10 * 1000 * each / (1e9 * 0.3))


def test_adapters_of_later_layers_cost_the_first_ones_no_gradient():
    config = tiny_config()
    chosen = {"modules": ["experts.fc1"], "freeze_llm_layers": [0, 1]}
    found = Trained.of(trained_model(recipe(targets=chosen)), full=False)
    assert found.passes == (1, 1, 2, 2)
    every = Trained(False, False, True, False)
    assert batch_flops(config, found, [10, 30], 5) < 0.7 * batch_flops(config, every, [10, 30], 5)
