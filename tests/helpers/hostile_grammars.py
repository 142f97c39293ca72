"""Schemas and grammars that crash, hang or grow, and a server, a batch and a description that are asked to follow them.

Run as a program, each in a process of its own: what is wrong here ends the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Schema = dict[str, Any]


def aliases(length: int) -> Schema:
    """References, each of which leads to the next and to nothing else."""
    definitions: Schema = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "null"}}}


def linked(length: int) -> Schema:
    """A list: definitions that lead from one to the next by a property that may be null."""
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
    """Definitions that use the next one twice."""
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
    """Lists of lists, any of which may be any of many kinds: the number of ways to read ``[[[`` grows with each."""
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
    """Multiples of many numbers, which are told apart digit by digit."""
    return {"anyOf": [{"type": "integer", "multipleOf": n} for n in range(1000 - count, 1000)]}


def parentheses(rules: int) -> str:
    """Rules that lead from one to the next, from within 25 groups: up to 50 KB of stack each."""
    lines = [f"r{n}: {'(' * 25}'b' r{n + 1}{')?' * 25}".replace("'", '"') for n in range(rules)]
    return "\n".join(["start: r0", *lines, f'r{rules}: "a"'])


def doubled_terminals(count: int) -> str:
    """One text of 2^count letters, without a choice."""
    return "\n".join(["start: T0", *(f"T{n}: T{n + 1} T{n + 1}" for n in range(count)), f'T{count}: "a"'])


def large(sections: int, properties: int) -> Schema:
    """As descriptions of interfaces have it: sections, with properties of all kinds, defined once each."""
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
    """Fields of chats that were the end of a server, or of one of its threads."""
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
    """Ask a server for each, one after the other; then whether it still answers."""
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
    """Answer a file of requests, one of which is a chain of references."""
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
    """Describe a picture by a chain of references."""
    from aria.cli import main

    (folder / "schema.json").write_text(json.dumps(aliases(4000)))
    picture = Path(__file__).parents[2] / "examples" / "pictures" / "word.png"
    sys.argv = ["aria", "describe", str(picture), "--schema", str(folder / "schema.json"), "--device", "cpu"]
    main()


def here() -> None:
    """Without workers: what the limits let pass does no harm, on a thread whose own stack is small."""
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
