"""What commands share: the program, its consoles, common options, and options made from settings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from aria.engine.sampling_params import SamplingParams
from aria.media.limits import MediaSettings
from aria.settings import Field, Setting, fields_of

Command = TypeVar("Command", bound=Callable[..., Any])


class _Parameters:
    """Shows no value type after flags in help."""

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
    """A group of commands with uniform help."""

    def __init__(self, **settings: Any):
        shared = {"help_option_names": ["-h", "--help"]}
        super().__init__(cls=_Group, context_settings=shared, no_args_is_help=True, add_completion=False, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Command], Command]:
        return super().command(name, cls=_Command, **settings)


app = Commands(
    name="aria",
    help="Aria, the open multimodal mixture-of-experts model. Without --model, the packaged nano model answers.",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

SMALL_MODEL = 100_000_000
"""Number of active parameters below which one CPU core is fastest."""

Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub repository; default: packaged nano.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA if available.")]
MaxImageSize = Annotated[int | None, typer.Option(help="Side of a crop in pixels; default: the model's.")]
Schema = Annotated[Path | None, typer.Option(help="File with a JSON schema that answers follow.")]
NumFrames = Annotated[int | None, typer.Option(help="Number of frames taken of a video; default: 128.")]
Pages = Annotated[str | None, typer.Option(help="Pages of a document, such as 1-3,7; default: all.")]
AtOnce = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of files or requests in flight; default: the batch size.")
]
ServedNames = Annotated[
    list[str] | None,
    typer.Option(help="Name of the model in requests; repeatable. Default: aria-nano, or the folder's name."),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="LoRA adapter to answer with: a folder or Hub repository.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=FOLDER", help="LoRA adapter that requests select by NAME; repeatable."),
]


class Options:
    """Command-line options made from the fields of a settings class, which declares their defaults, ranges and help.

    Args:
        kind: A dataclass whose fields are annotated with :class:`Setting`.
        names: The fields to include; default: all that name an option.
        changes: Defaults that differ from those of the class.
        settings: Settings of fields that are not annotated.
        panel: Heading of the options in ``--help``.
    """

    def __init__(
        self,
        kind: type,
        *,
        names: Collection[str] | None = None,
        changes: Mapping[str, Any] | None = None,
        settings: Mapping[str, Setting] | None = None,
        panel: str | None = None,
    ):
        fields = fields_of(kind)
        if settings is not None:
            hints = get_type_hints(kind)
            fields = {name: Field(hints[name], setting) for name, setting in settings.items()}
        defaults = {field.name: field.default for field in dataclasses.fields(kind)} | dict(changes or {})
        self._fields = {
            name: field
            for name, field in fields.items()
            if field.setting.option is not None and (names is None or name in names)
        }
        self.parameters = [_parameter(name, field, defaults[name], panel=panel) for name, field in self._fields.items()]

    def take(self, given: dict[str, Any]) -> dict[str, Any]:
        """Remove this group's values from all that a command was given, and return them as values of the fields."""
        return {name: _field_value(field, given.pop(name)) for name, field in self._fields.items()}


