"""Measure image throughput: images planned per core and second, and images drawn per second on this machine.

Run as ``python -m recipes.nano.train.bench_images``; the last line of its output is JSON.
"""

import argparse
import json
import time
from random import Random

import torch

from recipes.nano.assets.archive import Assets
from recipes.nano.draw.render import Renderer
from recipes.nano.train.image_batches import make_batch, to_device

BATCHES = 6


def main() -> None:
    """Measure every kind of batch."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    assets = Assets.load()
    renderer = Renderer(assets, "cuda" if torch.cuda.is_available() else "cpu")
    rates = {}
    share = 1 if renderer.device.type == "cuda" else 8
    for kind, images in (("small", 512), ("large", 128), ("several", 512), ("long", 512)):
        images //= share
        make_batch(assets, Random(0), kind, images)
        started = time.perf_counter()
        batches = [make_batch(assets, Random(seed), kind, images) for seed in range(BATCHES)]
        planned = BATCHES * images / (time.perf_counter() - started)
        moved = [to_device(batch, renderer.device) for batch in batches]
        renderer(moved[0])["pixel_values"].sum().item()
        started = time.perf_counter()
        # Reading one number synchronises with the device.
        torch.stack([renderer(batch)["pixel_values"].sum() for batch in moved]).sum().item()
        drawn = BATCHES * images / (time.perf_counter() - started)
        print(f"{kind}: {planned:.0f} images/s planned per core, {drawn:.0f} images/s drawn on {renderer.device}")
        rates[kind] = {"planned_per_core": round(planned), "drawn": round(drawn)}
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
