"""Schemas and grammars that crash, hang or use too much memory, and a server, a batch and a description that get them.

Each runs as a program in its own process, since a fault here kills the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Schema = dict[str, Any]


def aliases(length: int) -> Schema:
    """A chain of references."""
    definitions: Schema = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "null"}}}


def linked(length: int) -> Schema:
    """A linked list: each definition has an optional property with the next."""
    definitions: Schema = {
        f"d{n}": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"type": "null"}]}},
            "required": ["next"],
        }
        for n in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "integer"}}}


def doubled(length: int) -> Schema:
    """Definitions that each use the next one twice."""
    definitions: Schema = {
        f"d{n}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "ab"}}
        for n in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "null"}}}


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def crossed(count: int) -> Schema:
    """Nested lists of many kinds each, so that the number of ways to parse ``[[[`` grows exponentially."""
    return {
        "$ref": "#/$defs/k0",
        "$defs": {
            f"k{n}": {
                "anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/k{(n + i) % count}"}} for i in range(count)]
                + [{"type": "null"}]
            }
            for n in range(count)
        },
    }


def remainders(count: int) -> Schema:
    """Multiples of many numbers, which are distinguished digit by digit."""
    return {"anyOf": [{"type": "integer", "multipleOf": n} for n in range(1000 - count, 1000)]}


def parentheses(rules: int) -> str:
    """A chain of rules within 25 groups each: up to 50 KB of stack per rule."""
    lines = [f"r{n}: {'(' * 25}'b' r{n + 1}{')?' * 25}".replace("'", '"') for n in range(rules)]
    return "\n".join(["start: r0", *lines, f'r{rules}: "a"'])


def doubled_terminals(count: int) -> str:
    """A single text of 2^count letters."""
    return "\n".join(["start: T0", *(f"T{n}: T{n + 1} T{n + 1}" for n in range(count)), f'T{count}: "a"'])


def large(sections: int, properties: int) -> Schema:
    """A large schema like those of APIs: sections with properties of all kinds."""
    kinds: list[Schema] = [
        {"type": "string", "maxLength": 255}, {"type": "integer", "minimum": 0}, {"enum": ["red", "green", "blue"]},
        {"type": "string", "format": "date-time"}, {"type": "array", "items": {"type": "number"}}, {"type": "boolean"},
    ]  # fmt: skip
    names = [f"property_{n}" for n in range(properties)]
    section = {
        "type": "object", "properties": {name: kinds[n % len(kinds)] for n, name in enumerate(names)},
        "required": names[::2], "additionalProperties": False,
    }  # fmt: skip
    definitions = {f"s{n}": {**section, "description": f"Section {n}."} for n in range(sections)}
    fields = {f"section_{n}": {"$ref": f"#/$defs/s{n}"} for n in range(sections)}
    return {"type": "object", "properties": fields, "required": list(fields), "$defs": definitions}


def _requests() -> dict[str, dict[str, Any]]:
    """Fields of chat requests that once killed a server or one of its threads."""
    chain = aliases(4000)
    function = {"type": "function", "function": {"name": "f", "parameters": chain}}
    return {
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": chain}}},
        "schema": {"response_format": {"type": "json_object", "schema": chain}},
        "structured_outputs": {"structured_outputs": {"json": chain}},
        "tools": {"tools": [function], "tool_choice": "required"},
        "structural_tag": {
            "response_format": {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": chain}}
        },
        "grammar": {"structured_outputs": {"grammar": parentheses(1000)}},
        "nested": {"structured_outputs": {"json": nested(300)}},
        "remainders": {"structured_outputs": {"json": remainders(100)}},
    }


def serve() -> None:
    """Send all of them to a server, one by one; then check that it still answers."""
    from tests.helpers.serving import running

    with running() as live:
        found = {}
        for name, fields in _requests().items():
            said = [{"role": "user", "content": "hi"}]
            answer = live.post("/v1/chat/completions", messages=said, max_tokens=4, **fields)
            found[name] = [answer.status_code, answer.json().get("error")]
        said = live.chat("hello", response_format={"type": "json_object"}, max_tokens=8)
        print(json.dumps({"refused": found, "after": said.choices[0].finish_reason}))


def batch(folder: Path) -> None:
    """Answer a batch file with a chain of references in one request."""
    from aria.cli import main

    bodies = [{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}]
    bodies.append({**bodies[0], **_requests()["response_format"]})
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sys.argv = ["aria", "batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--device", "cpu"]
    main()


def describe(folder: Path) -> None:
    """Describe an image with a chain of references as the schema."""
    from aria.cli import main

    (folder / "schema.json").write_text(json.dumps(aliases(4000)))
    picture = Path(__file__).parents[2] / "examples" / "pictures" / "word.png"
    sys.argv = ["aria", "describe", str(picture), "--schema", str(folder / "schema.json"), "--device", "cpu"]
    main()


def here() -> None:
    """Without workers: what passes the limits is harmless, even on a thread with a small stack."""
    import threading

    from aria.engine.grammar import Grammars
    from aria.processor import AriaTokenizer
    from tests.helpers import small_tokenizer

    tokenizer = AriaTokenizer(small_tokenizer.model())
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    found = {}

    def compile_all() -> None:
        for name, constraint in {
            "linked": linked(1200), "parentheses": parentheses(900), "aliases": aliases(4000), "deep": nested(90),
        }.items():  # fmt: skip
            try:
                grammars.compile(constraint)
                found[name] = "compiled"
            except ValueError as error:
                found[name] = str(error)

    threading.stack_size(1 << 20)
    thread = threading.Thread(target=compile_all)
    thread.start()
    thread.join()
    print(json.dumps(found))


if __name__ == "__main__":
    {"serve": serve, "batch": batch, "describe": describe, "here": here}[sys.argv[1]](*map(Path, sys.argv[2:]))
