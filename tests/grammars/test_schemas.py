"""Normalized JSON schemas: every value that the grammar allows matches the original schema."""

from __future__ import annotations

import json
import random
import re

import jsonschema_rs
import numpy as np
import pytest

from aria.engine import grammar
from aria.engine.grammar import Grammars
from aria.engine.matcher import fill_masks
from aria.grammars import numbers
from aria.processor import AriaTokenizer
from aria.serve import tool_calls
from tests.helpers import small_tokenizer

TOKENIZER = AriaTokenizer(small_tokenizer.model())
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
LARGE = 2**53 + 1
FIXED = {"properties": {"x": {"enum": [1]}}, "required": ["x"]}


def wander(schema: object, seed: int, steps: int = 500) -> str | None:
    """A random text that the grammar allows, preferring closing tokens; None if it does not end."""
    choice = random.Random(seed)
    [matcher] = GRAMMARS.matchers(schema, 1, ("<|im_end|>",))
    ids: list[int] = []
    for _ in range(steps):
        [mask] = fill_masks([matcher], TOKENIZER.vocab_size)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        closing = [index for index in allowed if TOKENIZER.token_bytes(index)[:1] in (b'"', b"}", b"]")]
        ids.append(choice.choice(closing if closing and choice.random() < 0.4 else allowed))
        end = matcher.accept(ids[-1])
        assert end != "error", matcher.error
        if end is not None:
            return TOKENIZER.decode(ids[:-1] if end == "over" else ids)
    return None


def values(schema: object, count: int = 12) -> set[str]:
    """Some values that the grammar of a schema allows, each checked against the original schema."""
    validator = jsonschema_rs.validator_for(schema)
    texts = {text for seed in range(count) if (text := wander(schema, seed)) is not None}
    for text in texts:
        assert validator.is_valid(json.loads(text)), (text, schema)
    return texts


def allows(schema: object, text: str) -> bool:
    """Whether the grammar allows a text."""
    [matcher] = GRAMMARS.matchers(schema, 1)
    ends = [matcher.accept(token) for token in TOKENIZER.encode(text)]
    if ends[-1:] != ["complete"]:
        ends.append("complete" if matcher.accept(TOKENIZER.eos_token_id) == "over" else "error")
    return ends == [None] * (len(ends) - 1) + ["complete"]


