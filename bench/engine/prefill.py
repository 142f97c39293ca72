"""Time to first token: ``python -m bench.engine.prefill --tokens 512 2048 8192 32768``.

Measures text prompts; encoder and projector alone on preprocessed images; and an image with a question, from a PIL
image in memory. Every prompt and image is new, so that neither the prefix cache nor the image cache is hit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from aria import Engine, SamplingParams
from aria.engine.encoder import GRAPH_PATCHES
from aria.model import pack_patches
from bench import floors, measure, script
from bench.engine.peer import Peer
from bench.measure import Ceilings, Spread

WARM_UP = 2
"""Untimed prompts of a shape; the engine captures a CUDA graph of a shape at its second occurrence."""
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=2.0, seed=0, ignore_eos=True)
QUESTION = "What is in this picture?"


def random_image(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Make an image of soft noise."""
    coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_message(
    images: Sequence[Image.Image | np.ndarray], side: int, question: str = QUESTION
) -> list[dict[str, Any]]:
    """Make a message of images, each at most ``side`` pixels, and a question."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image, "max_image_size": side} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def first_token(engine: Engine, messages: Sequence[dict[str, Any]], params: SamplingParams) -> tuple[float, float, int]:
    """Answer one message; return seconds to the first token and to the last, and tokens of the prompt."""
    core = engine.core
    began = time.perf_counter()
    prepared = engine.prepare(messages)
    (request,) = core.add(prepared.ids, params, images=prepared.images)
    while not request.outputs:
        core.step()
    first = time.perf_counter() - began
    while core.busy:
        core.step()
    return first, time.perf_counter() - began, len(prepared.ids)


def text(engine: Engine, limits: Ceilings, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure time to first token of text prompts."""
    core, config = engine.core, engine.config
    generator = torch.Generator().manual_seed(tokens)
    seconds = []
    for _ in range(repeats + WARM_UP):
        prompt = measure.random_prompt(config, tokens, generator)
        measure.synchronize(engine.device)
        began = time.perf_counter()
        (request,) = core.add(prompt, ONE_TOKEN)
        while not request.outputs:
            core.step()
        seconds.append(time.perf_counter() - began)
        while core.busy:
            core.step()
    spread = Spread.of(seconds[WARM_UP:])
    work = floors.prompt(config.text, tokens, itemsize=engine.dtype.itemsize)
    return _row(f"text, {tokens} tokens", spread, work, limits) | {"tokens": tokens}


@torch.inference_mode()
def encode(engine: Engine, limits: Ceilings, side: int, images: int, height: int, repeats: int) -> dict[str, Any]:
    """Measure encoder and projector on images of ``side`` x ``height`` pixels that are already on the device."""
    config, device = engine.config, engine.device
    dtype, p = engine.dtype, engine.config.vision.patch_size
    pixels = torch.randn(images, config.vision.num_channels, side, side, device=device, dtype=dtype)
    mask = torch.zeros(images, side, side, dtype=torch.bool, device=device)
    mask[:, :height] = True
    patches = pack_patches(pixels, mask, config.vision)
    run = lambda: engine.model.encode_images(patches)  # noqa: E731
    if patches.segments.total <= GRAPH_PATCHES:
        # The engine runs that few patches as a CUDA graph.
        spread = measure.clock_graph([run], device, repeats=repeats)
    else:
        spread = measure.clock(run, device, repeats=repeats)
    rows, columns = -(-height // p), side // p
    work = floors.image(config, rows * columns, columns**2, dtype.itemsize) * images
    name = f"encoder, {images} of {side} x {height}"
    row = _row(name, spread, work, limits)
    return row | {
        "side": side,
        "height": height,
        "images": images,
        "ms_per_image": spread.median * 1000 / images,
    }


def image(engine: Engine, limits: Ceilings, side: int, repeats: int) -> dict[str, Any]:
    """Measure time to first token of a PIL image and a question."""
    generator = np.random.default_rng(side)
    seconds, tokens = [], 0
    for _ in range(repeats + WARM_UP):
        message = image_message([random_image(side, side, generator)], side)
        first, _, tokens = first_token(engine, message, ONE_TOKEN)
        seconds.append(first)
    config = engine.config
    itemsize = engine.dtype.itemsize
    patches = (side // config.vision.patch_size) ** 2
    work = floors.image(config, patches, itemsize=itemsize) + floors.prompt(config.text, tokens, itemsize=itemsize)
    return _row(f"image of {side} px + question", Spread.of(seconds[WARM_UP:]), work, limits) | {"side": side}


def _row(name: str, seconds: Spread, work: floors.Work, limits: Ceilings) -> dict[str, Any]:
    return {
        "name": name,
        "ms": seconds * 1000,
        "floor_ms": limits.floor(work) * 1000,
        "mfu": work.flops / seconds.median / limits.product,
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a table."""
    cells = []
    for row in rows:
        ms = row["ms"]
        cells.append(
            (
                row["name"],
                f"{ms.median:.2f}",
                f"{ms.low:.2f} to {ms.high:.2f}",
                f"{row['floor_ms']:.2f}",
                f"{row['mfu']:.1%}",
            )
        )
    return measure.table(cells, ("time to first token, or of the encoder", "ms", "spread", "floor ms", "MFU"))


def run(engine: Engine, limits: Ceilings, *, tokens: Sequence[int], images: int, repeats: int) -> dict[str, Any]:
    """Measure text; square images of every size, alone and in batches, and 16:9; a PIL image with a question."""
    sides = sorted(engine.config.image_sizes(), reverse=True)
    rows = []
    for count in tokens:
        if count >= engine.max_model_len:
            print(f"skipping a prompt of {count} tokens: the maximum length is {engine.max_model_len}")
            continue
        rows.append(text(engine, limits, count, repeats))
    for side in sides:
        rows += [encode(engine, limits, side, count, side, repeats) for count in (1, images)]
    largest = sides[0]
    rows.append(encode(engine, limits, largest, images, largest * 9 // 16, repeats))
    rows += [image(engine, limits, side, repeats) for side in sides]
    print(show(rows))
    return {"prefill": rows}


def run_peer(peer: Peer, *, tokens: Sequence[int], images: int, repeats: int) -> dict[str, Any]:
    """Measure the same with transformers, whose images are already preprocessed and on the device."""
    rows: list[dict[str, Any]] = [{"name": f"text, {n} tokens", "ms": peer.prefill(n, repeats) * 1000} for n in tokens]
    sides = sorted(peer.config.image_sizes(), reverse=True)
    for side in sides:
        for count in (1, images):
            name = f"encoder, {count} of {side} x {side}"
            rows.append({"name": name, "ms": peer.encode(count, side, repeats) * 1000})
    for side in sides:
        seconds = [peer.answer(1, side, 32, 1)[0] for _ in range(repeats + 1)][1:]
        rows.append({"name": f"image of {side} px + question", "ms": Spread.of(seconds) * 1000})
    for row in rows:
        print(f"transformers, {row['name']}: {row['ms'].median:.2f} ms ({row['ms'].low:.2f} to {row['ms'].high:.2f})")
    return {"prefill": rows}


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768], metavar="T", help="tokens of text prompts"
    )
    parser.add_argument("--images", "--pictures", type=int, default=16, help="number of images encoded together")
    parser.add_argument("--repeats", type=int, default=5)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {"tokens": arguments.tokens, "images": arguments.images, "repeats": arguments.repeats}
    script.run_script(arguments, run, run_peer, work)


if __name__ == "__main__":
    main()
