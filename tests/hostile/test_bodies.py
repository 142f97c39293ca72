"""Request bodies of maximum size and density do not delay /health."""

from __future__ import annotations

import json
import time

import pytest

from tests.hostile.server import CHAT, post, probe, running

pytestmark = pytest.mark.soak

MOST = 256 << 20
"""Bytes of a body."""
LONGEST = 1.0
"""Seconds that /health may take once; on a busy machine half of what Python's own parser takes for the body, which
stops everything else."""
SAID = b'{"role": "user", "content": "hello"},'
BODIES: dict[str, tuple[str, bytes, bytes, bytes]] = {
    # path, beginning, what is repeated, end
    "picture": (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": '
                b'"data:image/png;base64,', b"A", b'"}}]}]}'),
    "clip": (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": '
             b'"data:video/mp4;base64,', b"A", b'"}}]}]}'),
    "document": (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "', b"A",
                 b'"}}]}]}'),
    "text": (CHAT, b'{"messages": [{"role": "user", "content": "', b"a", b'"}]}'),
    "name": (CHAT, b'{"messages": [' + SAID[:-1] + b'], "model": "', b"a", b'"}'),
    "number": (CHAT, b'{"messages": [' + SAID[:-1] + b'], "temperature": "', b"a", b'"}'),
    "metadata": ("/v1/responses", b'{"input": "hello", "stream": true, "metadata": {"a": "', b"a", b'"}}'),
    "escapes": (CHAT, b'{"messages": [{"role": "user", "content": "', b"\\u002c" * 7_000_000, b'"}]}'),
    "schema": (CHAT, b'{"messages": [' + SAID[:-1] + b'], "structured_outputs": {"json": "{\\"enum\\": [0',
               b"\\u002c0" * 6_000_000, b']}"}}'),
    "arguments": (CHAT, b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", '
                  b'"arguments": "[0', b"\\u002c0" * 6_000_000, b']"}}]},' + SAID[:-1] + b"]}"),
    "values": ("/detokenize", b'{"tokens": [', b"1," * 500_000, b"1]}"),
    "wrong values": ("/detokenize", b'{"tokens": [', b"1," * 500_000, b"-1]}"),
    "messages": (CHAT, b'{"messages": [', SAID * 16_000, SAID[:-1] + b"]}"),
    "parts": (CHAT, b'{"messages": [{"role": "user", "content": [', b'{"type":"text","text":"a"},' * 150_000,
              b'{"type": "text", "text": "a"}]}]}'),
    "enum": (CHAT, b'{"messages": [' + SAID[:-1] + b'], "response_format": {"type": "json_object", "schema": {"enum": '
             b"[0", b",0" * 500_000, b"]}}}"),
}  # fmt: skip


def test_large_bodies_keep_nobody_waiting() -> None:
    with running() as server:
        for name, (path, begin, middle, end) in BODIES.items():
            repeated = middle if len(middle) > 1 else middle * (MOST - len(begin) - len(end))
            with probe("health", str(server.port)) as health:
                answered = post(server.port, begin + repeated + end, name, path)
                seen = health()
            slowest = max(seconds for seconds, _ in seen)
            print(
                f"{name}: status {answered.status}, {answered.seconds:.1f} s, /health {1000 * slowest:.0f} ms at most"
            )
            assert answered.status in (200, 400, 404, 413), answered
            assert {status for _, status in seen} == {200}
            began = time.monotonic()
            json.loads(begin + repeated + end)
            assert slowest < max(LONGEST, (time.monotonic() - began) / 2), name