# Objects are closed


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "object", **FIXED}, {'{"x":1}'}),
        (FIXED, {'{"x":1}'}),
        ({"type": ["object", "null"], **FIXED}, {'{"x":1}', "null"}),
        ({"type": "object", "properties": {}}, {"{}"}),
        ({"type": "object", "required": ["x"], "additionalProperties": {"const": 1}, "maxProperties": 1}, {'{"x":1}'}),
        ({"properties": {"p": FIXED}, "required": ["p"]}, {'{"p":{"x":1}}'}),
        ({"type": "array", "items": FIXED, "minItems": 1, "maxItems": 1}, {'[{"x":1}]'}),
        ({"$ref": "#/$defs/A", "$defs": {"A": FIXED}}, {'{"x":1}'}),
        ({"anyOf": [FIXED, {"type": "object", "properties": {"z": {"const": 3}}, "required": ["z"]}]},
         {'{"x":1}', '{"z":3}'}),
        # Several subschemas of one value: the properties of each are allowed by the others.
        ({"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"y": {"enum": [2]}}, "required": ["y"]}],
          "$defs": {"A": FIXED}}, {'{"x":1,"y":2}'}),
        ({"allOf": [{"properties": {"p": FIXED}},
                    {"properties": {"p": {"properties": {"y": {"enum": [2]}}, "required": ["y"]}}, "required": ["p"]}]},
         {'{"p":{"x":1,"y":2}}'}),
        ({"allOf": [{"items": FIXED}, {"items": {"properties": {"y": {}}}, "type": "array", "minItems": 1}],
          "maxItems": 1}, None),
        ({"properties": {"a": {"const": 1}, "b": {"const": 2}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
         {'{"a":1}', '{"b":2}', '{"a":1,"b":2}'}),
        ({"properties": {"k": {"const": 0}}, "required": ["k"],
          "oneOf": [FIXED, {"properties": {"x": {"const": 2}}, "required": ["x"]}]},
         {'{"k":0,"x":1}', '{"k":0,"x":2}'}),
        # A tag with a default is required, because it distinguishes the alternatives.
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": k, "default": k}}} for k in "ab"]},
         {'{"k":"a"}', '{"k":"b"}'}),
        ({"allOf": [{"properties": {"x": {"const": 1}}}, {"properties": {"y": {}}, "unevaluatedProperties": False}],
          "type": "object", "required": ["y"], "properties": {"y": {"const": 0}}}, {'{"y":0}'}),
        ({"$ref": "#/$defs/A", "unevaluatedProperties": False, "$defs": {"A": FIXED}}, {'{"x":1}'}),
        # One alternative lists its values, and the other has a different type.
        ({"oneOf": [{"enum": ["a"]}, {"type": "null"}]}, {'"a"', "null"}),
        ({"oneOf": [{"const": "a"}, {"const": 1}, {"type": "object", **FIXED}]}, {'"a"', "1", '{"x":1}'}),
        ({"oneOf": [{"const": 1.5}, {"type": "integer", "minimum": 2, "maximum": 2}]}, {"1.5", "2"}),
    ],
)  # fmt: skip
def test_objects_have_only_named_properties(schema, expected):
    found = values(schema)
    assert found and (expected is None or found == expected)


@pytest.mark.parametrize("more", [{"additionalProperties": True}, {"additionalProperties": {}},
                                  {"additionalProperties": {"type": "integer"}}, {"unevaluatedProperties": True},
                                  {"allOf": [{"additionalProperties": {}}]}])  # fmt: skip
def test_objects_can_allow_additional_properties(more):
    assert allows({"type": "object", **FIXED, **more}, '{"x":1,"other":2}')
    assert not allows({"type": "object", **FIXED}, '{"x":1,"other":2}')


def test_objects_without_named_properties_are_maps():
    for schema in ({"type": "object"}, {}, True, {"properties": {"x": {"type": "object"}}}, {"type": "array"}):
        inner = '{"any":[{"value":1}]}'
        text = inner if not isinstance(schema, dict) or "properties" not in schema else f'{{"x":{inner}}}'
        assert allows(schema, f"[{inner}]" if schema == {"type": "array"} else text)


def test_a_function_without_parameters_takes_none():
    for parameters in (None, {"type": "object"}, {"description": "none"}, {"properties": {}}):
        schema = tool_calls.call_schema([{"name": "f", "parameters": parameters}])
        assert values(schema) == {'{"name":"f","arguments":{}}'}


def test_names_have_one_spelling():
    assert not allows({"type": "object", **FIXED, "additionalProperties": True}, '{"x":1,"\\u0078":2}')
    assert not allows({"type": "string"}, '"\\ud83d"')
    assert allows({"const": "\u0001é"}, '"\\u0001é"'), "what has no other spelling keeps it"


# References


