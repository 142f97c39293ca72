"""Multi-LoRA: requests of several adapters in one step get what a model with the merged adapter gives each alone."""

from __future__ import annotations

import copy
import random
from functools import cache

import pytest
import torch
from PIL import Image

from aria import Engine, SamplingParams, ops
from aria.checkpoint import load_model
from aria.checkpoint.adapter import merged, save_adapter
from aria.engine.core import EngineCore
from aria.engine.failures import StepError
from aria.model import Aria, Packed
from aria.model.lora import lora_modules as attached
from aria.ops import LoRA, Segments
from aria.processor.image_inputs import ImageSpan
from aria.train.targets import Targets, apply
from tests.helpers.tiny import tiny_config, tiny_model

LAYERS = "language_model.model.layers"
EXPERTS = [f"{LAYERS}.{layer}.mlp.experts.{part}" for layer in range(3) for part in ("fc1", "fc2")]
# Shared experts of one layer alone, k without q, a head, and ranks that are no multiples of anything.
CHOSEN = {
    "experts": (EXPERTS, 4, 0.7),
    "attention": ([f"{LAYERS}.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"], 3, 1.5),
    "ends": (
        [f"{LAYERS}.0.self_attn.k_proj", f"{LAYERS}.2.mlp.experts.fc2", "language_model.lm_head"]
        + [f"{LAYERS}.1.mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")],
        9,
        0.4,
    ),
}
NAMES = [None, *CHOSEN]


def lora(weight: torch.Tensor, rank: int, scaling: float, seed: int) -> LoRA:
    choice = torch.Generator().manual_seed(seed)
    if weight.ndim == 2:
        shapes = (rank, weight.shape[1]), (weight.shape[0], rank)
    else:
        shapes = (weight.shape[0], weight.shape[1], rank), (weight.shape[0], rank, weight.shape[2])
    a, b = (torch.randn(shape, generator=choice) * 0.2 for shape in shapes)
    return LoRA(a, b, scaling)


@cache
def model() -> Aria:
    return tiny_model(tiny_config(vocab_size=120))


@cache
def changes() -> dict[str, dict[str, LoRA]]:
    return {
        name: {
            module: lora(model().get_parameter(f"{module}.weight"), rank, scaling, len(name) + i)
            for i, module in enumerate(modules)
        }
        for name, (modules, rank, scaling) in CHOSEN.items()
    }


def merge(into: Aria, one: dict[str, LoRA]) -> Aria:
    made = copy.deepcopy(into)
    for module, change in one.items():
        weight = made.get_parameter(f"{module}.weight")
        weight.data = merged(weight.data, change)
    return made


@cache
def plain(name: str | None) -> Aria:
    """The merged model that a request of an adapter is compared with."""
    return model() if name is None else merge(model(), changes()[name])


def core(**settings) -> EngineCore:
    defaults = {"max_batch": 8, "max_model_len": 400, "cache_blocks": 200, "step_tokens": 64, "mixed_step_tokens": 32}
    return EngineCore(model(), **(defaults | {"adapters": changes()} | settings))


def prompt(length: int, seed: int) -> list[int]:
    choice = random.Random(seed)
    return [choice.randrange(20, 120) for _ in range(length)]


def work(seed: int) -> tuple[list[int], list[ImageSpan]]:
    """A prompt: short, long, with an image, or with a prefix shared across adapters."""
    kind = seed // 4 % 4
    if kind == 2:
        features = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed % 2))
        return [*prompt(3, seed), *[9] * 20, *prompt(4, seed)], [ImageSpan(3, 20, b"%d" % (seed % 2), features)]
    return (prompt(3, seed), prompt(90, seed), [], prompt(50, 999) + prompt(5, seed))[kind], []


def run(engine: EngineCore) -> None:
    while engine.unfinished:
        engine.step()
        engine.scheduler.check()


@torch.no_grad()
def expected_logits(name: str | None, ids: list[int], images: list[ImageSpan]) -> torch.Tensor:
    features = torch.cat([image.data for image in images]) if images else None
    twin = plain(name)
    return twin.logits(twin(torch.tensor(ids), Packed(twin.config.text, Segments.of([len(ids)])), features).hidden)


