"""Schemas and grammars that would overflow the compiler's stack, or cost more than an answer may."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import cache
from typing import Any

import pytest

from aria.engine.grammar import Grammars
from aria.grammars.limits import check_json, check_schema
from aria.processor import AriaProcessor
from aria.workers import Workers


def chain(length: int) -> dict[str, Any]:
    """References that lead from one to the next."""
    definitions: dict[str, Any] = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(length): {}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@cache
def grammars() -> Grammars:
    processor = AriaProcessor.from_pretrained(None)
    return Grammars(processor.tokenizer, len(processor.tokenizer))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (chain(4000), "references"),
        (nested(5000), "nested|inside|deep"),
        ({"type": "object", "required": [f"n{i}" for i in range(60_000)]}, "60,000 names in required"),
        ({"properties": {f"n{i}": {} for i in range(6000)}}, "6,000 names in properties"),
        ({"enum": [f"n{i}" for i in range(30_000)]}, "values in enum"),
        ({"type": "string", "pattern": "a" * 20_000}, "pattern"),
    ],
    ids=["chain", "depth", "required", "properties", "enum", "pattern"],
)
def test_what_is_too_large_is_refused_before_it_is_compiled(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammars().compile(schema)


def test_depth_of_any_json_does_no_harm() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match=r"nested|inside|deep"):
        check_json(value)
    while value:  # freed one by one: the interpreter would do that by recursion
        value = value[0]


def test_what_people_send_is_followed() -> None:
    check_schema(chain(50))
    many = {f"p{i}": {"type": "string", "maxLength": 200} for i in range(2000)}
    grammars().compile({"type": "object", "properties": many, "required": list(many)})
    grammars().compile(chain(50))
    grammars().compile({"enum": [f"value {i}" for i in range(2000)]})


def test_the_compiler_is_tried_in_a_worker() -> None:
    workers = Workers(1, 3 << 30)
    processor = AriaProcessor.from_pretrained(None)
    tried = Grammars(processor.tokenizer, len(processor.tokenizer), lambda: workers)
    tried.compile({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert len(tried.matchers({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, 2)) == 2
    with pytest.raises(ValueError, match="cannot be followed"):
        tried.compile({"type": "string", "pattern": "(?=a)b"})
    workers.close()


def test_a_chain_of_references_ends_no_process() -> None:
    program = """
        import threading
        from aria.engine import Engine, SamplingParams
        length = 3000
        definitions = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(length)}
        schema = {"$ref": "#/$defs/0", "$defs": {**definitions, str(length): {}}}
        engine = Engine()

        def ask():
            try:
                engine.chat([[{"role": "user", "content": "hi"}]], SamplingParams(max_tokens=2, json_schema=schema))
            except ValueError as error:
                print(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "references" in done.stdout, done.stderr
