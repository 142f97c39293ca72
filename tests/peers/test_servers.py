"""Checks of vLLM's and llama.cpp's servers against ours with nano; docs/compatibility.md lists them."""

from __future__ import annotations

import pytest

from aria.serve.settings import ServerSettings
from tests.helpers.serving import running
from tests.peers import llamacpp_checks, vllm_checks
from tests.peers.checks import Reply


@pytest.fixture(scope="module")
def live():
    with running(ServerSettings(allow_adapter_updates=True)) as live:
        yield live


def ask(live, path: str, body: dict | None) -> Reply:
    response = live.http.get(path) if body is None else live.http.post(path, json=body)
    return Reply(response.status_code, response.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{peer}-{check.area}-{check.what}")
        for peer, checks in (("vllm", vllm_checks.CHECKS), ("llama.cpp", llamacpp_checks.CHECKS))
        for check in checks
    ],
)
def test_check(live, check):
    *earlier, last = [ask(live, path, body) for path, body in check.requests]
    assert all(reply.status == 200 for reply in earlier), earlier
    assert last.status == check.status, last
    if check.right is None:
        assert check.refused in last.error["message"], last
    else:
        assert check.right(*earlier, last), last
