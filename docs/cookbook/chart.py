"""Read a chart: ``python docs/cookbook/chart.py [MODEL]``. Nano runs it, but only the published model reads charts."""

import json
import sys
from pathlib import Path

from aria import Engine, SamplingParams

CHART = Path(__file__).parent / "media" / "chart.png"
ROW = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "maxLength": 12},
        "sold": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["day", "sold"],
    "additionalProperties": False,
}
engine = Engine(*sys.argv[1:])
# Fine print: the chart is split into tiles at full size, after an overview of the whole.
image = {"type": "image", "path": CHART, "split_image": True}


def ask(text: str, **settings: object) -> str:
    messages = [{"role": "user", "content": [image, {"type": "text", "text": f"\n{text}"}]}]
    return engine.chat([messages], SamplingParams(max_tokens=1000, **settings))[0].text


print(ask("What does this chart show, and on which day was the most sold?"))
# Let the model read and Python calculate: first a table, then exact sums.
table = ask("Give the values of all bars as JSON.", json_schema={"type": "array", "items": ROW, "maxItems": 12})
rows = json.loads(table)
print(rows, "total:", sum(row["sold"] for row in rows))
