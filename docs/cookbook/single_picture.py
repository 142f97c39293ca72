"""Ask about one picture: ``python docs/cookbook/single_picture.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
engine = Engine(*sys.argv[1:])


def ask(picture: Path, question: str, **settings: object) -> list[dict]:
    parts = [{"type": "image", "path": picture, **settings}, {"type": "text", "text": f"\n{question}"}]
    return [{"role": "user", "content": parts}]


# Conversations that are asked together are answered together; 0 is the most careful temperature.
asked = [
    ask(PICTURES / "word.png", "What does it say?"),
    ask(PICTURES / "shapes.png", "What is to the left of the blue square?"),
    ask(PICTURES / "emoji.png", "Which emoji is this?", max_image_size=min(engine.processor.size_conversion)),
]
for result in engine.chat(asked, SamplingParams(max_tokens=200, temperature=0.0)):
    print(result.text, f"({result.usage.prompt_tokens} tokens asked, {result.usage.completion_tokens} answered)")

# A piece at a time, as a person would like to read it.
for piece in engine.stream(ask(PICTURES / "shapes.png", "Describe this picture."), SamplingParams(max_tokens=200)):
    print(piece, end="", flush=True)
print()