@pytest.mark.parametrize(
    "parameters",
    [
        {"$id": "https://e.example/x.json", "$defs": {"N": {"enum": [1]}}, "properties": {"n": {"$ref": "#/$defs/N"}}},
        {"$id": "https://e.example/x.json", "$defs": {"N": {"enum": [1]}},
         "properties": {"n": {"$ref": "x.json#/$defs/N"}}},
        {"$defs": {"N": {"$anchor": "nn", "enum": [1]}}, "properties": {"n": {"$ref": "#nn"}}},
        {"$defs": {"a/b~c d": {"enum": [1]}}, "properties": {"n": {"$ref": "#/$defs/a~1b~0c%20d"}}},
        {"definitions": {"N": {"$id": "n.json", "$ref": "#/$defs/M", "$defs": {"M": {"enum": [1]}}}},
         "properties": {"n": {"$ref": "n.json"}}},
        {"components": {"schemas": {"N": {"enum": [1]}}}, "properties": {"n": {"$ref": "#/components/schemas/N"}}},
        {"properties": {"n": {"const": 1}, "$ref": False}},
    ],
)  # fmt: skip
def test_references_start_from_their_own_schema(parameters):
    parameters = {"type": "object", "required": ["n"], **parameters}
    assert values(parameters) == {'{"n":1}'}
    same = {**parameters, "required": []}
    schema = tool_calls.any_of([tool_calls.call_schema([{"name": "f", "parameters": parameters},
                                              {"name": "g", "parameters": same}]), parameters])  # fmt: skip
    found = {wander(schema, seed) for seed in range(24)}
    assert '{"name":"f","arguments":{"n":1}}' in found and '{"n":1}' in found
    assert found <= {'{"n":1}', *(f'{{"name":"{name}","arguments":{text}}}'
                                  for name, text in (("f", '{"n":1}'), ("g", '{"n":1}'), ("g", "{}")))}  # fmt: skip


@pytest.mark.parametrize("value", [{"$ref": "#/x"}, {"$id": "a", "$anchor": "b"}, [{"$ref": "http://a/"}], {"type": 5}])
def test_values_that_look_like_schemas_are_values(value):
    annotations = {"default": value, "examples": [value], "description": "d"}
    schema = {"properties": {"n": {"const": value, **annotations}, "m": {"enum": [value]}}, "required": ["n", "m"]}
    text = json.dumps(value, separators=(",", ":"))
    assert values(tool_calls.call_schema([{"name": "f", "parameters": schema}])) == {
        f'{{"name":"f","arguments":{{"n":{text},"m":{text}}}}}'
    }


# Numbers


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"const": LARGE}, {str(LARGE)}),
        ({"const": -LARGE}, {str(-LARGE)}),
        ({"enum": [LARGE, LARGE + 1, 2**64 + 1]}, {str(LARGE), str(LARGE + 1), str(2**64 + 1)}),
        ({"type": "integer", "minimum": LARGE, "maximum": LARGE}, {str(LARGE)}),
        ({"type": "integer", "exclusiveMinimum": LARGE - 1, "exclusiveMaximum": LARGE + 1}, {str(LARGE)}),
        ({"type": "number", "minimum": LARGE, "maximum": LARGE}, {str(LARGE)}),
        ({"type": "number", "exclusiveMinimum": LARGE - 1, "maximum": LARGE}, {str(LARGE)}),
        ({"type": "number", "minimum": -LARGE, "exclusiveMaximum": 1 - LARGE}, {str(-LARGE)}),
        ({"type": "integer", "minimum": -(10**30) - 1, "maximum": -(10**30)}, {f"-1{'0' * 30}", f"-1{'0' * 29}1"}),
        ({"minimum": 2**60, "maximum": 2**60 + 9, "multipleOf": 7, "type": "integer"}, {str(2**60 + 6)}),
        ({"multipleOf": 10**12, "minimum": 1, "maximum": 10**12 + 1, "type": "integer"}, {str(10**12)}),
        ({"const": {"id": LARGE, "to": [LARGE]}}, {f'{{"id":{LARGE},"to":[{LARGE}]}}'}),
        ({"type": "array", "prefixItems": [{"const": LARGE}], "items": {"const": "a"}, "minItems": 2, "maxItems": 2},
         {f'[{LARGE},"a"]'}),
        ({"type": ["integer", "null"], "minimum": LARGE, "maximum": LARGE}, {str(LARGE), "null"}),
        ({"enum": [LARGE, "a"], "type": "string"}, {'"a"'}),
        ({"enum": [LARGE, LARGE + 1], "maximum": LARGE}, {str(LARGE)}),
        ({"$ref": "#/$defs/N", "$defs": {"N": {"properties": {"i": {"const": LARGE}, "n": {"$ref": "#/$defs/N"}},
                                              "required": ["i"], "maxProperties": 1}}}, {f'{{"i":{LARGE}}}'}),
    ],
)  # fmt: skip
def test_integers_beyond_doubles_keep_their_digits(schema, expected):
    assert values(schema, 30) == expected
    call = tool_calls.call_schema([{"name": "f", "parameters": {"properties": {"n": schema}, "required": ["n"]}}])
    if "$ref" not in schema:
        assert values(call, 30) == {f'{{"name":"f","arguments":{{"n":{text}}}}}' for text in expected}


