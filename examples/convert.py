"""Data sets in other formats -> JSON lines with messages, as docs/data.md describes them.

    python examples/convert.py old.json train.jsonl

Takes ShareGPT and LLaVA (``conversations``), Alpaca (``instruction``, ``input``, ``output``), pairs of columns such as
``prompt`` and ``completion``, messages with ``<image>`` and ``<video>`` in their texts (ms-swift, LLaMA-Factory), and
texts; in .json, .jsonl, .csv, .tsv, .txt or .md. Rows that name media by relative paths count them from the new file.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "observation": "tool"}
PAIRS = (
    *(("instruction", "output"), ("instruction", "response"), ("query", "response"), ("prompt", "completion")),
    *(("prompt", "response"), ("question", "answer")),
)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file as they stand."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix in (".txt", ".md"):
        return [{"text": text}]
    if file.suffix in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ","))
    try:
        whole = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def convert(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with messages; one of text alone stays as it is."""
    pair = next((pair for pair in PAIRS if row.keys() >= set(pair)), None)
    if row.get("conversations"):
        said = [(ROLES.get(one["from"], one["from"]), one["value"]) for one in row["conversations"]]
    elif row.get("messages"):
        said = [
            (one["role"], one["content"]) if "role" in one else (ROLES.get(one["from"], one["from"]), one["value"])
            for one in row["messages"]
        ]
    elif pair is not None:
        asked = "\n\n".join(text for text in (row[pair[0]], row.get("input")) if text)
        turns = [*(row.get("history") or ()), (asked, row[pair[1]])]
        said = [one for question, answer in turns for one in (("user", question), ("assistant", answer))]
    else:
        return dict(row)
    if row.get("system"):
        said.insert(0, ("system", row["system"]))
    media = {"images": row.get("images") or row.get("image"), "videos": row.get("videos") or row.get("video")}
    listed = {name: given if isinstance(given, list) else [given] for name, given in media.items() if given}
    kept = {name: row[name] for name in ("tools",) if row.get(name)}
    return {"messages": [{"role": role, "content": parts(text)} for role, text in said], **listed, **kept}


def parts(content: Any) -> Any:
    """Content whose ``<image>`` and ``<video>`` are parts of their own; the media stand beside the messages."""
    if not isinstance(content, str) or not re.search("<image>|<video>", content):
        return content
    pieces = enumerate(re.split("<(image|video)>", content))
    found = [{"type": piece} if i % 2 else {"type": "text", "text": piece.strip("\n")} for i, piece in pieces]
    return [part for part in found if part.get("text") != ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path, help="a .jsonl file")
    chosen = parser.parse_args()
    rows = [convert(row) for row in read(chosen.source)]
    chosen.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows written to {chosen.out}; look them through: aria data check {chosen.out}")
