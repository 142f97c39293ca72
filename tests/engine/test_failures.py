"""Failed steps: which requests fail, which continue, and what is released."""

from __future__ import annotations

import weakref

import pytest
import torch

from aria import AriaForConditionalGeneration
from aria.engine import SamplingParams
from aria.engine.failures import StepError, free_frames, out_of_memory
from aria.engine.request import Status
from aria.engine.runner import Launched
from aria.engine.sampler import SamplerState
from aria.model import Aria
from aria.model.decoder import Decoder
from aria.processor.image_inputs import ImageSpan
from tests.helpers.tiny_core import IMAGE, core, model, prompt, with_image

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [prompt(30 + 7 * i, i) for i in range(6)]


def answers(engine, requests) -> dict[int, list[int] | Exception]:
    """Serve all requests, and return the outputs or the error of each by index."""
    failed: dict[int, Exception] = {}
    while engine.busy:
        try:
            engine.step()
        except StepError as error:
            failed |= {requests.index(request): reason for request, reason in error.failed.items()}
        engine.scheduler.check()
    assert engine.pool.used == 0
    assert all((requests[i].status is Status.FAILED) == (i in failed) for i in range(len(requests)))
    return {i: failed.get(i, request.outputs) for i, request in enumerate(requests)}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    engine = core()
    requests = [engine.add(one, PARAMS)[0] for one in PROMPTS]
    return list(answers(engine, requests).values())


def queue(**settings):
    """An engine after three steps, with two running requests and four waiting ones."""
    engine = core(max_batch=2, **settings)
    requests = [engine.add(one, PARAMS)[0] for one in PROMPTS]
    for _ in range(3):
        engine.step()
    assert [request.status for request in requests] == [Status.RUNNING] * 2 + [Status.WAITING] * 4
    return engine, requests


class Fails:
    """Makes a method fail in its next call or calls."""

    def __init__(self, monkeypatch, owner: object, name: str, error: Exception, *, times: int = 1, after: bool = False):
        self.calls, method = 0, getattr(owner, name)

        def failing(*args, **kwargs):
            self.calls += 1
            result = method(*args, **kwargs) if after or self.calls > times else None
            if self.calls <= times:
                raise error
            return result

        monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("part", ["launch", "wait"])
def test_a_failing_step_fails_only_its_requests(part, ahead, expected, monkeypatch, caplog):
    engine, requests = queue()
    engine.ahead = ahead
    engine.step()
    owner = {"launch": engine.runner, "wait": Launched}[part]
    Fails(monkeypatch, owner, part, ValueError("a fault"))
    with pytest.raises(StepError, match="a step of the model failed: a fault") as caught:
        engine.step()
    assert list(caught.value.failed) == requests[:2] and engine.failing
    # The step before is not lost where the device computes ahead.
    assert len(caught.value.tokens) == (2 if ahead and part == "launch" else 0)
    assert [request.status for request in requests] == [Status.FAILED] * 2 + [Status.WAITING] * 4
    engine.scheduler.check()
    assert "ValueError: a fault" in caplog.text
    later = answers(engine, requests[2:])
    assert list(later.values()) == expected[2:] and not engine.failing


def test_running_requests_outside_the_failed_step_are_computed_again(expected, monkeypatch):
    engine = core(step_tokens=32, mixed_step_tokens=16)
    reading, other = (engine.add(PROMPTS[i], PARAMS)[0] for i in (5, 4))
    while not reading.outputs:
        engine.step()
    assert other.prefilling and other.computed
    # A step that computes the first alone, while the other is in the middle of its prompt.
    plan = engine.scheduler._plan_chunks
    monkeypatch.setattr(engine.scheduler, "_plan_chunks", lambda _: None)
    Fails(monkeypatch, engine.runner, "launch", ValueError("a fault"))
    with pytest.raises(StepError) as caught:
        engine.step()
    monkeypatch.setattr(engine.scheduler, "_plan_chunks", plan)
    assert list(caught.value.failed) == [reading]
    assert other.status is Status.WAITING and engine.stats().preemptions == 1
    assert answers(engine, [other]) == {0: expected[4]}