def test_large_numbers_with_optional_and_additional_properties():
    schema = {"type": "object", "properties": {"a": {"const": LARGE}, "b": {"type": "string"}, "c": {"const": 2}},
              "required": ["b"], "additionalProperties": {"const": LARGE}}  # fmt: skip
    assert allows(schema, f'{{"a":{LARGE},"b":"","c":2,"other":{LARGE},"e":{LARGE}}}')
    assert allows(schema, '{"b":"x"}') and allows(schema, f'{{"b":"x","e":{LARGE}}}')
    for text in (
        '{"a":1,"b":""}',
        f'{{"b":"","a":{LARGE}}}',
        f'{{"b":"","c":{LARGE}}}',
        '{"c":2}',
        '{"b":"" }',
        '{,"b":""}',
    ):
        assert not allows(schema, text), text
    assert len(values(schema, 30)) > 10


def test_patterns_of_integers():
    choice = random.Random(0)
    for _ in range(300):
        first, last = sorted(choice.randrange(-2000, 2000) for _ in range(2))
        low, high = choice.choice([(first, last), (None, last), (first, None)])
        pattern = re.compile(numbers.integers(low, high))
        for number in {first - 1, first, last, last + 1, 0, *(choice.randrange(-3000, 3000) for _ in range(40))}:
            inside = (low is None or number >= low) and (high is None or number <= high)
            assert bool(pattern.fullmatch(str(number))) == inside, (low, high, number)
        assert not pattern.fullmatch("-0") and not pattern.fullmatch("007")


# Names


def test_patterns_of_names_beside_names():
    closed = {"type": "object", "additionalProperties": False}
    schema = {
        **closed,
        "properties": {"n": {"enum": [1]}},
        "required": ["n"],
        "patternProperties": {"^n$": {"type": "integer"}},
    }
    assert values(schema) == {'{"n":1}'}
    wide = {**closed, "properties": {"nn": {"const": 0}}, "required": ["nn"],
            "patternProperties": {"^n": {"type": "integer", "maximum": 0}}}  # fmt: skip
    assert allows(wide, '{"nn":0,"nm":-1}') and not allows(wide, '{"nn":-1}') and not allows(wide, '{"nn":0,"nm":1}')
    digits = {**closed, "patternProperties": {"^k[0-2]$": {"const": 1}}, "minProperties": 2, "maxProperties": 2}
    assert values(digits, 30) == {'{"k0":1,"k1":1}', '{"k0":1,"k2":1}', '{"k1":1,"k2":1}'}
    assert values({**digits, "maxProperties": 9}, 60) == {*values(digits, 30), '{"k0":1,"k1":1,"k2":1}'}
    with pytest.raises(ValueError, match="no JSON value matches it"):
        GRAMMARS.compile({**digits, "patternProperties": {"^k$": {"const": 1}}})
    # Python's re module would take years for this pattern.
    GRAMMARS.compile({"properties": {"a" * 60: {}}, "patternProperties": {"^(a+)+b$": {}}})


# Keywords