@pytest.mark.parametrize(
    "settings",
    [{}, {"step_tokens": 16, "mixed_step_tokens": 16, "max_batch": 3}, {"cache_blocks": 14, "max_model_len": 200}],
    ids=["mixed", "small chunks", "preempted"],
)
def test_logits_equal_those_of_merged_models_in_shared_steps(settings):
    engine, seen, mixed = core(**settings), [], []
    launch = engine.runner.launch

    def watched(plan):
        launched = launch(plan)
        mixed.append(len({request.adapter for request in launched.requests}))
        for request, logits in zip(launched.requests, launched.logits, strict=True):
            seen.append((request, len(request.prompt) + len(request.outputs) - 1, logits.clone()))
        return launched

    engine.runner.launch = watched
    requests = []
    for seed in range(16):
        ids, images = work(seed)
        params = SamplingParams(max_tokens=16, temperature=float(seed % 2), seed=seed)
        requests += engine.add(ids, params, images=images, adapter=NAMES[seed % 4])
    run(engine)
    assert max(mixed) >= 3, "requests of different adapters met"
    expected = {
        request: expected_logits(request.adapter, [*request.prompt, *request.outputs], request.images)
        for request in requests
    }
    assert len(seen) >= 16 * 16
    for request, place, logits in seen:
        torch.testing.assert_close(logits, expected[request][place], rtol=1e-5, atol=2e-5)
    if "cache_blocks" in settings:
        assert engine.scheduler.preemptions > 0


def test_prefix_caching_keeps_adapters_apart():
    engine, ids, outputs = core(), prompt(80, 1), {}
    for name in NAMES:
        [request] = engine.add(ids, SamplingParams(max_tokens=6), adapter=name)
        run(engine)
        assert request.cached_tokens == 0, "another adapter's keys and values were taken"
        outputs[name] = request.outputs
    assert len({tuple(tokens) for tokens in outputs.values()}) == 4
    for name in reversed(NAMES):
        requests = engine.add(ids, SamplingParams(max_tokens=6, n=2), adapter=name)
        run(engine)
        assert requests[0].cached_tokens == 64
        assert [request.outputs for request in requests] == [outputs[name]] * 2


def test_a_step_without_adapters_does_no_adapter_work(monkeypatch):
    def never(*_):
        raise AssertionError("an adapter was computed for requests that have none")

    engine = core()
    monkeypatch.setattr(ops, "multi_lora_linear_add", never)
    monkeypatch.setattr(ops, "multi_lora_expert_mlp", never)
    [request] = engine.add(prompt(40, 3), SamplingParams(max_tokens=5))
    run(engine)
    [other] = engine.add(prompt(40, 3), SamplingParams(max_tokens=5), adapter="attention")
    with pytest.raises(StepError, match="requests that have none"):
        run(engine)
    assert request.outputs and not other.outputs


def test_every_token_uses_its_own_adapter_only():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    parts = [lora(weight, rank, scaling, rank) for rank, scaling in ((2, 0.5), (7, 2.0), (1, 1.0))]
    stack = ops.stack_loras([(adapter_id, 0, part) for adapter_id, part in enumerate(parts, 1)], 30, weight)
    assert stack.a.shape == (16, 20), "ranks are filled up to a multiple of 8"
    x, adapter_ids = torch.randn(40, 20), torch.randint(0, 4, (40,), dtype=torch.int32)
    y = torch.randn(40, 30)
    got = ops.multi_lora_linear_add(y, x, stack, adapter_ids)
    for t, adapter_id in enumerate(adapter_ids.tolist()):
        expected = y[t].double()
        if adapter_id:
            a, b, scaling, _ = parts[adapter_id - 1]
            expected = expected + b.double() @ (a.double() @ x[t].double()) * scaling
        torch.testing.assert_close(got[t].double(), expected, rtol=1e-5, atol=1e-5)
    # An adapter that makes a token infinite affects no other request.
    stack.a[stack.adapter_ids == 3] = 3e38
    spoiled = ops.multi_lora_linear_add(y, x.abs() + 1, stack, adapter_ids)
    stack.a[stack.adapter_ids == 3] = 0.0
    got = ops.multi_lora_linear_add(y, x.abs() + 1, stack, adapter_ids)
    assert torch.equal(spoiled[adapter_ids != 3], got[adapter_ids != 3])
    assert not spoiled[adapter_ids == 3].isfinite().any()


