"""The chat page on a server with an adapter: the choice by keyboard is shown and remembered."""

from __future__ import annotations

import pytest
import torch

from aria.checkpoint import load_model
from aria.checkpoint.adapter import save_adapter
from aria.engine import AsyncEngine
from aria.model.lora import lora_modules as attached
from aria.train.targets import Targets, apply
from tests.helpers import serving
from tests.helpers.browser import Page, driver, in_browser  # noqa: F401  (a fixture)


@pytest.fixture
def live(tmp_path, monkeypatch):
    torch.manual_seed(1)
    model = load_model()
    apply(model, Targets(rank=4, modules=("lm_head",)))
    for adapter in attached(model).values():
        torch.nn.init.normal_(adapter.b, std=2.0)
    save_adapter(model, tmp_path)
    with AsyncEngine(device="cpu", max_batch=4, cache_tokens=8192, adapters={"mine": tmp_path}) as engine:
        monkeypatch.setattr(serving, "engine", lambda: engine)
        with serving.running() as live:
            yield live


@in_browser
def test_the_adapter_is_selected_by_keyboard_and_remembered(driver, live):  # noqa: F811
    page = Page(driver, live.address).open()
    page.do("localStorage.setItem('aria-settings', JSON.stringify({temperature: 0, max_tokens: 16}))")
    page.open().new()
    assert page.texts("#model option") == ["aria-nano", "mine"]
    reported = {}
    for name in ("aria-nano", "mine"):
        page.one("#model").send_keys(name)
        page.new()
        page.say("hello")
        reported[name] = page.answered()
        assert page.one(".hers article").get_attribute("aria-label") == f"Answer of {name}"
        serving.until(
            lambda name=name: f'aria_model_requests_total{{model="{name}"}} 1.0' in live.http.get("/metrics").text
        )
    assert len(set(reported.values())) == 2
    page.open()
    assert page.do("return document.querySelector('#model').value") == "mine"
