"""Untrusted chat templates in the sandbox: rejected, or text that reveals nothing of Python's internals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unittest import mock

from aria import templates
from tests.fuzz.draw import Draw

LONGEST = 400
MEMORY = 128 << 20
_VALUES = {
    "messages": [{"role": "user", "content": "hi", "parts": [1, 2]}],
    "tools": None,
    "add_generation_prompt": True,
}
_STEPS = (
    *(
        ".__class__",
        ".__mro__",
        ".__subclasses__()",
        ".__init__",
        ".__globals__",
        ".__builtins__",
        "['__class__']",
        "[0]",
    ),
    *(
        "|attr('__class__')",
        "|map(attribute='__class__')|list",
        ".format",
        ".format_map",
        "|string",
        "|tojson",
        "|first",
    ),
    *(
        "|xmlattr",
        "|join",
        "()",
        ".mro()",
        ".__code__",
        ".gi_frame",
        ".f_globals",
        "['_' ~ '_class__']",
        ".func_globals",
    ),
    *(".update({})", ".append(1)", ".pop()", "|pprint", "|items|list", "('{0.__class__}')", ".__getattribute__('x')"),
)
_BASES = (
    *("messages", "''", "messages[0].content", "lipsum", "cycler", "joiner", "namespace()", "range", "self", "caller"),
    *("raise_exception", "strftime_now", "dict()", "'{0.__class__.__mro__}'", "loop", "varargs", "'%s'|format(lipsum)"),
)
_FORMS = (
    "{{{{ {0} }}}}", "{{% set x = {0} %}}{{{{ x }}}}", "{{% for x in [1] %}}{{{{ {0} }}}}{{% endfor %}}",
    "{{% macro m() %}}{{{{ {0} }}}}{{% endmacro %}}{{{{ m() }}}}",
    "{{% generation %}}{{{{ {0} }}}}{{% endgeneration %}}",
    "{{% if {0} is defined %}}{{{{ {0} }}}}{{% endif %}}", "{{% call {0}() %}}a{{% endcall %}}", "{{% include {0} %}}",
    "{{% import {0} as x %}}{{{{ x }}}}", "{{% filter upper %}}{{{{ {0} }}}}{{% endfilter %}}",
)  # fmt: skip
WORDS = (*_STEPS, *_BASES, "{{", "}}", "{%", "%}", "{#", "|", "~")
_CLASSES = {"dict", "range", "jinja2.utils.Cycler", "jinja2.utils.Joiner", "jinja2.utils.Namespace"}
"""That templates know by name."""
_CLASS = re.compile(r"<class '([^']+)'>")
_INSIDES = ("<built-in", "<module", "<frame", "<code object", "__builtins__", "/site-packages/", "subprocess")


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    template = "".join(_part(draw) for _ in range(1 + draw.below(3)))
    known = templates._known
    with mock.patch.object(templates, "_known", {}):
        try:
            names = templates.variables_of(template)
            text = templates.render(template, _VALUES)
        except ValueError as error:
            assert str(error).startswith(templates.NAME)
            return
    assert templates._known is known
    assert all(isinstance(name, str) for name in names)
    found = [inside for inside in _INSIDES if inside in text and inside not in template]
    found += {*_CLASS.findall(text)} - _CLASSES - {*_CLASS.findall(template)}
    assert not found, f"{template!r} writes {text!r:.500}"


def _part(draw: Draw) -> str:
    if draw.byte() % 8 == 7:
        return draw.bytes(30).decode("latin-1").replace("**", "").replace("range", "")
    said = draw.one(_BASES) + "".join(draw.one(_STEPS) for _ in range(draw.below(6)))
    return draw.one(_FORMS).format(said)


def seeds() -> Iterator[bytes]:
    yield from (
        bytes([1, form, base, 3, base, step, step + 1, form])
        for form in range(10)
        for base in range(4)
        for step in (0, 8, 16)
    )
