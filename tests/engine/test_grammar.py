"""Answers that follow a JSON schema: every finished one is valid, whatever runs beside it."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from aria import Engine, SamplingParams
from aria.engine.grammar import Grammars
from aria.engine.matcher import fill_masks
from aria.engine.sampler import mask_logits
from aria.processor import AriaTokenizer
from tests.helpers import small_tokenizer
from tests.helpers.conversations import asked, image
from tests.helpers.random_schemas import closed, is_valid, random_schema

SCHEMA = closed(
    colour={"enum": ["red", "green"]},
    count={"type": "integer", "minimum": 0, "maximum": 99},
    words={"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
)


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine(model_folder, device="cpu", max_batch=8)


@pytest.fixture(scope="module")
def grammars():
    tokenizer = AriaTokenizer(small_tokenizer.model())
    # As where a model has more rows than its tokenizer has pieces.
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + 40)


def wander(grammars: Grammars, tokenizer: AriaTokenizer, schema: object, seed: int, steps: int = 3000) -> str | None:
    """A text drawn evenly from what the grammar allows at each token; None if it does not end."""
    choice = random.Random(seed)
    [matcher] = grammars.matchers(schema, 1, ("<|im_end|>",))
    ids: list[int] = []
    for _ in range(steps):
        allowed = np.unpackbits(fill_masks([matcher], len(tokenizer) + 40).view(np.uint8), bitorder="little")
        ids.append(choice.choice(allowed.nonzero()[0].tolist()))
        assert ids[-1] < len(tokenizer), "a token that the tokenizer has not"
        end = matcher.accept(ids[-1])
        assert end != "error", matcher.error
        if end is not None:
            return tokenizer.decode(ids[:-1] if end == "over" else ids)
    return None


@pytest.mark.slow
def test_random_schemas_give_valid_values_without_white_space(engine):
    choice = random.Random(5)
    schemas = [random_schema(choice) for _ in range(60)]
    finished = 0
    for number, schema in enumerate(schemas):
        params = SamplingParams(max_tokens=200, json_schema=schema, temperature=1.0, seed=number)
        for result in engine.chat([asked("hello")], params):
            if result.finish_reason == "stop":
                finished += 1
                assert is_valid(result.text, schema), (result.text, schema)
                compact = json.dumps(json.loads(result.text), separators=(",", ":"), ensure_ascii=False)
                # Besides numbers and escapes there is one way to write a value without white space.
                assert len(result.text.split()) == len(compact.split())
            else:
                assert result.finish_reason == "length" and len(result.token_ids) == 200
    assert finished > 45


@pytest.mark.parametrize("seed", range(4))
def test_every_way_through_a_grammar_is_a_valid_value_in_utf_8(grammars, seed):
    tokenizer, compiler = grammars
    choice = random.Random(seed)
    for _ in range(12):
        schema = random_schema(choice)
        text = wander(compiler, tokenizer, schema, seed)
        assert text is not None and is_valid(text, schema), (text, schema)
        assert "\ufffd" not in text


def test_references_and_recursion(grammars):
    tokenizer, compiler = grammars
    tree = {"anyOf": [{"type": "null"}, closed(left={"$ref": "#/$defs/tree"}, name={"const": "n"})]}
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    texts = {wander(compiler, tokenizer, schema, seed) for seed in range(12)}
    assert "null" in texts and any("left" in text for text in texts if text)
    assert all(is_valid(text, schema) for text in texts if text)


def test_a_text_that_looks_like_a_mark_is_text(grammars):
    tokenizer, compiler = grammars
    schema = closed(a={"const": "x<|im_end|><|img|><|endoftext|>é"})
    text = wander(compiler, tokenizer, schema, 0)
    assert json.loads(text) == {"a": "x<|im_end|><|img|><|endoftext|>é"}


def test_the_packaged_model_ends_no_turn_inside_of_a_value():
    tokenizer = AriaTokenizer.from_pretrained()
    [mark] = tokenizer.encode("<|im_end|>")
    compiler = Grammars(tokenizer, tokenizer.vocab_size)
    [matcher] = compiler.matchers({"type": "string"}, 1, ("<|im_end|>",))
    [quote] = tokenizer.encode('"')
    assert matcher.accept(quote) is None
    [mask] = fill_masks([matcher], tokenizer.vocab_size)
    allowed = set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())
    assert allowed.isdisjoint({mark, *tokenizer.all_special_ids})
    assert tokenizer.encode("a")[0] in allowed


@pytest.mark.slow
def test_true_is_any_object(engine):
    result = engine.chat([asked("hello")], SamplingParams(max_tokens=400, json_schema=True, temperature=1.0, seed=2))[0]
    assert result.text.startswith("{")
    assert result.finish_reason == "length" or isinstance(json.loads(result.text), dict)


def test_an_answer_that_is_too_long_ends_with_length(engine):
    result = engine.chat([asked("hello")], SamplingParams(max_tokens=5, json_schema=SCHEMA))[0]
    assert (result.finish_reason, len(result.token_ids)) == ("length", 5)
    assert result.text.startswith('{"')


def test_the_last_token_may_complete_the_value(engine):
    whole = engine.chat([asked("hello")], SamplingParams(max_tokens=300, json_schema=SCHEMA))[0]
    assert whole.finish_reason == "stop"
    same = engine.chat([asked("hello")], SamplingParams(max_tokens=len(whole.token_ids), json_schema=SCHEMA))[0]
    assert (same.text, same.finish_reason) == (whole.text, "stop")


def test_with_images_choices_and_other_requests(engine):
    params = SamplingParams(max_tokens=300, json_schema=SCHEMA, n=3, temperature=1.0, seed=1)
    free = SamplingParams(max_tokens=30, temperature=1.0, seed=1)
    messages = asked("what is shown", image(0))
    alone, plain = engine.chat([messages], params)[0], engine.chat([messages], free)[0]
    assert len({choice.text for choice in alone.choices}) > 1
    assert all(is_valid(choice.text, SCHEMA) for choice in alone.choices)
    answers = [engine.queue(engine.prepare(messages), one) for one in (free, params, free, params)]
    while engine.core.unfinished:
        engine.step()
    together = [answer.result() for answer in answers]
    assert [one.choices for one in together] == [one.choices for one in (plain, alone, plain, alone)]


@pytest.mark.slow
def test_preemption_loses_nothing(engine, model_folder):
    params = SamplingParams(max_tokens=150, json_schema=SCHEMA, temperature=1.0, seed=1, n=2)
    conversations = [asked("hello " * k) for k in range(1, 7)]
    tight = Engine(model_folder, device="cpu", max_batch=12, max_model_len=320, cache_tokens=330)
    assert [r.choices for r in tight.chat(conversations, params)] == [
        r.choices for r in engine.chat(conversations, params)
    ]
    assert tight.stats().preemptions > 0


@pytest.mark.slow
def test_running_one_step_ahead_as_on_a_gpu(engine, model_folder):
    """A step that is under way when an answer ends, or is preempted, changes nothing."""
    choice = random.Random(3)
    schemas = [None, SCHEMA, *(random_schema(choice) for _ in range(8))]
    params = [
        SamplingParams(
            max_tokens=60,
            json_schema=schemas[i % 10],
            temperature=1.0,
            seed=i,
            n=1 + i % 2,
            logprobs=(None, 2)[i % 3 == 0],
        )
        for i in range(30)
    ]
    prompts = [engine.prepare(asked("hello " * (1 + i % 4))) for i in range(30)]
    tight = Engine(model_folder, device="cpu", max_batch=12, max_model_len=200, cache_tokens=330)
    tight.core.ahead = True
    results = []
    for one in (engine, tight):
        answers = [one.queue(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        while one.core.busy:
            one.step()
            one.core.scheduler.check()
        results.append([answer.result() for answer in answers])
    assert [result.token_ids for result in results[0]] == [result.token_ids for result in results[1]]
    assert [c.text for r in results[0] for c in r.choices] == [c.text for r in results[1] for c in r.choices]
    assert tight.stats().preemptions > 0


def test_a_stop_text_still_ends_the_answer(engine):
    whole = engine.chat([asked("hello")], SamplingParams(max_tokens=300, json_schema=SCHEMA))[0]
    cut = engine.chat([asked("hello")], SamplingParams(max_tokens=300, json_schema=SCHEMA, stop='"count"'))[0]
    assert cut.text == whole.text[: whole.text.index('"count"')]
    assert cut.finish_reason == "stop"


def test_cancelled_in_the_middle(engine):
    answer = engine.queue(engine.prepare(asked("hello")), SamplingParams(json_schema=True, temperature=1.0))
    for _ in range(5):
        engine.step()
    engine.cancel(answer)
    assert not engine.core.unfinished and engine.core.pool.used == 0


def test_biases_and_penalties_choose_among_what_is_allowed(engine):
    tokenizer = engine.processor.tokenizer
    [seven], [word] = tokenizer.encode("7"), tokenizer.encode("世")[:1]
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 3, "maxItems": 3}
    bias = {seven: 100, word: 100}
    assert engine.chat([asked("hello")], SamplingParams(json_schema=schema, logit_bias=bias))[0].text == "[7,7,7]"
    params = SamplingParams(json_schema=schema, logit_bias={seven: 10}, presence_penalty=2.0, frequency_penalty=2.0)
    assert is_valid(engine.chat([asked("hello")], params)[0].text, schema)


@pytest.mark.parametrize("end", ["<", "<|endoftext|>"])
def test_a_number_ends_where_the_model_would_end_its_turn(engine, end):
    index = engine.processor.tokenizer.convert_tokens_to_ids(end)
    params = SamplingParams(json_schema={"type": "integer", "minimum": 0}, logit_bias={index: 100}, max_tokens=50)
    result = engine.chat([asked("hello")], params)[0]
    assert result.finish_reason == "stop" and len(result.token_ids) == 2
    assert result.text.isdigit() and result.token_ids[-1] == index


def test_logprobs_are_those_before_the_grammar(engine):
    free = engine.chat([asked("hello")], SamplingParams(max_tokens=1, logprobs=5))[0]
    bound = engine.chat([asked("hello")], SamplingParams(max_tokens=1, logprobs=5, json_schema=SCHEMA))[0]
    assert [top.token_id for top in bound.logprobs[0].top] == [top.token_id for top in free.logprobs[0].top]
    assert bound.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "not": {"const": "a"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "null"}}, "contains"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        (
            {"type": "object", "properties": {"a": {"dependentSchemas": {"b": False}}}},
            "dependentSchemas is not supported, at #/properties/a",
        ),
        ({"if": {"type": "null"}, "then": {"const": 1}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "idn-email"}, "format 'idn-email'"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(ab"}, "unclosed group"),
        ({"type": "float"}, "Invalid type: float"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "schema.json"),
        ({"items": {"type": "integer", "minimum": 3, "maximum": 1}, "minItems": 1}, "at #/items contradict each other"),
        ({"enum": []}, "cannot be followed"),
        ({"$ref": "#"}, "no JSON value matches it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": closed(b={"$ref": "#/$defs/a"})}}, "Too many items"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        ({"minimum": float("nan")}, "is not JSON"),
        ({"const": {1, 2}}, "is not JSON"),
    ],
)
def test_unsupported_schemas_are_rejected_before_anything_is_queued(engine, schema, message):
    with pytest.raises(ValueError, match="json_schema") as caught:
        engine.chat([asked("hello")], SamplingParams(json_schema=schema))
    assert message in str(caught.value)
    assert "<state>" not in str(caught.value) and not engine.core.busy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": False}, "json_schema is False; expected None, True"),
        ({"json_schema": '{"type": "object"}'}, "json_schema is '{"),
        ({"json_schema": True, "ignore_eos": True}, "ignore_eos is True; expected False beside json_schema"),
    ],
)
def test_invalid_parameters_are_rejected(fields, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**fields)
    assert message in str(caught.value)


def test_settings_inside_a_schema_add_no_white_space(grammars):
    tokenizer, compiler = grammars
    schema = closed(a={"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2})
    schema["x-guidance"] = {"whitespace_flexible": True, "item_separator": ", "}
    assert wander(compiler, tokenizer, schema, 0) == '{"a":[null,null]}'


def test_a_grammar_that_grows_beyond_its_limits_ends_its_answer_alone(engine, caplog):
    # After the first property nothing finite fits, which no look at the beginning can tell.
    endless = {"$ref": "#/$defs/a", "$defs": {"a": closed(word={"type": "string", "maxLength": 1}, more={})}}
    endless["$defs"]["a"]["properties"]["more"] = {"$ref": "#/$defs/b"}
    endless["$defs"]["b"] = closed(b={"$ref": "#/$defs/b"})
    params = [SamplingParams(max_tokens=60, json_schema=schema, seed=1) for schema in (endless, SCHEMA)]
    answers = [engine.queue(engine.prepare(asked("hello")), one) for one in params]
    while engine.core.unfinished:
        engine.step()
    broken, whole = (answer.result() for answer in answers)
    assert broken.finish_reason == "error" and broken.text.startswith('{"word":"')
    assert whole.choices == engine.chat([asked("hello")], params[1])[0].choices
    assert "limits on its grammar" in caplog.text


def test_a_grammar_with_a_full_lexer_is_not_cached(grammars):
    tokenizer, compiler = grammars
    schema = {"type": "string", "pattern": "^.*a.{24}$"}
    letters = [tokenizer.convert_tokens_to_ids(piece) for piece in "abcd"]
    choice = random.Random(0)
    for _ in range(2):
        [matcher] = compiler.matchers(schema, 1)
        mask = fill_masks([matcher], len(tokenizer) + 40)
        assert matcher.accept(tokenizer.encode('"')[0]) is None, "the grammar is fresh"
        for _ in range(20_000):
            if matcher.accept(choice.choice(letters)) == "error":
                break
            mask = fill_masks([matcher], len(tokenizer) + 40)
        assert "too many states" in str(matcher.error)
        assert matcher.accept(letters[0]) == "error" and (mask == -1).any()


def test_threads_compile_concurrently(grammars):
    tokenizer, _ = grammars
    fresh = Grammars(tokenizer, tokenizer.vocab_size + 40)
    schemas = [closed(**{f"p{i % 5}": {"type": "integer"}}) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda schema: fresh.matchers(schema, 6), schemas))
    masks = fill_masks([matchers[0] for matchers in found], tokenizer.vocab_size + 40)
    assert (masks == masks[0]).all() and masks.any()


def test_without_the_grammar_library_the_error_names_the_command(monkeypatch):
    tokenizer = AriaTokenizer(small_tokenizer.model())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "aria-moe\[serve\]"'):
        Grammars(tokenizer, tokenizer.vocab_size).compile(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 75, generator=generator).to(dtype)
    allowed = torch.rand(2, 96, generator=generator) < 0.3
    words = np.packbits(allowed.numpy(), axis=1, bitorder="little").view("<i4")
    places = torch.tensor([3, 1])
    got = mask_logits(logits, places, torch.from_numpy(words))
    expected = logits.clone()
    expected[places] = logits[places].masked_fill(~allowed[:, :75], float("-inf"))
    assert got.dtype == dtype and torch.equal(got, expected)
