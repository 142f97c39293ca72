"""Ask about several images: ``python docs/cookbook/several_pictures.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"
engine = Engine(*sys.argv[1:])


def labelled(*images: Path) -> list[dict]:
    """Each image with its number before it and a newline after it, so that the model can tell them apart."""
    parts: list[dict] = []
    for number, image in enumerate(images, 1):
        parts += [
            {"type": "text", "text": f"Image {number}: "},
            {"type": "image", "path": image},
            {"type": "text", "text": "\n"},
        ]
    return parts


question = {"type": "text", "text": "What is in the first picture, and what is in the second?"}
messages = [{"role": "user", "content": [*labelled(IMAGES / "word.png", IMAGES / "shapes.png"), question]}]
[result] = engine.chat([messages], SamplingParams(max_tokens=300))
print(result.text)

# The conversation continues with another image.
another = [{"type": "image", "path": IMAGES / "emoji.png"}, {"type": "text", "text": "\nWhat is in this one?"}]
messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": another}]
print(engine.chat([messages], SamplingParams(max_tokens=300))[0].text)
