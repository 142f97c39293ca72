"""The reference that is made from the program: command line, recipe keys, server settings, routes, Python.

``python scripts/docs/reference.py FOLDER`` writes the pages; the site gets them from :func:`pages`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer.main

PYTHON = {
    "Inference": ("aria.engine.Engine", "aria.engine.AsyncEngine", "aria.engine.SamplingParams"),
    "Like transformers": ("aria.pretrained.AriaForConditionalGeneration", "aria.processor.AriaProcessor"),
    "Configuration and media": ("aria.config.AriaConfig", "aria.media.limits.MediaSettings"),
    "Checkpoints and adapters": ("aria.checkpoint",),
    "Serving": ("aria.serve.app.create_app",),
}
"""What the page on Python documents, by its headings."""


def pages() -> dict[str, str]:
    """All pages of the reference, in Markdown, by their place in the site."""
    return {
        "reference/cli.md": command_line(),
        "reference/recipe.md": recipe_keys(),
        "reference/server.md": server_settings(),
        "reference/routes.md": routes(),
        "reference/python.md": python(),
        "reference/operations.md": operations(),
    }


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table without its empty columns. Pipes are escaped, except in code, which would show the escape."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(line[n]) for n in kept) + " |" for line in lines)


def _cell(text: str) -> str:
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in re.split(r"(`[^`]*`)", text))


def prose(text: str | None) -> str:
    """A docstring as Markdown on one line."""
    text = re.sub(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`", r"`\1`", text or "")
    return " ".join(text.replace("``", "`").split())


def code(value: object) -> str:
    """A value as code."""
    return f"`{value}`"


def command_line() -> str:
    """Every command with its arguments and options."""
    from aria import cli

    parts = ["# Command line", "Generated from the program; `aria COMMAND --help` shows the same."]
    for name, command in _commands("aria", typer.main.get_command(cli.app)):
        parts += [f"## {name}", prose(command.help)]
        rows = [_parameter(one) for one in command.params if one.name != "help" and not getattr(one, "hidden", False)]
        if rows:
            parts.append(table(("argument or option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for one in sorted(command.commands):
            yield from _commands(f"{name} {one}", command.commands[one])
    else:
        yield name, command


def _parameter(one: Any) -> tuple[str, str, str]:
    argument = one.param_type_name == "argument"
    names = one.name.upper() if argument else ", ".join([*one.opts, *one.secondary_opts])
    default = one.default() if callable(one.default) else one.default
    shown = "required" if one.required else "" if default in (None, False, (), []) else code(default)
    help_text = prose(getattr(one, "help", None))
    variable = getattr(one, "envvar", None)
    if variable:
        help_text += f" Also from the environment: {code(variable)}."
    return code(names), shown, help_text


def documented(kind: type) -> dict[str, str]:
    """The docstrings that stand below the fields of a class, by field."""
    found = {}
    for base in reversed(kind.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = prose(str(below.value.value))
    return found


def _default(field: Any, instance: object | None) -> str:
    if instance is not None:
        value = getattr(instance, field.name)
    elif field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20 and value % (1 << 20) == 0:
        return code(f"{value >> 20} MiB")
    return code(repr(value))


def fields_table(kind: type, instance: object | None = None) -> str:
    """The fields of a dataclass: name, type, default, command-line option if it has one, meaning."""
    below, hints, rows = documented(kind), get_type_hints(kind, include_extras=True), []
    for one in dataclasses.fields(kind):
        if dataclasses.is_dataclass(getattr(instance, one.name, None)):
            continue
        notes = [note for note in getattr(hints[one.name], "__metadata__", ()) if hasattr(note, "help")]
        option = "".join(code(note.option) for note in notes if getattr(note, "option", None))
        meaning = " ".join([prose(note.help) for note in notes] + [below.get(one.name, "")]).strip()
        rows.append((code(one.name), code(_type(hints[one.name])), _default(one, instance), option, meaning))
    return table(("key", "type", "default", "option", "meaning"), rows)


def _type(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    return re.sub(r"\b(?:typing|collections\.abc|pathlib(?:\._local)?)\.", "", text)


def recipe_keys() -> str:
    """Every section and key of a recipe."""
    from aria.train.recipe import Recipe

    parts = [
        "# Recipe keys",
        "Generated from the settings themselves. [Training](../training.md) explains how they are used together.",
    ]
    recipe = Recipe()
    sections = [one for one in dataclasses.fields(Recipe) if dataclasses.is_dataclass(getattr(recipe, one.name))]
    plain = [one for one in dataclasses.fields(Recipe) if one not in sections]
    meanings = documented(Recipe)
    rows = [
        (
            code(one.name),
            code(_type(get_type_hints(Recipe)[one.name])),
            _default(one, recipe),
            meanings.get(one.name, ""),
        )
        for one in plain
    ]
    parts += ["## At the top", table(("key", "type", "default", "meaning"), rows)]
    for one in sections:
        settings = getattr(recipe, one.name)
        about = re.sub(r"^\S+?``\[\w+\]``[^:]*:\s*|^``\[\w+\]``[^:.]*[:.]?\s*", "", type(settings).__doc__ or "")
        parts += [f"## [{one.name}]", _capital(prose(about.partition("\n\n")[0]))]
        parts.append(fields_table(type(settings), settings))
    return "\n\n".join(part for part in parts if part) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def server_settings() -> str:
    """Settings of the server, and limits on media as the server has them."""
    from aria.media.limits import MediaSettings
    from aria.serve.settings import ServerSettings

    settings = ServerSettings()
    parts = [
        "# Server settings",
        "Generated from the settings themselves. [`aria serve`](cli.md#aria-serve) sets them by options; in Python "
        "they are arguments of `create_app`. [Security](../security.md) says which of them limit a client.",
        "## ServerSettings",
        fields_table(ServerSettings, settings),
        "## MediaSettings",
        "As the server has them (`MediaSettings.untrusted()`); a library on one's own machine has wider ones.",
        fields_table(MediaSettings, settings.media),
    ]
    return "\n\n".join(parts) + "\n"


def routes() -> str:
    """Every route with the fields of its body, from the server's own OpenAPI description."""
    from aria import AsyncEngine
    from aria.serve.app import create_app
    from aria.serve.settings import ServerSettings

    with AsyncEngine(device="cpu", max_model_len=1024, max_batch=1) as engine:
        described = create_app(engine, ServerSettings(allow_adapter_updates=True)).openapi()
    schemas = described["components"]["schemas"]
    parts = [
        "# Routes",
        "Generated from the server's OpenAPI description, which a running server has at `/openapi.json`. "
        "[Serving](../serving.md) explains how the fields are used.",
    ]
    named: dict[str, None] = {}
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            parts += [f"## {method.upper()} {path}", prose(route.get("description"))]
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts.append(_properties(schemas.get(_name(body), {}), named))
            others = sorted(status for status in route["responses"] if status != "200")
            parts.append("Errors: " + ", ".join(others) + ".")
    parts += ["## Types", "What fields above are made of."]
    shown: set[str] = set()
    while left := [name for name in named if name in schemas and name not in shown]:
        for name in left:
            parts += [f"### {name}", prose(schemas[name].get("description")), _properties(schemas[name], named)]
        shown.update(left)
    return "\n\n".join(part for part in parts if part) + "\n"


