"""The command line: what stands behind ``aria chat``, ``aria serve`` and the other commands."""

from __future__ import annotations

import sys

from rich.markup import escape

from aria.cli import chat, data, jobs, models, serve, train  # noqa: F401  (each adds its commands)
from aria.cli.options import app, err

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of ``aria``: an error is one line and exit code 2; ``--debug`` shows where it came from."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="aria")
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        err.print(f"[red]error:[/red] {escape(said)}", soft_wrap=True)
        sys.exit(2)
