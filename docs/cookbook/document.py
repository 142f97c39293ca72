"""Ask about a PDF: ``python docs/cookbook/document.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

PAPER = Path(__file__).parent / "media" / "pages.pdf"
engine = Engine(*sys.argv[1:])


def ask(question: str, **settings: object) -> str:
    """Pages become "Page 1: ", an image in tiles, and a newline; the question comes last."""
    parts = [{"type": "document", "path": PAPER, **settings}, {"type": "text", "text": question}]
    prepared = engine.prepare([{"role": "user", "content": parts}])
    print(f"{question} (tokens: {len(prepared.ids)})")
    [result] = engine.chat([[{"role": "user", "content": parts}]], SamplingParams(max_tokens=1024))
    return result.text


print(ask("What does it say?", pages="1", split_image=False))
print(ask("What does it say?", pages="2", split_image=False))
print(ask("Summarize this document page by page."))
