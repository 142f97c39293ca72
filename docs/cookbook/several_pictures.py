"""Ask about several pictures: ``python docs/cookbook/several_pictures.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
engine = Engine(*sys.argv[1:])


def labelled(*pictures: Path) -> list[dict]:
    """Each picture with its number before it and a newline after it: so the model can tell them apart."""
    parts: list[dict] = []
    for number, picture in enumerate(pictures, 1):
        parts += [
            {"type": "text", "text": f"Image {number}: "},
            {"type": "image", "path": picture},
            {"type": "text", "text": "\n"},
        ]
    return parts


question = {"type": "text", "text": "What is in the first picture, and what is in the second?"}
messages = [{"role": "user", "content": [*labelled(PICTURES / "word.png", PICTURES / "shapes.png"), question]}]
[result] = engine.chat([messages], SamplingParams(max_tokens=300))
print(result.text)

# What was said stays in the conversation; a later turn may bring another picture.
another = [{"type": "image", "path": PICTURES / "emoji.png"}, {"type": "text", "text": "\nWhat is in this one?"}]
messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": another}]
print(engine.chat([messages], SamplingParams(max_tokens=300))[0].text)
