"""Untrusted schemas and grammars are rejected by the limits, or followed at a bounded cost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from aria.engine import grammar
from aria.engine.grammar import Grammars, from_choices, from_regex, from_structural_tag
from aria.engine.matcher import Matcher, fill_masks
from aria.grammars import limits, trial
from aria.grammars.schemas import normalize
from aria.grammars.shape import max_forced_length, max_literal_length
from aria.processor import AriaTokenizer
from aria.workers import Workers
from tests.helpers import small_tokenizer, worker_tasks
from tests.helpers.hostile_grammars import (
    aliases,
    crossed,
    doubled,
    doubled_terminals,
    large,
    linked,
    nested,
    parentheses,
    remainders,
)
from tests.helpers.repository import environment

TOKENIZER = AriaTokenizer(small_tokenizer.model())
SMALL = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


def alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `tests/helpers/hostile_grammars.py` in a process that may crash."""
    command = [sys.executable, "-m", "tests.helpers.hostile_grammars", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())


@pytest.fixture(scope="module")
def workers():
    workers = Workers(2, 3 << 30)
    yield workers
    workers.close()


@pytest.fixture
def grammars(workers):
    return Grammars(TOKENIZER, TOKENIZER.vocab_size, lambda: workers)


@pytest.fixture(scope="module")
def unaided():
    return Grammars(TOKENIZER, TOKENIZER.vocab_size)


def holding(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# Limits


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (nested(120), r"nested too deeply: over 100 lists and objects.*, at #/items/items.*\$defs"),
        ({"const": holding(120)}, "nested too deeply"),
        ({"enum": [[1] * 1000] * 200}, "over 100,000 values; make it smaller"),
        ({"description": "x" * 2_000_001}, "characters; expected at most 2,000,000"),
        ({"properties": {"a": {"enum": list(range(20_001))}}}, "20,001 values in enum; .* 20,000.*, at #/properties/a"),
        ({"properties": {f"p{n}": {} for n in range(5001)}}, "5,001 names in properties; .* 5,000: group them"),
        ({"required": [f"p{n}" for n in range(5001)]}, "5,001 names in required; expected at most 5,000"),
        ({"patternProperties": {f"^{n}": {} for n in range(101)}}, "101 patterns in patternProperties; .* 100: join"),
        ({"items": {"pattern": "a" * 10_001}}, "10,001 characters in a pattern; .* 10,000: shorten it, at #/items"),
        ({"type": "integer", "multipleOf": 1_048_577}, "multipleOf is 1048577; expected at most 100,000, not counting"),
        (aliases(300), "a chain of over 200 references; refer to the last directly, at #/\\$defs/d"),
        ({"allOf": [{"pattern": f"a{n}"} for n in range(9)]}, "9 patterns and formats of one text; .* at most 8"),
        (linked(1700), "references are nested over 5,000 levels deep"),
    ],
)  # fmt: skip
def test_errors_name_the_limit_that_a_schema_exceeds(unaided, schema, says):
    with pytest.raises(ValueError, match=rf"json_schema cannot be followed: .*{says}"):
        unaided.compile(schema)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('start: "' + "a" * 200_000 + '"', "200,009 characters; expected at most 200,000"),
        (parentheses(1000), "1,002 rules; expected at most 1,000"),
        (f"start: %json {json.dumps(nested(120))}", "nested too deeply"),
        (f'start: "a" %json {json.dumps({"enum": list(range(20_001))})}', "20,001 values in enum"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
        ('{"grammars": [{"json_schema": {"type": "null"}}]}', "neither Lark.*nor GBNF"),
        (from_regex("a" * 10_001), "10,001 characters in a pattern"),
        (from_choices(["a"] * 20_001), "20,001 choices; expected at most 20,000"),
        (from_choices(["a" * 2_000_000]), "characters; expected at most 2,000,000"),
        (from_structural_tag({"format": {"type": "json_schema", "json_schema": nested(120)}}), "nested too deeply"),
        (from_structural_tag({"format": {"type": "regex", "pattern": "a" * 10_001}}), "characters in a pattern"),
        (from_structural_tag({"format": {"type": "json_schema", "json_schema": aliases(300)}}), "over 200 references"),
    ],
)
def test_errors_name_the_limit_that_a_grammar_exceeds(unaided, text, says):
    with pytest.raises(ValueError, match=rf"grammar cannot be followed: .*{says}"):
        unaided.compile(text)


