"""Chat templates in Jinja, rendered in a sandbox and, where there are worker processes, in one of these.

Whoever publishes a model writes its template. The sandbox keeps that from what Python can do, and not from running
without end or filling all memory; a process can be limited and killed.
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
"""Of what a template writes."""
NAME = "the chat template"
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode keeps free of characters for ever; they pass through templates as they are."""


def render(template: str, values: Mapping[str, Any], workers: Workers | None = None) -> str:
    """What a template writes.

    Args:
        template: in Jinja, as ``tokenizer_config.json`` has it.
        values: of its variables, as JSON has them; other objects become text.
        workers: where it runs; None: in this process, where nothing stops it.

    Raises:
        ValueError: it cannot be parsed or rendered, or takes too long, too much memory or too much text.
    """
    return str(_run(_render, template, values, workers))


def variables_of(template: str, workers: Workers | None = None) -> frozenset[str]:
    """Names that a template reads.

    Raises:
        ValueError: it cannot be parsed.
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
    except Exception as error:  # it is a program, and raises what it likes
        raise ValueError(f"{NAME} cannot be rendered: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{NAME} writes {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken")
    return text


def _variables(job: Any) -> list[str]:
    template, _ = json.load(job.file())
    return sorted(_compile(template)[1])


@lru_cache(maxsize=32)
def _compile(template: str) -> tuple[jinja2.Template, frozenset[str]]:
    """A template and the variables that it reads."""
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
    except Exception as error:  # constants in it are computed
        raise ValueError(f"{NAME} cannot be parsed: {error}") from None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, around what an assistant said: rendered as if it were not there."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 reads it only

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    """The filter ``tojson`` as transformers has it, which writes characters as they are and not as HTML."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, **settings)
    if ensure_ascii:
        for free in NONCHARACTERS:
            text = text.replace(json.dumps(free)[1:-1], free)
    return text