@pytest.mark.parametrize("when", ["before", "midway"])
def test_a_failing_plan_fails_all_requests_and_later_ones_run(when, expected, monkeypatch):
    engine, requests = queue()
    Fails(
        monkeypatch, engine.scheduler, {"before": "plan", "midway": "_publish"}[when], IndexError("inconsistent blocks")
    )
    with pytest.raises(StepError, match="inconsistent blocks") as caught:
        engine.step()
        engine.step()
    # What is read back belongs to a step that is known.
    assert set(caught.value.failed) == set(requests[:2] if when == "midway" else requests)
    assert engine.pool.free == engine.pool.total
    engine.scheduler.check()
    [again] = engine.add(PROMPTS[0], PARAMS)
    assert answers(engine, [*requests[2:], again] if when == "midway" else [again])
    assert again.outputs == expected[0]


class Anything:
    """A grammar that allows every token."""

    error = None

    def fill(self, mask_W) -> None:
        mask_W.fill(-1)

    def accept(self, token: int) -> None:
        return None


KINDS = [
    SamplingParams(max_tokens=7, ignore_eos=True, temperature=0.9, seed=1),
    SamplingParams(max_tokens=7, ignore_eos=True, frequency_penalty=1.5, repetition_penalty=1.3),
    SamplingParams(max_tokens=7, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=7, temperature=0.9, seed=2, json_schema=True),
]


def tokens_of_kinds(count: int, ahead: bool, before_step=lambda step: None) -> list[list[int]]:
    """Answers of so many kinds, by steps of prompts alone, beside answers, and of answers alone."""
    engine = core(max_batch=3)
    engine.ahead = ahead
    requests = [
        engine.add(one, params, matchers=[Anything()] if params.json_schema else ())[0]
        for one, params in zip(PROMPTS, KINDS[:count], strict=False)
    ]
    for step in range(100):
        before_step(step)
        engine.step()
        engine.scheduler.check()
        if not engine.busy:
            break
    assert not engine.busy and not engine.failing and engine.stats().preemptions == 0
    return [request.outputs for request in requests]


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[list[int]]]:
    return {count: tokens_of_kinds(count, False) for count in (3, 4)}


@pytest.mark.parametrize(("count", "ahead"), [(3, False), (3, True), (4, True)])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(Decoder, "forward", False), (SamplerState, "sample", True), (SamplerState, "count", True)],
    ids=["model", "drawn", "counted"],
)
def test_a_step_that_runs_out_of_memory_is_retried(owner, name, after, count, ahead, undisturbed, monkeypatch):
    failing: list[Fails] = []

    def fail_every_second(step: int) -> None:
        if step % 2 == 0:
            error = torch.OutOfMemoryError("CUDA out of memory")
            failing.append(Fails(monkeypatch, owner, name, error, after=after))

    assert tokens_of_kinds(count, ahead, fail_every_second) == undisturbed[count]
    assert sum(one.calls > 1 for one in failing) > 2


def test_a_step_that_runs_out_of_memory_twice_fails_the_requests_of_its_half(expected, monkeypatch):
    engine, requests = queue()
    Fails(monkeypatch, Decoder, "forward", torch.OutOfMemoryError("CUDA out of memory"), times=2)
    with pytest.raises(StepError, match="CUDA out of memory") as caught:
        engine.step()
    assert list(caught.value.failed) == requests[:1]
    later = answers(engine, requests[1:])
    assert list(later.values()) == expected[1:]


def test_generate_raises_the_error_of_the_model(monkeypatch):
    ours = AriaForConditionalGeneration(model())
    ids = torch.tensor([PROMPTS[0]])
    expected = ours.generate(ids, max_new_tokens=4, eos_token_id=None)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        Fails(patch, Decoder, "forward", torch.OutOfMemoryError("CUDA out of memory"), times=2)
        ours.generate(ids, max_new_tokens=4, eos_token_id=None)
    Fails(monkeypatch, Decoder, "forward", torch.OutOfMemoryError("CUDA out of memory"))
    assert torch.equal(ours.generate(ids, max_new_tokens=4, eos_token_id=None), expected)