def test_deeply_nested_json_is_safe():
    value = holding(100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        limits.check_json(value)
    while value != 1:  # freed one by one: the interpreter would do that by recursion
        value = value[0]


def test_json_that_contains_itself_is_refused(unaided):
    circle: dict[str, Any] = {}
    circle["items"] = circle
    with pytest.raises(ValueError, match="nested too deeply"):
        limits.check_json(circle)
    with pytest.raises(ValueError, match="json_schema"):
        unaided.compile(circle)


@pytest.mark.slow
def test_schemas_written_by_programs_are_accepted(grammars):
    names = [f"property_{n}" for n in range(2000)]
    flat = {"properties": {name: {"type": "string", "maxLength": 200} for name in names}, "required": names}
    listed = {"enum": [f"value {n}" for n in range(9000)]}
    for schema in (large(60, 60), large(1, 450), flat, linked(400), doubled(60), aliases(150), listed):
        grammars.compile(schema)


def test_depth_behind_references_and_types_is_safe(unaided):
    # Each of 400 definitions refers to the next.
    [matcher] = unaided.matchers(linked(400), 1)
    for token in TOKENIZER.encode('{"next":' * 3 + "null"):
        assert matcher.accept(token) is None
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(90):
        schema = {"type": ["array", "null"], "items": schema}
    [matcher] = unaided.matchers(schema, 1)
    assert all(matcher.accept(token) is None for token in TOKENIZER.encode("[" * 60 + "null]"))


def test_large_numbers_among_many_definitions_take_no_longer_than_their_length(unaided):
    schema = linked(400)
    schema["$defs"]["d400"] = {"const": 2**60 + 1}
    began = time.process_time()
    unaided.compile(schema)
    assert time.process_time() - began < 20


# Trials


def test_accepted_schemas_are_compiled_once_and_cached(grammars, workers, monkeypatch):
    grammars.compile(SMALL)
    monkeypatch.setattr(workers, "run", None)  # neither the verdict nor the grammar is asked for again
    grammars.check(SMALL)
    grammars.compile(dict(SMALL))
    with pytest.raises(TypeError):
        grammars.check({**SMALL, "title": "another"})


def test_rejections_are_cached(grammars, workers, monkeypatch):
    for _ in range(2):
        with pytest.raises(ValueError, match="json_schema cannot be followed: not is not supported"):
            grammars.compile({"not": {"type": "null"}})
        monkeypatch.setattr(workers, "run", None)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (worker_tasks.crash_trial, "json_schema cannot be read: the process that read it crashed"),
        (worker_tasks.hang_trial, "took longer than 1 s"),
    ],
)
def test_crashes_and_hangs_of_the_compiler_stay_in_the_worker(grammars, monkeypatch, task, says):
    monkeypatch.setattr(trial, "trial", task)
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 1.0)
    with pytest.raises(ValueError, match=says):
        grammars.compile(SMALL)
    monkeypatch.undo()
    grammars.compile({**SMALL, "title": "another"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (remainders(100), "compiling it takes over 2 s"),
        ({"anyOf": [{"const": {"a": [n] * 40}} for n in range(2000)]}, "it is too large, or the compiler fails on it"),
        (crossed(32), "computing the allowed tokens takes .* too many of its alternatives match the same text"),
    ],
)
def test_trials_over_their_limits_are_aborted(grammars, constraint, says):
    with pytest.raises(ValueError, match=f"json_schema cannot be followed: {says}"):
        grammars.check(constraint)


def test_trials_need_no_pytorch():
    program = "import sys, aria.grammars.trial; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_without_workers_the_limits_keep_the_process_alive():
    found = alone("here")
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    assert "over 200 references" in results.pop("aliases")
    assert results == dict.fromkeys(("linked", "parentheses", "deep"), "compiled")


# While answers follow


@pytest.mark.parametrize(
    ("schema", "least", "most"),
    [
        ({"const": "a" * 100}, 100, 110),
        ({"pattern": "^(ab|c){100,}$"}, 200, 210),
        ({"type": "array", "items": {"const": "abc"}, "minItems": 100}, 500, 700),
        ({"anyOf": [{"const": "a" * 50}, {"const": "b" * 70}]}, 70, 80),
        (doubled(40), 10**11, 10**12),
        (linked(3), 20, 60),
        ({"items": {"$ref": "#"}}, 0, 20),
    ],
)
def test_max_forced_length(schema, least, most):
    assert least <= max_forced_length(normalize(json.loads(json.dumps(schema)))) <= most


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("a{3}", 3),
        ("(ab|cde){2,}", 6),
        ("[^]a]{4}(x(y){2}){2}", 10),
        (r"\p{L}{5}\{3\}", 8),
        ("(a*)?b+?", 1),
        ("((a{999}){999}){999}", 999**3),
    ],
)
def test_literal_length_of_patterns(pattern, count):
    assert max_literal_length(pattern) == count


