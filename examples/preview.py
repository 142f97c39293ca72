"""Shows pictures in the terminal, two pixels a character: ``python examples/preview.py PICTURE ...``"""

import sys

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

COLUMNS = 44


def preview(file: str) -> Text:
    """The picture as upper half blocks: their ink is the upper pixel, their ground the lower one."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((COLUMNS, COLUMNS))
    text = Text(no_wrap=True)
    pixels = np.asarray(picture)
    for upper_row, lower_row in zip(pixels[0::2], pixels[1::2], strict=False):
        for upper, lower in zip(upper_row, lower_row, strict=True):
            text.append("▀", "rgb({},{},{}) on rgb({},{},{})".format(*upper, *lower))
        text.append("\n")
    return text


if __name__ == "__main__":
    console = Console()
    for file in sys.argv[1:]:
        # In a log, or where colours are not wanted, half blocks would only be noise.
        if console.is_terminal and not console.no_color:
            console.print(preview(file), end="")
