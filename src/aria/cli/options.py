"""What all commands share: the program, its two consoles, options with one meaning everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup


class _Parameters:
    """Flags take no value, so help shows none behind them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the class that this is mixed into
        for param in params:
            if getattr(param, "is_flag", False) and param.metavar is None:
                param.metavar = ""
        return params


class _Command(_Parameters, TyperCommand):
    pass


class _Group(_Parameters, TyperGroup):
    pass


class Commands(typer.Typer):
    """A group of commands, with the same help everywhere."""

    def __init__(self, **settings: Any):
        shared = {"help_option_names": ["-h", "--help"]}
        super().__init__(cls=_Group, context_settings=shared, no_args_is_help=True, add_completion=False, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, cls=_Command, **settings)


app = Commands(
    name="aria",
    help="Aria, the open multimodal mixture-of-experts model. Without --model, the packaged nano model answers.",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

SMALL_MODEL = 100_000_000
"""Active parameters under which one core of a CPU does all the work."""

Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub repository; default: packaged nano.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.")]
MaxImageSize = Annotated[int | None, typer.Option(help="Side of a crop in pixels; default: the model's.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy, up to 2.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling threshold.")]
TopK = Annotated[int, typer.Option(help="Number of likeliest tokens to sample from; 0 is all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
MinTokens = Annotated[int, typer.Option(help="Minimum number of tokens before an answer may end.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages tokens of the prompt and the answer.")]
FrequencyPenalty = Annotated[float, typer.Option(help="-2 to 2; per occurrence of a token in the answer.")]
PresencePenalty = Annotated[float, typer.Option(help="-2 to 2; for tokens that the answer holds.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text at which an answer ends; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end of the turn, to --max-tokens.")]
Schema = Annotated[Path | None, typer.Option(help="File with a JSON schema that answers follow.")]
NumFrames = Annotated[int | None, typer.Option(help="Number of frames of a clip; default: 128.")]
Pages = Annotated[str | None, typer.Option(help="Pages of a document, such as 1-3,7; default: all.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
MediaWorkers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Confined processes that decode media; default: one per core, up to 8. 0: decode in this process."
    ),
]
AtOnce = Annotated[
    int | None, typer.Option(min=1, help="Most files or requests in flight; default: what the engine runs together.")
]
ServedNames = Annotated[
    list[str] | None, typer.Option(help="What requests call the model; repeatable. Default: aria-nano, or its folder.")
]
Adapter = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder or Hub repository of a LoRA adapter that answers.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=FOLDER", help="LoRA adapter that requests ask for by NAME; repeatable."),
]
AllowLocal = Annotated[list[Path] | None, typer.Option(help="Folder whose files requests may name; repeatable.")]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private-addresses", help="Requests may fetch from this machine and its network.")
]


def _version(asked: bool) -> None:
    if asked:
        out.print(version("aria-moe"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """Options of all commands; :func:`main` takes ``--debug`` out of the arguments wherever it stands."""


def read_schema(file: Path | None) -> dict[str, Any] | None:
    """The JSON schema in a file; None where there is no file.

    Raises:
        FileNotFoundError, ValueError: it cannot be read, or holds no object.
    """
    from aria.hub import read_json

    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"no JSON schema at {str(file)!r}; check the path")
    return read_json(file)


def read_keys(file: Path) -> list[str]:
    """The API keys in a file, one a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none, with which anybody could use the server, or what no client can send.
    """
    from aria.hub import read_text

    if not file.exists():
        raise FileNotFoundError(f"no file of API keys at {str(file)!r}; check the path")
    keys = [line.strip() for line in read_text(file, 1 << 20).removeprefix("\ufeff").split("\n") if line.strip()]
    if not keys:
        raise ValueError(f"{file} holds no API key, so that anybody could use the server; write one a line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"{file}: key {number} holds a character that no header carries; use letters, digits and signs of "
                "ASCII, one key a line"
            )
    return keys


def read_adapters(named: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """``NAME=FOLDER`` -> folders by name; a folder alone is called as it is, also one with ``=`` in its path.

    Args:
        named: what was given as ``--adapter``.
        taken: names of the model.

    Raises:
        FileNotFoundError: a folder is not there, or holds no adapter; told here, before a model is read for minutes.
        ValueError: no name, no folder, one name twice, or one of the model's.
    """
    from aria.checkpoint.adapter import base_of
    from aria.hub import model_name

    folders: dict[str, str] = {}
    for one in named:
        name, equals, folder = one.partition("=")
        if not equals or Path(one).expanduser().is_dir():
            name, folder = model_name(one), one
        if not name or not folder:
            raise ValueError(f"--adapter is {one!r:.200}; expected NAME=FOLDER")
        if name in folders:
            raise ValueError(f"two adapters are called {name!r}; give one of them another name: --adapter NAME=FOLDER")
        if name in taken:
            raise ValueError(f"{name!r} is the name of the model and of an adapter; give one of them another")
        folders[name] = folder
    for folder in folders.values():
        base_of(folder)
    return folders


def share_work(engine: Any) -> None:
    """On the CPU a small model runs on one core: its steps are over before two have agreed on them.

    Measured on nano, 2 cores: 0.28 s an answer on one; on both 0.3 s at best, 4 s while something else runs.
    """
    import torch

    small = engine.config.active_parameters() < SMALL_MODEL
    if engine.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
