"""Ask about one image: ``python docs/cookbook/single_picture.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"
engine = Engine(*sys.argv[1:])


def ask(image: Path, question: str, **settings: object) -> list[dict]:
    parts = [{"type": "image", "path": image, **settings}, {"type": "text", "text": f"\n{question}"}]
    return [{"role": "user", "content": parts}]


# Conversations in one call are answered in one batch; temperature 0 is greedy.
asked = [
    ask(IMAGES / "word.png", "What does it say?"),
    ask(IMAGES / "shapes.png", "What is to the left of the blue square?"),
    ask(IMAGES / "emoji.png", "Which emoji is this?", max_image_size=min(engine.processor.size_conversion)),
]
for result in engine.chat(asked, SamplingParams(max_tokens=200, temperature=0.0)):
    print(result.text, f"({result.usage.prompt_tokens} prompt tokens, {result.usage.completion_tokens} generated)")

# Streamed as it is generated.
for piece in engine.stream(ask(IMAGES / "shapes.png", "Describe this picture."), SamplingParams(max_tokens=200)):
    print(piece, end="", flush=True)
print()
