"""Fixtures of the tests of nano's recipe."""

from __future__ import annotations

import pytest

from recipes.nano.assets.archive import Assets
from recipes.nano.draw.render import Renderer
from tests.helpers.nano_material import material


@pytest.fixture(scope="module")
def assets() -> Assets:
    return material()


@pytest.fixture(scope="module")
def renderer(assets: Assets) -> Renderer:
    return Renderer(assets)