SAYS_NOTHING = [
    *({"propertyNames": said} for said in (True, {}, {"type": "string", "title": "Name"})),
    *({"dependentRequired": {}}, {"dependentRequired": {"a": []}}, {"not": False}),
    *({"if": True}, {"if": {"const": 1}}, {"if": {"const": 1}, "then": True, "else": {}}, {"then": False}),
    *({"else": False}, {"if": False, "then": False}),
    *({"dependentSchemas": {"a": True}}, {"dependencies": {}}),
    *({"uniqueItems": False}, {"uniqueItems": True, "maxItems": 1}),
    *({"contains": False, "minContains": 0}, {"minContains": 3}, {"maxContains": 0}, {"unevaluatedItems": True}),
    *({"format": "byte"}, {"format": "nonsense"}, {"title": "t"}, {"$comment": "c"}, {"x-mine": 1}),
    *({"deprecated": True}, {"readOnly": True}),
    *({"$schema": "https://json-schema.org/draft/2020-12/schema"}, {"$vocabulary": {}}),
    *({"minProperties": 0}, {"minItems": 0}, {"minLength": 0}, {"contentEncoding": "base64"}, {"contentSchema": {}}),
    *({"discriminator": {"propertyName": "a"}}, {"nullable": False}, {"$dynamicAnchor": "x"}),
]  # fmt: skip


@pytest.mark.parametrize("more", SAYS_NOTHING, ids=json.dumps)
def test_keywords_without_effect_are_accepted(more):
    schema = {"type": "object", "properties": {"a": {"const": 1, **more}}, "required": ["a"], **more}
    assert values(schema, 2) == {'{"a":1}'}


def test_limits_out_of_reach_are_accepted():
    assert allows({"type": "string", "minLength": 1, "maxLength": 2**63 - 1}, '"a"')
    assert allows({"type": "array", "maxItems": 2**63 - 1}, "[1]")


def test_keywords_that_are_null_are_ignored():
    nulls = dict.fromkeys(("properties", "required", "additionalProperties", "items", "enum", "anyOf", "format"))
    schema = {"type": "object", "properties": {"a": {"const": None, **nulls}}, "required": ["a"]}
    assert wander({**nulls, **schema}, 0) == '{"a":null}'
    for parameters in (nulls, {"type": None, **nulls}):
        call = tool_calls.call_schema([{"name": "f", "parameters": parameters}])
        assert wander(call, 0) == '{"name":"f","arguments":{}}'


DEEP = {
    "required": lambda schema: {"type": "object", "properties": {"a": schema}, "required": ["a"]},
    "alternatives": lambda schema: {
        "type": "object",
        "properties": {"a": schema, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "nullable": lambda schema: {
        "type": "object",
        "properties": {"a": {"oneOf": [schema, {"type": "null"}]}},
        "required": ["a"],
    },
}


@pytest.mark.parametrize("kind", DEEP)
def test_cost_is_linear_in_depth(kind):
    schema = {"const": 1}
    for _ in range(20):
        schema = DEEP[kind](schema)
    assert allows(schema, '{"a":' * 20 + "1" + "}" * 20)
    for _ in range(100):
        schema = DEEP[kind](schema)
    with pytest.raises(ValueError, match="nested too deeply"):
        GRAMMARS.compile(schema)


@pytest.mark.parametrize(
    "keyword",
    [
        *({"not": {}}, {"if": {"const": 1}, "then": False}, {"uniqueItems": True}, {"contains": {}}),
        *({"format": "regex"}, {"$ref": "#/nowhere"}, {"multipleOf": 0}),
        *({"contains": {}, "minContains": 0, "maxContains": 1}, {"propertyNames": {"maxLength": 3}}),
        *({"dependentRequired": {"a": ["b"]}}, {"dependentSchemas": {"a": False}}, {"dependencies": {"a": ["b"]}}),
        *({"$dynamicRef": "#a"}, {"unevaluatedItems": False, "allOf": [{}]}, {"type": "text"}, {"enum": []}),
        *({"required": "a"}, {"properties": []}, {"anyOf": []}, {"minLength": -1}),
    ],
    ids=json.dumps,
)  # fmt: skip
def test_unsupported_keywords_are_rejected_with_their_place(keyword):
    name = "type" if "type" in keyword else next(iter(keyword))
    schema = {"properties": {"a/b": {"anyOf": [{"type": "null"}, keyword]}}}
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        GRAMMARS.compile(schema)
    assert str(caught.value).endswith("at #/properties/a~1b/anyOf/1")


def test_constant_conditions_are_supported():
    assert values({"type": "integer", "if": True, "then": {"const": 1}, "else": {"const": 2}}) == {"1"}
    assert values({"type": "integer", "if": False, "then": {"const": 1}, "else": {"const": 2}}) == {"2"}


@pytest.mark.parametrize("schema", [
    {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 2},
    {"type": "array", "items": [{"const": 2}], "additionalItems": False, "minItems": 1},
])  # fmt: skip
def test_older_drafts_are_read(schema):
    assert {wander(schema, seed) for seed in range(4)} <= {"2", "[2]"}


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"oneOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, {"type": "object"}]},
        {"oneOf": [{"type": "integer"}, {"minimum": 5}]},
        {"allOf": [{"anyOf": [{"const": i} for i in range(10)]}] * 12},
    ],
)
def test_alternatives_that_overlap_or_multiply_are_refused(schema):
    with pytest.raises(ValueError, match=r"are disjoint|too complex"):
        GRAMMARS.compile(schema)


