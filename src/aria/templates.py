"""Render Jinja chat templates in Jinja's sandbox and, if there are worker processes, in one of them.

Templates come with a model and are untrusted. The sandbox keeps them from accessing Python, but not from running
forever or exhausting memory; a worker process can be limited and killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from aria.workers import LocalJob, Workers

RENDER_SECONDS = 10.0
MAX_CHARACTERS = 64 << 20
"""Maximum length of the rendered text."""
NAME = "the chat template"
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode reserves as noncharacters. They pass through templates unchanged."""


def render(template: str, values: Mapping[str, Any], workers: Workers | None = None) -> str:
    """Render a template.

    Args:
        template: A Jinja template, as in ``tokenizer_config.json``.
        values: Values of its variables, JSON-serialisable; other objects become strings.
        workers: Worker processes to render in; None: render in this process, without limits.

    Raises:
        ValueError: It cannot be parsed or rendered, or exceeds the limits on time, memory or length.
    """
    return str(_run(_render, template, values, workers))


def variables_of(template: str, workers: Workers | None = None) -> frozenset[str]:
    """Names of the variables that a template uses.

    Raises:
        ValueError: It cannot be parsed.
    """
    if template not in _known:
        if len(_known) >= 32:
            _known.clear()
        _known[template] = frozenset(_run(_variables, template, {}, workers))
    return _known[template]


_known: dict[str, frozenset[str]] = {}


def _run(function: Any, template: str, values: Mapping[str, Any], workers: Workers | None) -> Any:
    data = json.dumps([template, values], default=str).encode()
    if workers is None:
        return function(LocalJob([data], {}))
    return workers.run(function, name=NAME, seconds=RENDER_SECONDS, files=[data])[0]


def _render(job: Any) -> str:
    template, values = json.load(job.file())
    program, _ = _compile(template)
    try:
        text = program.render(values)
    except MemoryError:
        raise ValueError(f"{NAME} takes more memory than there is") from None
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{NAME} cannot be rendered: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{NAME} produces {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed")
    return text


def _variables(job: Any) -> list[str]:
    template, _ = json.load(job.file())
    return sorted(_compile(template)[1])


@lru_cache(maxsize=32)
def _compile(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """Compile a template; returns it and the names of its variables."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    environment.filters["tojson"] = _json
    try:
        known = jinja2.meta.find_undeclared_variables(environment.parse(template)) - {"raise_exception", "strftime_now"}
        return environment.from_string(template), frozenset(known)
    except MemoryError:
        raise ValueError(f"{NAME} takes more memory than there is") from None
    except Exception as error:  # constant expressions are evaluated
        raise ValueError(f"{NAME} cannot be parsed: {error}") from None


class _Generation(jinja2.ext.Extension):
    """The ``{% generation %}`` block around answers of the assistant, rendered as if it were absent."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only reads it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """The ``tojson`` filter of transformers, which does not escape characters for HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, **settings)
    if ensure_ascii:
        for free in NONCHARACTERS:
            text = text.replace(json.dumps(free)[1:-1], free)
    return text
