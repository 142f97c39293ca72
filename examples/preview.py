"""Show images in the terminal, two pixels per character: ``python examples/preview.py IMAGE ...``"""

import sys

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

COLUMNS = 44


def preview(file: str) -> Text:
    """Render the image as upper half blocks: foreground is the upper pixel, background the lower one."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((COLUMNS, COLUMNS))
    text = Text(no_wrap=True)
    pixels = np.asarray(image)
    for upper_row, lower_row in zip(pixels[0::2], pixels[1::2], strict=False):
        for upper, lower in zip(upper_row, lower_row, strict=True):
            text.append("▀", "rgb({},{},{}) on rgb({},{},{})".format(*upper, *lower))
        text.append("\n")
    return text


if __name__ == "__main__":
    console = Console()
    for file in sys.argv[1:]:
        # Half blocks are useless in logs and without colours.
        if console.is_terminal and not console.no_color:
            console.print(preview(file), end="")
