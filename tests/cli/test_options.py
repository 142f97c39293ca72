"""Options of commands come from the settings that they set: names, defaults, ranges and help stand there alone."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.main

from aria import cli
from aria.cli.options import Options, with_options
from aria.engine import SamplingParams
from aria.media.limits import MediaSettings
from aria.serve.settings import ServerSettings
from aria.settings import Setting, check_ranges, fields_of

FOLDER = Path(cli.__file__).parent
KINDS = (ServerSettings, MediaSettings, SamplingParams)


def options(command: str) -> dict[str, Any]:
    """Options of a command by name."""
    params = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    return {name: param for param in params for name in param.opts}


def numeric_defaults(source: str) -> Iterator[tuple[str, float]]:
    """Parameters and keyword arguments that are given a number."""
    for node in ast.walk(ast.parse(source)):
        pairs: list[tuple[str | None, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            given = node.args
            positional = [*given.posonlyargs, *given.args]
            pairs += [(arg.arg, value) for arg, value in zip(reversed(positional), reversed(given.defaults))]  # noqa: B905
            pairs += [(arg.arg, value) for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        elif isinstance(node, ast.keyword):
            pairs.append((node.arg, node.value))
        for name, value in pairs:
            numbers = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)] if value is not None else []
            for number in numbers:
                if name is not None and isinstance(number, int | float) and not isinstance(number, bool):
                    yield name, number


def settings_names() -> set[str]:
    """Fields of all settings, as fields and as the parameters that their options would be."""
    names = {field.name for kind in KINDS for field in dataclasses.fields(kind)}
    named = (field.setting.option for kind in KINDS for field in fields_of(kind).values())
    return names | {option.lstrip("-").replace("-", "_") for option in named if option is not None}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_no_default_of_a_setting_is_restated(file: Path) -> None:
    names = settings_names()
    restated = [pair for pair in numeric_defaults(file.read_text(encoding="utf-8")) if pair[0] in names]
    assert not restated


def test_a_restated_default_is_found() -> None:
    source = "def serve(host='x', max_queue: int = 256, *, max_image_bytes=64 << 20): MediaSettings(max_pages=8)"
    assert {name for name, _ in numeric_defaults(source)} == {"max_queue", "max_image_bytes", "max_pages"}
    assert {"max_queue", "max_image_bytes", "max_pages"} <= settings_names()


@pytest.mark.parametrize(("kind", "settings"), [(ServerSettings, ServerSettings()),
                                                (MediaSettings, MediaSettings.untrusted())])  # fmt: skip
def test_options_of_the_server_have_the_defaults_of_its_settings(kind: type, settings: Any) -> None:
    known = options("serve")
    for name, field in fields_of(kind).items():
        if field.setting.option is not None:
            default = known[field.setting.option].default
            assert (default or None) == (getattr(settings, name) or None), name
            assert known[field.setting.option].help == field.setting.help


def test_the_pixel_limit_is_the_same_everywhere() -> None:
    assert ServerSettings().media.prompt_pixels == options("serve")["--max-prompt-pixels"].default


def test_every_field_that_names_an_option_is_documented() -> None:
    for kind in KINDS:
        for name, field in fields_of(kind).items():
            assert field.setting.help.endswith("."), f"{kind.__name__}.{name}"


@dataclasses.dataclass(kw_only=True)
class Limits:
    """Settings of every kind."""

    count: Annotated[int, Setting(help="Number of things.", option="--things", minimum=1, maximum=9)] = 3
    seconds: Annotated[float | None, Setting(help="Time.", option="--seconds", unit="seconds", above=0)] = None
    names: Annotated[tuple[str, ...], Setting(help="Names.", option="--name")] = ()
    color: Annotated[str | None, Setting(help="Color.", option="--color")] = "white"
    open: Annotated[bool, Setting(help="Open.", option="--open")] = False
    hidden: Annotated[int, Setting(help="Not an option.")] = 5
    plain: int = 7

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; expected 1 to 9"),
        ({"count": 10}, "count is 10; expected 1 to 9"),
        ({"count": None}, "count is None; expected 1 to 9"),
        ({"seconds": 0.0}, "seconds is 0.0; expected more than 0, or None"),
        ({"seconds": float("nan")}, "seconds is nan; expected more than 0, or None"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**values)


def test_a_command_gets_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[Any] = []
    program = typer.Typer()

    @program.command()
    @with_options(limits=Options(Limits, changes={"count": 4}))
    def act(word: str = "x", *, limits: dict[str, Any]) -> None:
        taken.append((word, Limits(**limits)))

    program([], standalone_mode=False)
    program(["--word", "y", "--things", "2", "--seconds", "1.5", "--name", "a", "--name", "b", "--color", "none",
             "--open"], standalone_mode=False)  # fmt: skip
    assert taken == [
        ("x", Limits(count=4)),
        ("y", Limits(count=2, seconds=1.5, names=("a", "b"), color=None, open=True)),
    ]
    with pytest.raises(Exception, match=r"greater than or equal to 1|not in the range"):
        program(["--things", "0"], standalone_mode=False)
    assert {param.name for param in typer.main.get_command(program).params} >= {"word", "count"}
    assert "hidden" not in {param.name for param in typer.main.get_command(program).params}


_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "million": 1_000_000}


def test_documented_defaults_are_those_of_the_options() -> None:
    page = (FOLDER.parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    checked = set()
    for option, value, unit in re.findall(r"^\| `(--[\w-]+)` \| ([\d,]+) ?(\w*) \|", page, re.MULTILINE):
        if unit in _UNITS:
            assert options("serve")[option].default == int(value.replace(",", "")) * _UNITS[unit], option
            checked.add(option)
    assert {"--max-queue", "--max-body", "--max-prompt-pixels", "--request-seconds"} <= checked