@pytest.mark.parametrize("half", ["a", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_an_adapter_that_is_not_finite_is_rejected(half, value):
    weight = torch.randn(30, 20).half()
    bad = lora(weight, 2, 1.0, 0)
    getattr(bad, half)[0, 0] = value
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        ops.stack_loras([(1, 0, lora(weight, 2, 1.0, 1)), (2, 0, bad)], 30, weight)


def test_non_finite_values_of_a_request_do_not_reach_later_ones():
    """Finite weights may overflow, and the KV-cache blocks are reused."""
    wild = {f"{LAYERS}.0.self_attn.v_proj": LoRA(torch.full((2, 64), 1e30), torch.full((64, 2), 1e30), 1.0)}
    small = {"cache_blocks": 6, "max_model_len": 90}
    plain_core, engine = core(adapters=None, **small), core(adapters={"wild": wild}, **small)
    engine.add(prompt(80, 4), SamplingParams(max_tokens=6), adapter="wild")
    run(engine)
    for seed in (3, 5, 6):
        outputs = []
        for one in (plain_core, engine):
            [request] = one.add(prompt(33, seed), SamplingParams(max_tokens=6))
            run(one)
            outputs.append(request.outputs)
        assert outputs[0] == outputs[1]


def alone_with(name: str | None, seed: int) -> list[int]:
    """Answer of an engine that has this adapter from the start and no other request."""
    engine = core(adapters=None if name is None else {name: changes()[name]})
    [request] = engine.add(prompt(40, seed), SamplingParams(max_tokens=24), adapter=name)
    run(engine)
    return request.outputs


def test_adapters_are_loaded_and_unloaded_while_requests_run():
    engine, params = core(adapters={"experts": changes()["experts"]}), SamplingParams(max_tokens=24)
    base = engine.add(prompt(40, 1), params)[0]
    first = engine.add(prompt(40, 2), params, adapter="experts")[0]
    for _ in range(6):
        engine.step()
    engine.add_adapter("attention", changes()["attention"])
    second = engine.add(prompt(40, 3), params, adapter="attention")[0]
    for _ in range(6):
        engine.step()
    before = engine.adapters.nbytes
    engine.remove_adapter("experts")
    assert engine.adapters.names == ("attention",)
    with pytest.raises(ValueError, match="no adapter 'experts'; there are attention"):
        engine.add([30], adapter="experts")
    assert engine.adapters.nbytes == before, "one that is asked for is kept"
    assert 0 < len(first.outputs) < params.max_tokens
    while first in engine._unfinished:
        engine.step()
    assert engine.adapters.nbytes < before, "its memory is freed after its last request"
    run(engine)
    assert base.outputs == alone_with(None, 1)
    assert first.outputs == alone_with("experts", 2)
    assert second.outputs == alone_with("attention", 3)
    engine.remove_adapter("attention")
    assert engine.adapters.nbytes == 0 and engine.adapters.names == ()


def test_a_reused_name_shares_nothing_with_its_predecessor():
    engine, params, ids = core(adapters=None), SamplingParams(max_tokens=6), prompt(80, 1)
    outputs = {}
    for name in ("experts", "attention"):
        engine.add_adapter("mine", changes()[name])
        [request] = engine.add(ids, params, adapter="mine")
        run(engine)
        assert request.cached_tokens == 0, "keys and values of the adapter before were taken"
        outputs[name] = request.outputs
        [again] = engine.add(ids, params, adapter="mine")
        run(engine)
        assert again.cached_tokens == 64 and again.outputs == request.outputs
    for name, expected in outputs.items():
        engine_alone = core(adapters={name: changes()[name]})
        [request] = engine_alone.add(ids, params, adapter=name)
        run(engine_alone)
        assert request.outputs == expected


def test_replacing_an_adapter_does_not_affect_running_requests():
    engine, params = core(adapters={"mine": changes()["experts"]}), SamplingParams(max_tokens=24)
    [old] = engine.add(prompt(40, 2), params, adapter="mine")
    for _ in range(6):
        engine.step()
    engine.add_adapter("mine", changes()["attention"])
    [new] = engine.add(prompt(40, 3), params, adapter="mine")
    run(engine)
    assert old.outputs == alone_with("experts", 2)
    assert new.outputs == alone_with("attention", 3)


def test_an_adapter_that_cannot_be_loaded_changes_nothing(monkeypatch):
    engine = core(adapters={"experts": changes()["experts"]})
    size = engine.adapters.nbytes
    bad = {f"{LAYERS}.7.self_attn.o_proj": lora(torch.empty(64, 64), 2, 1.0, 0)}
    for name, one, message in (("bad", bad, "no linear"), ("", changes()["ends"], "no name"), ("none", {}, "nothing")):
        with pytest.raises(ValueError, match=message):
            engine.add_adapter(name, one)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "stack_loras", full)
        with pytest.raises(ValueError, match="'ends' does not fit into the memory that is left"):
            engine.add_adapter("ends", changes()["ends"])
    with pytest.raises(ValueError, match="no adapter 'ends'; there are experts"):
        engine.remove_adapter("ends")
    assert engine.adapters.names == ("experts",) and engine.adapters.nbytes == size
    [request] = engine.add(prompt(40, 2), SamplingParams(max_tokens=24), adapter="experts")
    run(engine)
    assert request.outputs == alone_with("experts", 2)


def test_adapters_that_do_not_fit_are_rejected_by_name():
    with pytest.raises(ValueError, match="no adapter 'other'; there are experts, attention, ends"):
        core().add([30], adapter="other")
    with pytest.raises(ValueError, match="no adapter 'other'; the engine has none"):
        core(adapters=None).add([30], adapter="other")
    good = lora(torch.empty(64, 64), 2, 1.0, 0)
    for wrong, message in (
        ({"": {f"{LAYERS}.0.self_attn.o_proj": good}}, "no name"),
        ({"a": {}}, "'a' changes nothing"),
        ({"a": {f"{LAYERS}.7.self_attn.o_proj": good}}, "layers.7.self_attn.o_proj', which is no linear"),
        ({"a": {f"{LAYERS}.0.mlp.router": good}}, "mlp.router', which is no linear"),
        ({"a": {"language_model.lm_head": good}}, r"expected \(R, 64\) and \(120, R\)"),
        ({"a": {EXPERTS[0]: good}}, r"expected \(8, 64, R\) and \(8, R, 64\)"),
        ({"a": {"vision_tower.nothing": good}}, "'a' does not fit the model"),
        ({"a": {"multi_modal_projector.feed_forward.linear_in": good}}, r"expected \(2, 48\) and \(64, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            core(adapters=wrong)


def image(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (80, 120, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def asked(text: str, *images: Image.Image) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


QUESTIONS = [asked("what is shown", image(0)), asked("hello"), asked("red circle", image(1), image(0))]
# Of a trained adapter's kinds: everything but vision, vision and projector too, and experts alone.
TRAINED = {
    "decoder": Targets(rank=4, alpha=8.0),
    "eyes": Targets(rank=3, alpha=6.0, freeze_vit=False, freeze_projector=False),
    "experts": Targets(rank=8, alpha=4.0, rslora=True, modules=("experts.fc1", "experts.fc2")),
}


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """Adapter folders as training leaves them, and the merged model of each."""
    made = {}
    for name, targets in TRAINED.items():
        torch.manual_seed(len(name))
        trained = load_model(model_folder)
        apply(trained, targets)
        for adapter in attached(trained).values():
            torch.nn.init.normal_(adapter.b, std=0.2)
        folder = tmp_path_factory.mktemp(name)
        save_adapter(trained, folder)
        made[name] = folder, {module: adapter.lora() for module, adapter in attached(trained.eval()).items()}
    return made


@pytest.fixture(scope="module")
def engine(model_folder, folders):
    return Engine(model_folder, device="cpu", adapters={name: folder for name, (folder, _) in folders.items()})


def test_a_missing_adapter_is_reported_before_weights_are_read(model_folder, folders, monkeypatch, tmp_path):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("aria.engine.engine.load_model", read)
    there = folders[next(iter(TRAINED))][0]
    with pytest.raises(FileNotFoundError, match="no-such-adapter"):
        Engine(model_folder, device="cpu", adapters={"there": there, "gone": tmp_path / "no-such-adapter"})


def alone(model_folder, change, params) -> list[str]:
    """Answers of an engine whose model has the adapter merged."""
    other = Engine(model_folder, device="cpu")
    for module, one in change.items():
        weight = other.model.get_parameter(f"{module}.weight")
        weight.data = merged(weight.data, one)
    return [other.chat([question], params)[0].token_ids for question in QUESTIONS]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_adapter_folders_answer_as_merged_models(engine, folders, model_folder, sampled):
    params = SamplingParams(max_tokens=10, **sampled)
    names = [None, *TRAINED]
    answers = {
        name: [engine.queue(engine.prepare(question), params, adapter=name) for question in QUESTIONS] for name in names
    }
    while engine.core.unfinished:
        engine.step()
    outputs = {name: [answer.result().token_ids for answer in answers[name]] for name in names}
    assert len({str(tokens) for tokens in outputs.values()}) == 4, "every adapter changes the answers"
    for name in names:
        assert outputs[name] == alone(model_folder, folders[name][1] if name else {}, params)


def test_adapters_share_base_weights_but_not_image_tokens(engine, folders):
    twins = engine.core.adapters.encoding
    assert set(twins) == {None, "eyes"}, "only an adapter that changes them has a vision tower and projector"
    ours, own = (dict(twins[name].named_parameters()) for name in (None, "eyes"))
    assert all(own[name] is parameter for name, parameter in ours.items()), "weights are shared"
    assert len(own) > len(ours)
    assert not engine.model.vision_tower.has_lora and twins["eyes"].vision_tower.has_lora
    sizes = [sum(x.nbytes for one in change.values() for x in (one.a, one.b)) for _, change in folders.values()]
    assert sum(sizes) <= engine.core.adapters.nbytes < 2.5 * sum(sizes)
    cache = engine.core.runner.encoder.cache
    params = SamplingParams(max_tokens=1)
    question = asked("another", image(5))
    engine.chat([question], params)
    before = cache.misses
    engine.chat([question], params, adapter="decoder")
    assert cache.misses == before, "an adapter that does not change images takes the model's"
    engine.chat([question], params, adapter="eyes")
    assert cache.misses == before + 1


def test_structured_output_works_with_every_adapter(engine):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    params = SamplingParams(max_tokens=40, json_schema={**schema, "additionalProperties": False})
    answers = [engine.queue(engine.prepare(QUESTIONS[1]), params, adapter=name) for name in (None, *TRAINED)]
    while engine.core.unfinished:
        engine.step()
    assert {answer.result().text.replace(" ", "") for answer in answers} <= {'{"a":"x"}', '{"a":"y"}'}


def test_engine_and_async_engine_take_adapter_names(engine):
    assert engine.adapters == ("decoder", "eyes", "experts")
    params = SamplingParams(max_tokens=8)
    [expected] = engine.chat([QUESTIONS[1]], params, adapter="decoder")
    assert "".join(engine.stream(QUESTIONS[1], params, adapter="decoder")) == expected.text
    assert engine.chat([QUESTIONS[1]], params)[0].token_ids != expected.token_ids
    with pytest.raises(ValueError, match="no adapter 'none'; there are decoder, eyes, experts"):
        engine.chat([QUESTIONS[1]], params, adapter="none")
    assert not engine.core.unfinished
