"""Ask about a video: ``python docs/cookbook/video.py [MODEL]``. Without a model, nano answers."""

import sys
from pathlib import Path

from aria import Engine, SamplingParams

CLIP = Path(__file__).parent / "media" / "clip.mp4"
engine = Engine(*sys.argv[1:])


def ask(question: str, **settings: object) -> str:
    """Frames become "[MM:SS]", a small image, and a newline; the question comes last."""
    parts = [{"type": "video", "path": CLIP, **settings}, {"type": "text", "text": question}]
    prepared = engine.prepare([{"role": "user", "content": parts}])
    print(f"{question} (frames: {len(prepared.images)}, tokens: {len(prepared.ids)})")
    [result] = engine.chat([[{"role": "user", "content": parts}]], SamplingParams(max_tokens=1024))
    return result.text


print(ask("What colour is the circle?", num_frames=1))
print(ask("Describe what happens in this clip.", num_frames=8))
print(ask("When does the circle change its colour?", fps=2))