# Grammars that are no schemas


def test_parts_of_a_text_between_tags_follow_their_schema():
    schema = {"properties": {"x": {"const": 1}}, "required": ["x"]}
    parts = [{"begin": f"<f={name}>", "schema": schema, "end": "</f>"} for name in "ab"]
    old = {"structures": parts, "triggers": ["<f="]}
    content = {"type": "json_schema", "json_schema": schema}
    tags = [{"type": "tag", "begin": f"<f={name}>", "content": content, "end": "</f>"} for name in "ab"]
    for tag in (old, {"format": {"type": "triggered_tags", "triggers": ["<f="], "tags": tags}}):
        text = grammar.from_structural_tag(tag)
        for said in ("", "no part < f", 'one <f=a>{"x":1}</f>, two <f=b>{"x":1}</f> <f', '<f=a>{"x":1}</f>\n'):
            assert allows(text, said), said
        for said in ("<f=c>", '<f=a>{"x":2}', '<f=a>{"x":1,"y":2}', '<f=a>{"x":1}</f><f=b>1'):
            assert not allows(text, said), said
    only = {"type": "triggered_tags", "triggers": ["<t"], "at_least_one": True, "stop_after_first": True,
            "tags": [{"begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "<end>"]}]}  # fmt: skip
    text = grammar.from_structural_tag({"format": only})
    assert allows(text, "a <t>b</t>") and allows(text, "<t><end>")
    assert not allows(text, "a <t>b</t>c") and not allows(text, "a")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"structures": [], "triggers": ["<"]}, "structures should be a non-empty list"),
        ({}, "must have structures and triggers, or format"),
        ({"structures": [{"begin": "<a>", "end": "", "schema": {}}], "triggers": ["["]}, "starts with none"),
        (
            {"format": {"type": "sequence", "elements": [{"type": "grammar", "grammar": "x"}]}},
            r"format\.elements\[0\] has the type",
        ),
        (
            {"format": {"type": "tag", "begin": "a", "content": {"type": "any_text"}, "end": 5}},
            r"format\.end should be",
        ),
        ({"format": {"type": "json_schema", "json_schema": {"const": LARGE}}}, "beyond 2\\^53"),
    ],
)
def test_unsupported_structural_tags(form, says):
    with pytest.raises(ValueError, match=f"grammar cannot be followed: .*{says}"):
        GRAMMARS.compile(grammar.from_structural_tag(form))