@pytest.mark.parametrize(
    "constraint",
    [
        {
            "type": "array", "prefixItems": [{"$ref": "#/$defs/x"}] * 500, "minItems": 500,
            "$defs": {"x": {"const": "y" * 9000}},
        },
        {"type": "string", "pattern": "^a{300000}$"},
        {"type": "string", "pattern": "^a*$", "minLength": 300_000},
        from_regex("((a{1000}){1000}){1000}"),
        doubled_terminals(24),
        from_structural_tag({"format": {"type": "regex", "pattern": "a{900000}"}}),
    ],
)  # fmt: skip
def test_long_texts_are_not_forced_in_one_step(unaided, constraint):
    # Millions of forced letters.
    [matcher] = unaided.matchers(constraint, 1)
    choice = random.Random(0)
    for _ in range(40):
        began = time.thread_time()
        mask = np.zeros(-(-TOKENIZER.vocab_size // 32), np.int32)
        matcher.fill(mask)
        assert time.thread_time() - began < 0.5
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        assert matcher.accept(choice.choice(allowed)) is None, matcher.error


class Stuck(Matcher):
    """Its masks never finish."""

    def fill(self, mask_W: np.ndarray) -> None:
        LEFT.clear()
        while not LEFT.is_set():
            pass
        mask_W.fill(7)
        FINISHED.release()


LEFT, FINISHED = threading.Event(), threading.Semaphore(0)


def test_a_slow_mask_ends_only_requests_with_its_grammar(unaided, caplog):
    [good, other] = unaided.matchers(SMALL, 2)
    [same, neighbour] = unaided.matchers({**SMALL, "title": "slow"}, 2)
    stuck = Stuck(same._grammar, same._ends_W)
    began = time.monotonic()
    masks = fill_masks([good, stuck, neighbour, other], TOKENIZER.vocab_size)
    try:
        assert time.monotonic() - began < 30
        assert (masks[1] == -1).all() and (masks[2] == -1).all()
        assert (masks[0] == masks[3]).all() and not (masks[0] == -1).all()
        assert [one.accept(5) for one in (stuck, neighbour)] == ["error", "error"]
        assert "finding the allowed tokens took" in str(stuck.error)
        with pytest.raises(ValueError, match="json_schema cannot be followed: finding the allowed tokens took over"):
            unaided.matchers({**SMALL, "title": "slow"}, 1)
    finally:
        LEFT.set()
    FINISHED.acquire(timeout=30)
    assert (masks[1] == -1).all(), "what comes late is not written any more"
    assert (fill_masks([good], TOKENIZER.vocab_size)[0] == masks[0]).all()


def test_errors_of_masks_are_raised_in_the_caller(unaided, monkeypatch):
    [matcher] = unaided.matchers(SMALL, 1)
    with pytest.raises(ValueError, match="buffer size"):
        fill_masks([matcher], 8)
    assert fill_masks([matcher], TOKENIZER.vocab_size).any()


def test_caches_are_bounded(unaided, monkeypatch):
    monkeypatch.setattr(grammar, "KEPT_CHARACTERS", 5000)
    for n in range(30):
        unaided.compile({**SMALL, "title": f"{n}" * 200})
    assert len(unaided._compiled) <= grammar.KEPT_GRAMMARS
    assert sum(len(text) for _, text in unaided._verdicts) <= 5000


# From outside


@pytest.mark.soak
def test_a_server_rejects_them_and_survives():
    found = alone("serve")
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout.splitlines()[-1])
    assert results["after"] in ("stop", "length")
    for name, (status, error) in results["refused"].items():
        assert (status, error["type"]) == (400, "invalid_request_error"), (name, error)
        assert error["code"] == ("invalid_value" if name == "nested" else "invalid_schema"), (name, error)
        assert error["param"].startswith(("response_format", "structured_outputs", "tools[0].function.parameters"))
        reasons = {"nested": "nested too deeply", "remainders": "takes over 2 s", "grammar": "1,002 rules"}
        says = reasons.get(name, "over 200 references")
        assert says in error["message"], (name, error)


@pytest.mark.soak
def test_a_batch_rejects_them_and_answers_the_rest(tmp_path):
    found = alone("batch", tmp_path)
    assert found.returncode == 1, found.stderr
    answers = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(answer["status_code"] for answer in answers) == [200, 400]


@pytest.mark.soak
def test_aria_describe_rejects_them(tmp_path):
    found = alone("describe", tmp_path)
    assert found.returncode not in (0, -11, 139), found.stderr
    assert "json_schema cannot be followed: over 200 references" in found.stderr