def test_tensors_of_a_failed_step_are_freed(monkeypatch):
    engine, _ = queue()
    tensors: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []

    def failing(self, x_TD, context, **settings):
        seen.extend(one() is not None for one in tensors)
        large = torch.empty(100, 100)
        tensors.extend((weakref.ref(x_TD), weakref.ref(large)))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            raise ValueError("something else, for want of memory") from error

    monkeypatch.setattr(Aria, "decode", failing)
    with pytest.raises(StepError) as caught:
        engine.step()
    assert len(tensors) == 4 and seen == [False, False], "the second try finds nothing of the first"
    assert caught.value.__cause__ is not None and not any(one() is not None for one in tensors)


def test_out_of_memory_errors_are_recognised():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not out_of_memory(ValueError("shapes"))
    capture = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    capture.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    capture.__context__.__context__ = capture
    assert out_of_memory(capture)
    free_frames(capture)


def test_an_image_that_cannot_be_encoded_fails_only_its_requests(expected, monkeypatch):
    good, [image] = with_image(20, 40, 6, 1)
    engine = core()
    features = engine.runner.encoder.features
    broken = {image.key}

    def encode(images, adapter=None):
        if any(one.key in broken for one in images):
            raise RuntimeError("a broken image")
        return features(images, adapter)

    monkeypatch.setattr(engine.runner.encoder, "features", encode)
    ids, [other] = with_image(20, 40, 6, 2)
    # The first and the last have the broken one, and begin as the second does.
    begins = [*good[:20], *[IMAGE] * 40]
    requests = [
        engine.add(good, PARAMS, images=[image])[0],
        engine.add([*good[:20], *PROMPTS[1]], PARAMS)[0],
        engine.add(ids, PARAMS, images=[other])[0],
        engine.add(PROMPTS[0], PARAMS)[0],
        engine.add([*begins, *PROMPTS[2]], PARAMS, images=[image])[0],
    ]
    became = answers(engine, requests)
    assert [i for i, one in became.items() if isinstance(one, Exception)] == [0, 4]
    assert str(became[0]) == "an image could not be encoded: a broken image" and not engine.failing
    assert became[3] == expected[0] and engine.stats().preemptions == 0

    broken.clear()
    again = [
        engine.add(good, PARAMS, images=[image])[0],
        engine.add([*good[:20], *PROMPTS[1]], PARAMS)[0],
        engine.add(ids, PARAMS, images=[other])[0],
    ]
    monkeypatch.setattr(engine.runner.encoder, "features", features)
    fresh = core()
    alone = [
        fresh.add(request.prompt, PARAMS, images=request.images)[0]
        for request in again
    ]  # fmt: skip
    assert list(answers(engine, again).values()) == list(answers(fresh, alone).values()), "nothing wrong was kept"
    assert became[1] == again[1].outputs and became[2] == again[2].outputs
    assert again[0].cached_tokens == 16, "the text before the image was right"


def test_requests_that_share_wrong_blocks_fail_together():
    engine = core(step_tokens=256)
    ids, images = with_image(4, 40, 20, 1)
    requests = engine.add(ids, SamplingParams(max_tokens=4, n=3), images=images)
    other = engine.add(prompt(40, 3), SamplingParams(max_tokens=4))
    engine.scheduler.plan()
    assert requests[2].blocks[:3] == requests[0].blocks[:3]
    assert engine.scheduler.fail(requests[0], 4) == requests
    engine.scheduler.check()
    assert other[0].status is Status.RUNNING
    names = requests[0].block_hashes(16)
    assert engine.pool.peek(names) == (0, 0)


def test_images_that_do_not_fit_together_are_encoded_one_by_one(monkeypatch):
    def tokens(most: int) -> list[list[int]]:
        engine = core()
        features = engine.runner.encoder.features

        def encode(images: list[ImageSpan], adapter=None):
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return features(images, adapter)

        monkeypatch.setattr(engine.runner.encoder, "features", encode)
        requests = []
        for seed in (1, 2):
            ids, images = with_image(5, 10, 4, seed)
            requests += engine.add(ids, PARAMS, images=images)
        return list(answers(engine, requests).values())

    assert tokens(1) == tokens(2)
