"""How long a prompt takes to its first token: ``python -m bench.engine.prefill --tokens 512 2048 8192 32768``.

Text; encoder and projector alone on prepared pictures; and one picture with a question, from a PIL picture in memory.
Every prompt and every picture is new, so that nothing comes out of the prefix cache or the cache of pictures.
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
"""Prompts of a shape before the clock starts: the engine makes a graph of what comes a second time."""
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=2.0, seed=0, ignore_eos=True)
QUESTION = "What is in this picture?"


def random_picture(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A picture of soft noise."""
    coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def picture_message(
    pictures: Sequence[Image.Image | np.ndarray], side: int, question: str = QUESTION
) -> list[dict[str, Any]]:
    """One message with pictures, each at most ``side`` pixels, and a question."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture, "max_image_size": side} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def first_token(engine: Engine, messages: Sequence[dict[str, Any]], params: SamplingParams) -> tuple[float, float, int]:
    """Answer one message. Returns seconds to the first token and to the last, and tokens of the prompt."""
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
    """Seconds to the first token after a prompt of text."""
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
def encode(engine: Engine, limits: Ceilings, side: int, pictures: int, height: int, repeats: int) -> dict[str, Any]:
    """Seconds of encoder and projector on pictures of ``side`` x ``height`` pixels that are on the device already."""
    config, device = engine.config, engine.device
    dtype, p = engine.dtype, engine.config.vision.patch_size
    pixels = torch.randn(pictures, config.vision.num_channels, side, side, device=device, dtype=dtype)
    mask = torch.zeros(pictures, side, side, dtype=torch.bool, device=device)
    mask[:, :height] = True
    patches = pack_patches(pixels, mask, config.vision)
    run = lambda: engine.model.encode_images(patches)  # noqa: E731
    if patches.segments.total <= GRAPH_PATCHES:
        # The engine runs so few as a graph.
        spread = measure.clock_graph([run], device, repeats=repeats)
    else:
        spread = measure.clock(run, device, repeats=repeats)
    rows, columns = -(-height // p), side // p
    work = floors.picture(config, rows * columns, columns**2, dtype.itemsize) * pictures
    name = f"encoder, {pictures} of {side} x {height}"
    row = _row(name, spread, work, limits)
    return row | {
        "side": side,
        "height": height,
        "pictures": pictures,
        "ms_per_picture": spread.median * 1000 / pictures,
    }


def picture(engine: Engine, limits: Ceilings, side: int, repeats: int) -> dict[str, Any]:
    """Seconds from a PIL picture and a question to the first token."""
    generator = np.random.default_rng(side)
    seconds, tokens = [], 0
    for _ in range(repeats + WARM_UP):
        message = picture_message([random_picture(side, side, generator)], side)
        first, _, tokens = first_token(engine, message, ONE_TOKEN)
        seconds.append(first)
    config = engine.config
    itemsize = engine.dtype.itemsize
    patches = (side // config.vision.patch_size) ** 2
    work = floors.picture(config, patches, itemsize=itemsize) + floors.prompt(config.text, tokens, itemsize=itemsize)
    return _row(f"picture of {side} px + question", Spread.of(seconds[WARM_UP:]), work, limits) | {"side": side}


def _row(name: str, seconds: Spread, work: floors.Work, limits: Ceilings) -> dict[str, Any]:
    return {
        "name": name,
        "ms": seconds * 1000,
        "floor_ms": limits.floor(work) * 1000,
        "mfu": work.flops / seconds.median / limits.product,
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
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
    return measure.table(cells, ("to the first token, or of the encoder", "ms", "spread", "floor ms", "MFU"))


def run(engine: Engine, limits: Ceilings, *, tokens: Sequence[int], pictures: int, repeats: int) -> dict[str, Any]:
    """Text; square pictures of every size, alone and several together, and 16:9; one PIL picture with a question."""
    sides = sorted(engine.config.image_sizes(), reverse=True)
    rows = []
    for count in tokens:
        if count >= engine.max_model_len:
            print(f"a prompt of {count} tokens is left out: the engine holds {engine.max_model_len}")
            continue
        rows.append(text(engine, limits, count, repeats))
    for side in sides:
        rows += [encode(engine, limits, side, count, side, repeats) for count in (1, pictures)]
    largest = sides[0]
    rows.append(encode(engine, limits, largest, pictures, largest * 9 // 16, repeats))
    rows += [picture(engine, limits, side, repeats) for side in sides]
    print(show(rows))
    return {"prefill": rows}


def run_peer(peer: Peer, *, tokens: Sequence[int], pictures: int, repeats: int) -> dict[str, Any]:
    """The same work with transformers; pictures are prepared and on the device already."""
    rows: list[dict[str, Any]] = [{"name": f"text, {n} tokens", "ms": peer.prefill(n, repeats) * 1000} for n in tokens]
    sides = sorted(peer.config.image_sizes(), reverse=True)
    for side in sides:
        for count in (1, pictures):
            name = f"encoder, {count} of {side} x {side}"
            rows.append({"name": name, "ms": peer.encode(count, side, repeats) * 1000})
    for side in sides:
        seconds = [peer.answer(1, side, 32, 1)[0] for _ in range(repeats + 1)][1:]
        rows.append({"name": f"picture of {side} px + question", "ms": Spread.of(seconds) * 1000})
    for row in rows:
        print(f"transformers, {row['name']}: {row['ms'].median:.2f} ms ({row['ms'].low:.2f} to {row['ms'].high:.2f})")
    return {"prefill": rows}


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options that say how much to do."""
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768], metavar="T", help="prompts")
    parser.add_argument("--pictures", type=int, default=16, help="pictures that are encoded together")
    parser.add_argument("--repeats", type=int, default=5)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {"tokens": arguments.tokens, "pictures": arguments.pictures, "repeats": arguments.repeats}
    script.run_script(arguments, run, run_peer, work)


if __name__ == "__main__":
    main()
