"""Watch an attacked server from a separate process, so that only the server is measured.

    python probe.py health PORT              asks /health every 50 ms
    python probe.py good PORT CLIENTS FILE   asks what FILE holds, each client one question after the other

Both print "ready" after the first response (to each question), continue until their standard input ends, and print a
line of JSON. They only use the standard library: a probe must start quickly and take no CPU time from the server.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import struct
import sys
import threading
import time
from typing import Any

EVERY = 0.05
PATIENCE = 120.0
"""Seconds after which a response counts as lost."""


def request(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a response; 0 and a reason if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error).encode()
    finally:
        connection.close()


def body_of(item: dict[str, Any]) -> bytes:
    """A question; its media file ends in unique bytes, so that no cache has it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": item["text"]}]
    if item["kind"]:
        # A box of MP4 without contents, which PNGs and PDFs carry behind their end just as well.
        data = base64.b64decode(item["data"]) + struct.pack(">I4s", 16, b"free") + random.randbytes(8)
        coded = base64.b64encode(data).decode()
        content.insert(0, medium_part(item["kind"], coded))
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0}
    return json.dumps(asked).encode()


def medium_part(kind: str, coded: str) -> dict[str, Any]:
    """A message part with media in base64; few and small images, so that decoders work and not the model."""
    if kind == "document":
        return {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{coded}", "detail": "low"}}
    media_type, frames = {"image": ("image/png", {}), "video": ("video/mp4", {"num_frames": 2})}[kind]
    url = {"url": f"data:{media_type};base64,{coded}", "detail": "low", **frames}
    return {"type": f"{kind}_url", f"{kind}_url": url}


def answer(port: int, item: dict[str, Any]) -> tuple[int, str]:
    """Status and text of the answer to a question."""
    status, body = request(port, "/v1/chat/completions", body_of(item))
    if status != 200:
        return status, body.decode(errors="replace")[:500]
    return status, json.loads(body)["choices"][0]["message"]["content"]


def health(port: int, stopped: threading.Event) -> list[tuple[float, int]]:
    """Seconds and status of each response of /health."""
    seen = []
    while not stopped.is_set():
        began = time.monotonic()
        status, _ = request(port, "/health")
        seen.append((time.monotonic() - began, status))
        if len(seen) == 1:
            print("ready", flush=True)
        stopped.wait(max(0.0, EVERY - (time.monotonic() - began)))
    return seen


def good(port: int, clients: int, file: str, stopped: threading.Event) -> dict[str, Any]:
    """What each client saw: seconds, question, status, and the text where it is another than at first."""
    with open(file, encoding="utf-8") as opened:  # noqa: PTH123  # the least that has to be imported
        items = json.load(opened)
    expected = [answer(port, item) for item in items]
    print("ready", flush=True)
    seen: list[tuple[float, str, int, str | None]] = []

    def ask(number: int) -> None:
        while not stopped.is_set():
            item = number % len(items)
            began = time.monotonic()
            said = answer(port, items[item])
            other = None if said == expected[item] else said[1]
            seen.append((time.monotonic() - began, items[item]["name"], said[0], other))
            number += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"expected": {item["name"]: text for item, (_, text) in zip(items, expected, strict=True)}, "seen": seen}


def main() -> None:
    what, port = sys.argv[1], int(sys.argv[2])
    stopped = threading.Event()

    def wait() -> None:
        while os.read(0, 1):
            pass
        stopped.set()

    threading.Thread(target=wait, daemon=True).start()
    found = health(port, stopped) if what == "health" else good(port, int(sys.argv[3]), sys.argv[4], stopped)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