def with_options(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with groups of options; its parameter of a group's name gets a dict of field values."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        parameters = [parameter for name, parameter in signature.parameters.items() if name not in groups]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        parameters += [parameter for group in groups.values() for parameter in group.parameters]

        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(**{name: group.take(given) for name, group in groups.items()}, **given)

        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def _parameter(name: str, field: Field, default: Any, *, panel: str | None) -> inspect.Parameter:
    setting = field.setting
    option = typer.Option(
        setting.option,
        help=setting.help,
        min=setting.minimum,
        max=setting.maximum,
        metavar=None if setting.unit is None else setting.unit.upper(),
        rich_help_panel=panel,
    )
    listed = _element_type(field.type)
    kind = field.type if listed is None else list[listed] | None  # type: ignore[valid-type]
    default = default if listed is None else list(default or ()) or None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _field_value(field: Field, value: Any) -> Any:
    """The value of a field that an option's value stands for: lists are tuples, and ``none`` is None."""
    if _element_type(field.type) is not None:
        return tuple(value or ())
    return None if value == "none" and field.optional else value


def _element_type(hint: Any) -> Any:
    """The type of the elements of a sequence, also of an optional one; None for other types."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) in (tuple, Sequence):
            return get_args(one)[0]
    return None


ANSWER_TOKENS = 512
"""Default of ``--max-tokens``: answers at the terminal are longer than the library's default."""
SAMPLING = Options(
    SamplingParams,
    changes={"max_tokens": ANSWER_TOKENS},
    panel="Sampling",
    settings={
        "max_tokens": Setting(help="Maximum number of generated tokens.", option="--max-tokens"),
        "min_tokens": Setting(help="Minimum number of tokens before an answer may end.", option="--min-tokens"),
        "temperature": Setting(help="Sampling temperature, 0 (greedy) to 2.", option="--temperature"),
        "top_p": Setting(help="Nucleus sampling threshold (top-p).", option="--top-p"),
        "top_k": Setting(help="Number of most likely tokens to sample from; 0 is all.", option="--top-k"),
        "min_p": Setting(help="Drop tokens less likely than this times the most likely one.", option="--min-p"),
        "repetition_penalty": Setting(
            help="Above 1 discourages tokens of the prompt and the answer.", option="--repetition-penalty"
        ),
        "frequency_penalty": Setting(
            help="-2 to 2; per occurrence of a token in the answer.", option="--frequency-penalty"
        ),
        "presence_penalty": Setting(help="-2 to 2; for tokens that occur in the answer.", option="--presence-penalty"),
        "stop": Setting(help="Text that ends an answer; repeatable.", option="--stop"),
        "ignore_eos": Setting(help="Continue past the end of the turn, up to --max-tokens.", option="--ignore-eos"),
        "seed": Setting(help="Random seed, for repeatable sampling.", option="--seed"),
    },
)
_UNTRUSTED = dataclasses.asdict(MediaSettings.untrusted())
MEDIA_WORKERS = Options(MediaSettings, names=["workers"], changes=_UNTRUSTED)
REQUEST_MEDIA = Options(MediaSettings, names=["local_folders", "private_addresses", "workers"], changes=_UNTRUSTED)
ALL_MEDIA = Options(MediaSettings, changes=_UNTRUSTED, panel="Media")
"""Each with the defaults for untrusted input."""


def _version(requested: bool) -> None:
    if requested:
        out.print(version("aria-moe"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Options of the program; :func:`main` accepts ``--debug`` anywhere on the command line."""


def read_schema(file: Path | None) -> dict[str, Any] | None:
    """Read a JSON schema; None without a file.

    Raises:
        FileNotFoundError, ValueError: The file cannot be read, or is not a JSON object.
    """
    from aria.hub import read_json

    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"no JSON schema at {str(file)!r}; check the path")
    return read_json(file)


def read_keys(file: Path) -> list[str]:
    """Read API keys from a file, one per line.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no key, or one that cannot be sent in a header.
    """
    from aria.hub import read_text

    if not file.exists():
        raise FileNotFoundError(f"no file of API keys at {str(file)!r}; check the path")
    keys = [line.strip() for line in read_text(file, 1 << 20).removeprefix("\ufeff").split("\n") if line.strip()]
    if not keys:
        raise ValueError(f"{file} holds no API key, so that anybody could use the server; write one key per line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"{file}: key {number} holds a character that is not allowed in a header; use printable ASCII without "
                "spaces, one key per line"
            )
    return keys


def read_adapters(named: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Parse ``NAME=FOLDER`` arguments; without a name, the adapter is named after its folder.

    An existing folder with ``=`` in its path is taken as a folder.

    Args:
        named: Values of ``--adapter``.
        taken: Names of the model.

    Returns:
        Folders by name.

    Raises:
        FileNotFoundError: A folder does not exist or holds no adapter. Checked before the model is loaded.
        ValueError: A name or folder is missing, or a name is used twice.
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
    """Limit small models on the CPU to one core: their steps are too short to share.

    Measured with nano on 2 cores: 0.28 s per answer on one core; on both 0.3 s at best, and 4 s on a busy machine.
    """
    import torch

    small = engine.config.active_parameters() < SMALL_MODEL
    if engine.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