def test_text_ends_with_the_turn_of_the_model():
    [matcher] = GRAMMARS.matchers(grammar.from_choices(["yes", "yes <b>"]), 1, ("<|im_end|>",))
    [mark] = TOKENIZER.encode("<")
    assert [matcher.accept(token) for token in TOKENIZER.encode("yes")] == [None] * len(TOKENIZER.encode("yes"))
    assert matcher.accept(mark) == "over", "nothing in the grammar begins so"
    [matcher] = GRAMMARS.matchers(grammar.from_regex("[a-z<|_>]*"), 1, ("<|im_end|>",))
    assert [matcher.accept(token) for token in TOKENIZER.encode("yes<b>")] == [None] * len(TOKENIZER.encode("yes<b>"))
    assert matcher.accept(TOKENIZER.eos_token_id) == "over"


# All together


def random_schema(choice: random.Random, depth: int) -> object:
    """Random schemas; many are unusual, and some allow nothing."""

    def inner() -> object:
        return random_schema(choice, depth - 1)

    names = choice.sample(["a", "b", "n1", "x-y"], choice.randrange(4))
    kinds = ["text", "range", "number", "large", "enum", "any"]
    kind = choice.choice([*kinds, *["object", "object", "array", "anyOf", "oneOf", "allOf", "ref"] * (depth > 0)])
    if kind == "object":
        given = {
            "type": "object", "properties": {name: inner() for name in names},
            "required": choice.sample(names, choice.randrange(len(names) + 1)),
            "additionalProperties": choice.choice([False, True, {"const": LARGE}, inner()]),
            "patternProperties": {choice.choice(["^n$", "^k[0-3]$", "^a", "x-"]): inner()},
            "minProperties": choice.randrange(3), "maxProperties": choice.randrange(4),
            "unevaluatedProperties": choice.choice([False, True]), "allOf": [inner()],
            "anyOf": [inner(), {"required": ["a"]}],
        }  # fmt: skip
        likely = {"type": 0.8, "properties": 0.9, "required": 0.6}
        items = [(key, value) for key, value in given.items() if choice.random() < likely.get(key, 0.15)]
        return dict(choice.sample(items, len(items)))
    large = choice.choice([LARGE, 2**60 + 7, -(2**64) - 5])
    return {
        "array": {"type": "array", "items": inner() if depth else True, "maxItems": choice.randrange(3)},
        "anyOf": {"anyOf": [inner(), inner()] if depth else [True]},
        "oneOf": {"oneOf": [inner(), inner()] if depth else [True]},
        "allOf": {"allOf": [inner(), inner()] if depth else [True]},
        "ref": {"$ref": f"#/$defs/{choice.choice('DE')}", **choice.choice([{}, {"title": "t"}, {"required": ["a"]}])},
        "text": {"type": "string", "maxLength": choice.randrange(4)},
        "range": {"type": choice.choice(["integer", "number"]), "minimum": large - 2, "exclusiveMaximum": large + 1},
        "number": {"type": choice.choice(["integer", "number"]), "minimum": -3, "maximum": choice.randrange(9)},
        "large": {"const": large},
        "enum": {"enum": choice.sample([1, 2.5, "s", None, True, {"a": 1}, [1], {"$ref": "#/x"}, {"a": LARGE}], 3)},
        "any": choice.choice([True, {}]),
    }[kind]  # fmt: skip


@pytest.mark.slow
def test_every_value_that_a_grammar_allows_matches_the_schema():
    choice = random.Random(11)
    checked = refused = 0
    for _ in range(250):
        schema = {"allOf": [random_schema(choice, 3)], "$defs": {name: random_schema(choice, 2) for name in "DE"}}
        try:
            GRAMMARS.compile(schema)
        except ValueError:
            refused += 1
            continue
        checked += len(values(schema, 3))
    assert checked > 300 and refused < 100
