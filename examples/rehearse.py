"""Let a model answer questions, to rehearse during training what it should not forget.

    python examples/rehearse.py flags/known.jsonl flags/old.jsonl --model rhymes-ai/Aria

Rows are conversations in the authors' format without their last answer; the output adds the model's own answers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from aria import Engine, SamplingParams


def conversation(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the messages with the row's images and clips at their places."""
    clips = row.get("videos", [row["video"]] if "video" in row else [])
    media = {"image": iter([{"path": path} for path in row.get("images", ())]), "video": iter(clips)}

    def place(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] not in media:
            return part
        medium = next(media[part["type"]])
        return {"type": part["type"], **medium, "path": str(folder / medium["path"])}

    return [{**message, "content": [place(part) for part in message["content"]]} for message in row["messages"]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path, help="file beside the questions, since media paths are relative to it")
    parser.add_argument("--model", help="folder or repository (default: the packaged nano)")
    parser.add_argument("--max-tokens", type=int, default=128)
    chosen = parser.parse_args()
    if not chosen.questions.is_file():
        parser.error(f"{chosen.questions}: file not found")
    rows = [json.loads(line) for line in chosen.questions.read_bytes().splitlines()]
    asked = [conversation(row, chosen.questions.parent) for row in rows]
    answers = Engine(chosen.model).chat(asked, SamplingParams(max_tokens=chosen.max_tokens))
    for row, answer in zip(rows, answers, strict=True):
        row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
    chosen.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
