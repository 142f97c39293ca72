"""A griffe extension: references in docstrings (``:class:`~aria.Engine```) become code, which Markdown can show."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object once it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace roles by the last part of the name that they refer to."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda m: f"`{m[1].removeprefix('aria.')}`", obj.docstring.value)