def _properties(schema: dict[str, Any], named: dict[str, None]) -> str:
    """A table of an object's fields; the names of the types that they refer to are added to ``named``."""
    properties = schema.get("properties", {})
    named.update(dict.fromkeys(re.findall(r"#/components/schemas/(\w+)", json.dumps(properties))))
    rows = [
        (code(name), _kind(one), _shown(name, one, schema), prose(one.get("description")))
        for name, one in properties.items()
    ]
    return table(("field", "type", "default", "meaning"), rows) if rows else ""


def _name(schema: dict[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return code(_name(schema))
    if "const" in schema:
        return code(repr(schema["const"]))
    if "enum" in schema:
        return " or ".join(code(repr(value)) for value in schema["enum"])
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_kind(one) for one in choices if one.get("type") != "null"))
    if schema.get("type") == "array":
        return f"array of {_kind(schema.get('items', {}))}"
    return code(schema.get("type", "any"))


def _shown(name: str, schema: dict[str, Any], body: dict[str, Any]) -> str:
    if name in body.get("required", ()):
        return "required"
    return "" if schema.get("default") is None else code(repr(schema["default"]))


def python() -> str:
    """Directives for mkdocstrings, which shows docstrings."""
    parts = [
        "# Python",
        "Generated from docstrings. `from aria import Engine` and the like; `aria.__all__` lists the names.",
    ]
    for heading, names in PYTHON.items():
        parts.append(f"## {heading}")
        parts += [f"::: {name}\n    options:\n      heading_level: 3" for name in names]
    return "\n\n".join(parts) + "\n"


def operations() -> str:
    """The operations' specification."""
    about = "Operations of the model in plain PyTorch: the specification that fast implementations are tested against."
    options = "    options:\n      heading_level: 2\n      show_root_heading: false\n      show_root_toc_entry: false"
    return f"# Operations\n\n{about}\n\n::: aria.ops.reference\n{options}\n"


def main() -> None:
    """Write the pages into a folder."""
    for page, text in pages().items():
        file = Path(sys.argv[1]) / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
