"""The command line: ``aria chat``, ``aria serve`` and the other commands."""

from __future__ import annotations

import sys

from rich.markup import escape

from aria.cli import chat, data, jobs, models, serve, train  # noqa: F401  (each registers its commands)
from aria.cli.options import app, err

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of ``aria``. Errors are one line and exit code 2; ``--debug`` shows the traceback."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="aria")
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
        sys.exit(2)
