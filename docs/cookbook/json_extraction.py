"""Extract JSON from an image: ``python docs/cookbook/json_extraction.py [MODEL]``. Nano guesses, in valid JSON."""

import json
import sys
from pathlib import Path

from aria import Engine, SamplingParams

RECEIPT = Path(__file__).parent / "media" / "receipt.png"
PROPERTIES = {
    "shop": {"type": "string", "maxLength": 40},
    "date": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    "items": {"type": "integer", "minimum": 0, "maximum": 99},
    "paid": {"enum": ["cash", "card", "unknown"]},
}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": list(PROPERTIES),
    "additionalProperties": False,
}
# The grammar ensures the form, not the meaning, so also describe it in words.
QUESTION = f"\nRead this receipt and answer in JSON with {', '.join(PROPERTIES)}."

engine = Engine(*sys.argv[1:])
parts = [{"type": "image", "path": RECEIPT, "split_image": True}, {"type": "text", "text": QUESTION}]
params = SamplingParams(max_tokens=300, json_schema=SCHEMA)
[result] = engine.chat([[{"role": "user", "content": parts}]], params)
assert result.finish_reason == "stop", "the answer was cut off: allow it more tokens"
print(json.dumps(json.loads(result.text), indent=2))
