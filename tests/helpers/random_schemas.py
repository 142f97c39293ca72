"""Random JSON schemas, and whether a text is a valid value of one."""

from __future__ import annotations

import json
import random

import jsonschema_rs


def closed(**properties: object) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def random_schema(choice: random.Random, depth: int = 3) -> dict[str, object]:
    """A schema whose values are of bounded length, so that even random weights finish most of them."""
    kinds = ["string", "integer", "number", "boolean", "enum", "pattern", "format", "null"]
    kind = choice.choice(kinds + ["object", "array", "anyOf", "object"] * (depth > 0))
    if kind == "object":
        names = choice.sample(["name", "größe", "a b", "x", 'q"uote', "世界"], choice.randrange(4))
        schema = closed(**{name: random_schema(choice, depth - 1) for name in names})
        return schema | {"required": choice.sample(names, choice.randrange(len(names) + 1))}
    if kind == "array":
        fewest = choice.randrange(3)
        return {
            "type": "array", "items": random_schema(choice, depth - 1),
            "minItems": fewest, "maxItems": fewest + choice.randrange(3),
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [random_schema(choice, depth - 1), {"type": "null"}]}
    return {
        "string": {"type": "string", "minLength": choice.randrange(3), "maxLength": choice.randrange(3, 9)},
        "integer": {"type": "integer", "minimum": choice.randrange(-99, 0), "maximum": choice.randrange(1, 5000)},
        "number": {"type": "number", "multipleOf": 0.25, "exclusiveMinimum": -10, "maximum": 10},
        "enum": {"enum": choice.sample(["yes", "no", 7, None, True, ["a", {"b": 1.5}], "naïve"], 3)},
        "pattern": {"type": "string", "pattern": choice.choice(["^[A-Z]{2}-[0-9]{3}$", "^(ab|c){1,4}$"])},
        "format": {"type": "string", "format": choice.choice(["date", "uuid", "ipv4"])},
    }.get(kind, {"type": kind})


def is_valid(text: str, schema: object) -> bool:
    return jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(text))
