"""`Engine` on a tiny random model with a vocabulary in which the end of a turn is several tokens, as in Aria."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image

from aria import AriaForConditionalGeneration, Engine, SamplingParams
from aria.engine.outputs import Completion
from aria.engine.warm_up import WarmUp
from tests.helpers.conversations import CONVERSATIONS, asked, image
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine(model_folder, device="cpu")


def test_answers_do_not_depend_on_the_batch(engine):
    for params in (SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=1.2, seed=5)):
        together = engine.chat(CONVERSATIONS, params)
        alone = [engine.chat([conversation], params)[0] for conversation in CONVERSATIONS]
        assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_results_are_in_order_for_more_conversations_than_a_batch(model_folder):
    engine = Engine(model_folder, device="cpu", max_batch=2)
    params = SamplingParams(max_tokens=5)
    results = engine.chat([*CONVERSATIONS, *CONVERSATIONS[::-1]], params)
    texts = [result.text for result in results]
    assert texts[:3] == texts[:2:-1]
    assert len(set(texts)) == 3


def test_chat_equals_generate(engine, model_folder):
    model = AriaForConditionalGeneration.from_pretrained(model_folder, device="cpu")
    inputs = engine.processor.apply_chat_template(
        CONVERSATIONS[2], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :].tolist()
    result = engine.chat([CONVERSATIONS[2]], SamplingParams(max_tokens=12))[0]
    assert list(result.token_ids) == expected[: len(result.token_ids)]
    assert result.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert result.usage.completion_tokens == len(result.token_ids)


def test_streamed_text_is_the_answer(engine):
    params = SamplingParams(max_tokens=30, temperature=1.5, seed=3)
    pieces = list(engine.stream(CONVERSATIONS[0], params))
    assert len(pieces) > 1
    assert "".join(pieces) == engine.chat([CONVERSATIONS[0]], params)[0].text


def test_several_answers(engine):
    result = engine.chat([CONVERSATIONS[0]], SamplingParams(max_tokens=10, temperature=1.5, seed=3, n=3))[0]
    assert len({choice.token_ids for choice in result.choices}) == 3
    assert result.text == result.choices[0].text
    single = engine.chat([CONVERSATIONS[0]], SamplingParams(max_tokens=10, temperature=1.5, seed=3))[0]
    assert single.token_ids == result.choices[0].token_ids


def test_logprobs_match_the_logits(engine):
    result = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=4, logprobs=3))[0]
    prompt = engine.processor.tokenizer.encode(
        engine.processor.apply_chat_template(CONVERSATIONS[1], add_generation_prompt=True)
    )
    model = AriaForConditionalGeneration(engine.model)
    ids = torch.tensor([[*prompt, *result.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logits[:, 9] = float("-inf")
    expected = logits.log_softmax(-1)
    for place, (token, entry) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        assert entry.token_id == token
        assert abs(entry.logprob - expected[place, token].item()) < 1e-4
        assert [top.token_id for top in entry.top] == expected[place].topk(3).indices.tolist()


def test_a_stop_text_of_several_tokens_ends_the_answer_and_is_not_in_it(engine):
    free = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=24))[0]
    stop = free.text[6:9]
    assert len(stop) == 3, "the free answer is too short to cut"
    cut = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=24, stop=[stop]))[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert free.finish_reason == "length"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert "".join(engine.stream(CONVERSATIONS[1], SamplingParams(max_tokens=24, stop=stop))) == cut.text


def test_generate_matches_stop_strings_on_text(engine, model_folder):
    model = AriaForConditionalGeneration.from_pretrained(model_folder, device="cpu")
    tokenizer = engine.processor.tokenizer
    inputs = tokenizer("hello world what is", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=24, eos_token_id=None)[0, length:].tolist()
    text = tokenizer.decode(free)
    stop = text[7:10]
    got = model.generate(**inputs, max_new_tokens=24, eos_token_id=None, stop_strings=stop, tokenizer=tokenizer)
    kept = got[0, length:].tolist()
    assert kept == free[: len(kept)]
    assert stop in tokenizer.decode(kept)
    assert stop not in tokenizer.decode(kept[:-1])


def test_end_of_turn_is_found_across_tokens_and_in_merged_ones(engine):
    tokenizer = engine.processor.tokenizer
    ids = tokenizer.encode("red circle.<|im_end|><|im_start|>user")
    assert len(tokenizer.encode("<|im_end|>")) > 1, "this vocabulary should spell the end of a turn in several tokens"
    completion = Completion(100, {2}, tokenizer, ("<|im_end|>",))
    pieces = []
    for index in ids:
        pieces.append(completion.push(index))
        if completion.finish_reason:
            break
    assert completion.text == "".join(pieces) == "red circle."
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < len(ids)


def test_end_of_text_token_ends_an_answer(engine):
    tokenizer = engine.processor.tokenizer
    completion = Completion(100, {2}, tokenizer, ("<|im_end|>",))
    for index in [*tokenizer.encode("hi <|im"), 2]:
        completion.push(index)
    assert completion.text == "hi <|im"
    assert completion.finish_reason == "stop"


def test_typed_image_token_is_text(engine):
    plain = engine.chat([asked("what is <|img|> here")], SamplingParams(max_tokens=4))[0]
    shown = engine.chat([asked("what is <|img|> here", image(0))], SamplingParams(max_tokens=4))[0]
    assert plain.usage.prompt_tokens < 128 < shown.usage.prompt_tokens < 128 + 60


def test_max_tokens_does_not_depend_on_other_requests(model_folder):
    engine = Engine(model_folder, device="cpu", max_model_len=60)
    params = SamplingParams(max_tokens=30)
    short, long = asked("hello"), asked("hello world what is shown in this picture please describe it")
    alone = engine.chat([short], params)[0]
    together = engine.chat([short, long], params)
    assert together[0] == alone
    assert len(together[1].token_ids) < len(alone.token_ids) == 30
    assert together[1].finish_reason == "length"


def test_a_config_makes_random_weights():
    engine = Engine(tiny_config(vocab_size=500), device="cpu")
    result = engine.chat([asked("hello", image(0))], SamplingParams(max_tokens=3))[0]
    assert result.usage.prompt_tokens > 256, "the larger size is the default"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_model_len": 0}, "max_model_len is 0; expected 1 to 4096"),
        ({"max_model_len": 5000}, "max_model_len is 5000"),
        ({"quantization": "int4"}, "quantization='int4' is not supported yet"),
        ({"memory_utilization": 1.5}, "memory_utilization is 1.5; expected above 0"),
        ({"cache_tokens": 0}, "cache_tokens is 0; expected at least 1"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine"),
    ],
)
def test_invalid_settings_are_rejected(model_folder, setting, message):
    with pytest.raises(ValueError, match=message):
        Engine(model_folder, **({"device": "cpu"} | setting))


def test_error_messages(engine, model_folder):
    with pytest.raises(ValueError, match="wrap this one in a list"):
        engine.chat(CONVERSATIONS[0])
    with pytest.raises(ValueError, match="leaves no room"):
        Engine(model_folder, device="cpu", max_model_len=100).chat([CONVERSATIONS[0]])
    with pytest.raises(TypeError, match="tensor_parallel"):
        Engine(model_folder, tensor_parallel=2)


def test_too_many_images_are_rejected_before_anything_is_queued(model_folder):
    engine = Engine(model_folder, device="cpu", max_model_len=600)
    crowd = asked("look", *(image(seed) for seed in range(5)))
    with pytest.raises(ValueError, match=r"length is 600 tokens.*for images.*use fewer or smaller images"):
        engine.chat([CONVERSATIONS[1], crowd])
    assert not engine.core.busy


def test_a_prompt_of_the_context_length_is_rejected(model_folder):
    engine = Engine(model_folder, device="cpu", max_model_len=100)
    with pytest.raises(ValueError, match=r"length is 100 tokens .max_model_len.*leaves no room.*shorten it"):
        engine.chat([asked("hello " * 200)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; expected a whole number, 0 or more"),
        ({"temperature": -0.5}, "temperature is -0.5; expected a number from 0 to 2"),
        ({"temprature": 0.5, "beam": 3}, "unknown sampling fields: beam, temprature; expected some of max_tokens"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
    ],
)
def test_invalid_sampling_parameters_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_a_bias_outside_the_vocabulary_is_rejected(engine):
    with pytest.raises(ValueError, match="logit_bias names token 99999, but the vocabulary ends at"):
        engine.chat([asked("hello")], SamplingParams(logit_bias={99999: 1.0}))
    assert not engine.core.busy


def test_a_bias_forces_a_token_and_penalties_change_text(engine):
    plain = engine.chat([asked("hello")], SamplingParams(max_tokens=12))[0]
    forced = engine.chat([asked("hello")], SamplingParams(max_tokens=12, logit_bias={40: 100}, ignore_eos=True))[0]
    assert set(forced.token_ids) == {40}
    varied = engine.chat([asked("hello")], SamplingParams(max_tokens=12, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(varied[0].token_ids)) >= len(set(plain.token_ids))


def test_streams_read_in_turn_and_closed_early(engine):
    params = SamplingParams(max_tokens=12)
    expected = [result.text for result in engine.chat(CONVERSATIONS, params)]
    streams = [engine.stream(conversation, params) for conversation in CONVERSATIONS]
    texts = ["", "", ""]
    growing = {0, 1, 2}
    while growing:
        for i in list(growing):
            piece = next(streams[i], None)
            if piece is None:
                growing.discard(i)
            else:
                texts[i] += piece
    assert texts == expected
    stream = engine.stream(asked("hello"), SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert not engine.core.unfinished
    assert engine.core.pool.used == 0


def test_a_stream_that_was_never_read_is_cancelled_by_closing_it(engine):
    engine.stream(asked("hello"), SamplingParams(max_tokens=500)).close()
    engine.stream(asked("hello"), SamplingParams(max_tokens=500))  # forgotten at once
    gc.collect()
    assert not engine.core.unfinished


def test_a_failing_step_fails_the_streams_that_it_computed(engine, monkeypatch):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = "".join(engine.stream(asked("later"), params))
    first, second = (engine.stream(asked(text), params) for text in ("hello", "red"))
    next(first)
    third: list[Iterator[str]] = []

    def failing(plan):
        # Queued while the step runs.
        third.append(engine.stream(asked("later"), params))
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a step of the model failed: a fault"):
        patch.setattr(engine.core.runner, "launch", failing)
        list(first)
    with pytest.raises(RuntimeError, match="a step of the model failed: a fault"):
        list(second)
    assert "".join(third[0]) == expected


def test_chat_raises_the_failure_and_releases_everything(engine, monkeypatch):
    def failing(plan):
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a step of the model failed: a fault"):
        patch.setattr(engine.core.runner, "launch", failing)
        engine.chat(CONVERSATIONS, SamplingParams(max_tokens=3))
    assert not engine.core.busy
    assert engine.chat([asked("hello")], SamplingParams(max_tokens=3))[0].usage.completion_tokens == 3


def test_an_answer_that_cannot_be_detokenized_fails_alone(engine, monkeypatch):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prepared = [engine.prepare(messages) for messages in CONVERSATIONS]
    expected = [result.text for result in engine.chat(CONVERSATIONS, params)]
    answers = [engine.queue(one, params) for one in prepared]
    push = Completion.push

    def failing(completion, *args):
        if completion is answers[1].completions[0] and len(completion.token_ids) == 3:
            raise ValueError("no such text")
        return push(completion, *args)

    monkeypatch.setattr(Completion, "push", failing)
    while not all(answer.done for answer in answers):
        engine.step()
    with pytest.raises(RuntimeError, match="could not be continued: no such text"):
        answers[1].result()
    assert [answers[i].result().text for i in (0, 2)] == [expected[0], expected[2]]
    assert not engine.core.busy and engine.core.pool.used == 0


@pytest.mark.slow
def test_warm_up_leaves_the_caches_empty(model_folder):
    engine = Engine(model_folder, device="cpu", max_batch=3, max_model_len=600)
    engine.warm_up()
    assert engine.stats().completion_tokens == 0, "the CPU has nothing to compile"
    warm_up = WarmUp(engine.core)
    warm_up.decode()
    assert engine.stats().completion_tokens == 3 * 4 * (1 + 2 + 3)
    for images in engine._sample_images():
        warm_up.encode(images)
    assert engine.core.runner.encoder.cache.nbytes > 0
    warm_up.run([])
    assert not engine.core.busy and engine.core.pool.free == engine.core.pool.total
    assert engine.core.runner.encoder.cache.nbytes == 0


def test_an_image_is_encoded_once(model_folder, monkeypatch):
    engine = Engine(model_folder, device="cpu")
    seen = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda patches: seen.append(1) or encode(patches))
    for text in ("what is shown", "red circle", "hello"):
        engine.chat([asked(text, image(0))], SamplingParams(max_tokens=2))
    assert len(seen) == 1
    assert engine.core.runner.encoder.cache.nbytes > 0


def test_only_uncached_images_count_in_the_patch_budget(model_folder):
    engine = Engine(model_folder, device="cpu")
    half = Image.effect_noise((490, 245), 60).convert("RGB")
    prepared = engine.prepare([{"role": "user", "content": [{"type": "image", "image": half}]}])
    [request] = engine.queue(prepared, SamplingParams(max_tokens=1)).requests
    [image] = request.images
    # 490 x 336 pixels are real, in patches of 14.
    assert image.patches == 35 * 24
    encoder = engine.core.runner.encoder
    assert not encoder.holds(image, None)
    while engine.core.busy:
        engine.step()
    assert encoder.holds(image, None) and encoder.holds(image, "an adapter that leaves images as they are")


def test_digests_depend_on_prompt_and_block_size(engine):
    prepared = engine.prepare(asked("hello " * 30, image(0)))
    assert len(prepared.digests[16]) == len(prepared.ids) // 16
    [request] = engine.queue(prepared, SamplingParams(max_tokens=1)).requests
    assert list(request.block_hashes(16)) == prepared.digests[16]
    changed = replace(prepared, ids=[50, *prepared.ids[1:]])
    assert not changed.digests, "another prompt's would give its answers"
    assert not set(engine.digest(changed).digests[16]) & set(prepared.digests[16])
    prepared.digests.clear()
    prepared.digests[64] = [b"of larger blocks"]
    [again] = engine.queue(prepared, SamplingParams(max_tokens=1)).requests
    assert list(again.block_hashes(16)) == list(request.block_hashes(16))
    engine.core.reset()


def test_only_the_end_of_a_repeated_prompt_is_computed(engine):
    messages = asked("hello " * 30)
    engine.chat([messages], SamplingParams(max_tokens=3))
    before = engine.core.scheduler.prefix_tokens
    engine.chat([messages], SamplingParams(max_tokens=3))
    tokens = len(engine.prepare(messages).ids)
    assert engine.core.scheduler.prefix_tokens - before == (tokens - 1) // 16 * 16


def test_an_answer_does_not_end_before_min_tokens(engine):
    forced = {"temperature": 0.0, "max_tokens": 12, "logit_bias": {2: 100.0}}
    for params in (SamplingParams(**forced, min_tokens=5), SamplingParams(**forced, min_tokens=5, n=2)):
        for choice in engine.chat([CONVERSATIONS[1]], params)[0].choices:
            assert choice.token_ids[5:] == (2,) and 2 not in choice.token_ids[:5]
            assert choice.finish_reason == "stop"
    never = engine.chat([CONVERSATIONS[1]], SamplingParams(**forced, min_tokens=12))[0]
    assert never.finish_reason == "length" and len(never.token_ids) == 12 and 2 not in never.token_ids
    free = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=12))[0].text
    late = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=12, stop=free[1], min_tokens=8))[0]
    assert len(late.token_ids) >= 9 and late.text.startswith(free[:2])


def test_the_end_of_a_turn_is_not_generated_before_min_tokens(engine):
    begins = engine.processor.tokenizer.encode("<|im_end|>")[0]
    biased = {"logit_bias": {begins: 80.0}, "max_tokens": 10}
    free = engine.chat([CONVERSATIONS[1]], SamplingParams(**biased, ignore_eos=True, min_tokens=10))[0]
    assert free.token_ids == (begins,) * 10 and free.text.startswith("<|")
    held = engine.chat([CONVERSATIONS[1]], SamplingParams(**biased, min_tokens=6))[0]
    assert "<|" not in engine.processor.tokenizer.decode(held.token_ids[:6])
    assert held.token_ids[6:] == (begins,) * 4


def test_stop_tokens_end_an_answer(engine):
    [free] = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=12))
    at = 4
    stop = free.token_ids[at]
    first = free.token_ids.index(stop)
    before, text = (engine.processor.tokenizer.decode(free.token_ids[:end]) for end in (first, first + 1))
    for fields, expected in (
        ({}, before),
        ({"ignore_eos": True}, before),
        ({"include_stop_str_in_output": True}, text),
        ({"min_tokens": 12}, None),
    ):
        [cut] = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=12, stop_token_ids=[stop], **fields))
        if expected is None:
            assert stop not in cut.token_ids and cut.finish_reason == "length"
        else:
            assert cut.token_ids == free.token_ids[: first + 1] and cut.text == expected
            assert cut.finish_reason == "stop"
    with pytest.raises(ValueError, match="stop_token_ids names token 90000, but the vocabulary ends at"):
        engine.chat([CONVERSATIONS[1]], SamplingParams(stop_token_ids=[90_000]))


def test_special_tokens_and_stop_texts_are_kept_on_request(engine):
    forced = {"max_tokens": 4, "logit_bias": {2: 100.0}, "temperature": 0.0}
    end = engine.processor.tokenizer.decode([2])
    texts = [
        engine.chat([CONVERSATIONS[1]], SamplingParams(**forced, **fields))[0].text
        for fields in (
            {},
            {"skip_special_tokens": False},
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            {"skip_special_tokens": False, "ignore_eos": True},
            {"ignore_eos": True},
        )
    ]
    assert texts == ["", "", end, end * 4, ""] and end
    free = engine.chat([CONVERSATIONS[1]], SamplingParams(max_tokens=24))[0].text
    params = SamplingParams(max_tokens=24, stop=free[6:9], include_stop_str_in_output=True)
    until = free.index(free[6:9]) + 3
    assert (
        engine.chat([CONVERSATIONS[1]], params)[0].text
        == "".join(engine.stream(CONVERSATIONS[1], params))
        == free[:until]
    )
    # The end of a turn is none of the caller's stop texts: it is a special token of this tokenizer in all but its ids.
    tokenizer = engine.processor.tokenizer
    for include, skip, expected in ((True, True, "red"), (True, False, "red<|im_end|>"), (False, False, "red")):
        completion = Completion(
            100, {2}, tokenizer, turn_ends=("<|im_end|>",), include_stop=include, skip_special_tokens=skip
        )
        for index in tokenizer.encode("red<|im_end|>"):
            completion.push(index)
        assert completion.text == expected and completion.finish_reason == "stop"
