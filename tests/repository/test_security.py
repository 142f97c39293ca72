"""SECURITY.md tells what the code does: options and settings that are there, with the defaults that they have."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from aria import cli
from aria.media.limits import MediaSettings
from aria.serve.settings import ServerSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
DEPLOYMENT = ("docs/nginx.conf", "docs/Caddyfile", "docs/aria.service")
LIMITS = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([^`|]+)` \|$", PAGE, re.MULTILINE)
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "s": 1, "": 1}
UNSET = ("any number", "the model's", "one per core, up to 8")
SETTINGS = {"ServerSettings": ServerSettings(), "MediaSettings": MediaSettings.untrusted()}


def options() -> dict[str, Any]:
    """Defaults of ``aria serve`` by its options."""
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    return {name: one.default for one in command.params for name in one.opts}


def number(text: str) -> float | None:
    if text in UNSET:
        return None
    value, unit = re.fullmatch(r"([0-9,]+) ?(\w*)", text).groups()
    return int(value.replace(",", "")) * UNITS[unit]


@pytest.mark.parametrize(("default", "name"), LIMITS, ids=[name for _, name in LIMITS])
def test_a_limit_has_the_default_that_the_page_tells(default, name):
    if name.startswith("--"):
        assert options()[name] == number(default)
    else:
        kind, _, field = name.partition(".")
        assert getattr(SETTINGS[kind], field) == number(default)


def test_the_page_lists_every_limit_of_the_server():
    listed = {name.lstrip("-").replace("-", "_") for _, name in LIMITS}
    limits = {name.lstrip("-") for name in options() if re.match(r"--(max|held|decoded|worker)-|--\w+-seconds$", name)}
    others = {"max-batch", "step-seconds"}  # what the model does for any client
    assert {name.replace("-", "_") for name in limits - others} <= listed


@pytest.mark.parametrize("file", ["SECURITY.md", *DEPLOYMENT])
def test_options_and_settings_that_are_named_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    commands = re.findall(r"aria serve ([^`\n]*)", text)
    written = " ".join(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)) + commands)
    if file != "SECURITY.md":
        written += " ".join(re.findall(r"(?<!\S)--[a-z-]+", text))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", written)) <= options().keys()
    for kind, field in re.findall(r"\b(ServerSettings|MediaSettings)(?:\.|\()(\w+)", text):
        assert field in {one.name for one in dataclasses.fields(SETTINGS[kind])}, f"{kind}.{field}"


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / target).is_file(), target


def test_proxies_take_bodies_as_large_as_the_server_does():
    assert ServerSettings().max_body == 256 << 20
    assert "client_max_body_size 256m;" in (ROOT / "docs/nginx.conf").read_text()
    assert "max_size 256MiB" in (ROOT / "docs/Caddyfile").read_text()
