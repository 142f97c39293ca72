"""A prompt with many frames: ``python -m bench.engine.video --frames 256``.

Frames of a clip as arrays in memory, as a decoder returns them, with a question. Reports time to first token, tokens
per second after it, and peak memory. Every run has new frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aria import Engine, SamplingParams
from bench import floors, script
from bench.engine.peer import Peer
from bench.engine.prefill import first_token, image_message, random_image
from bench.measure import Ceilings, Spread


def run(engine: Engine, limits: Ceilings, *, frames: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure frames of the model's smallest image size."""
    config, device = engine.config, engine.device
    side = min(config.image_sizes())
    generator = np.random.default_rng(frames)
    firsts, rates, prompt = [], [], 0
    params = SamplingParams(max_tokens=tokens, temperature=2.0, seed=0, ignore_eos=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats + 1):
        clip = [np.asarray(random_image(side, side, generator)) for _ in range(frames)]
        first, last, prompt = first_token(engine, image_message(clip, side, "What happens here?"), params)
        firsts.append(first)
        rates.append((tokens - 1) / (last - first))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    itemsize = engine.dtype.itemsize
    encoder = floors.image(config, (side // config.vision.patch_size) ** 2, itemsize=itemsize) * frames
    work = encoder + floors.prompt(config.text, prompt, itemsize=itemsize)
    first_ms, rate = Spread.of(firsts[1:]) * 1000, Spread.of(rates[1:])
    floor, mfu = limits.floor(work) * 1000, work.flops / first_ms.median * 1000 / limits.product
    cache = engine.cache_bytes
    print(
        f"{frames} frames of {side} px ({prompt} tokens): {first_ms.median:.1f} ms to the first token "
        f"({first_ms.low:.1f} to {first_ms.high:.1f}; floor {floor:.1f}, MFU {mfu:.1%}), then {rate.median:.1f} tok/s"
        + ("" if peak is None else f"; peak {peak / 1e9:.1f} GB with a KV cache of {cache / 1e9:.1f} GB")
    )
    row = {"frames": frames, "side": side, "prompt_tokens": prompt, "first_token_ms": first_ms, "floor_ms": floor}
    row |= {"mfu": mfu, "tokens_per_s": rate, "peak_bytes": peak, "cache_bytes": cache}
    return {"video": row}


def run_peer(peer: Peer, *, frames: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure the same with transformers, whose frames are already preprocessed and on the device."""
    side = min(peer.config.image_sizes())
    runs = [peer.answer(frames, side, 32, tokens) for _ in range(repeats + 1)][1:]
    first_ms = Spread.of([marks[0] for marks in runs]) * 1000
    rate = Spread.of([(tokens - 1) / (marks[-1] - marks[0]) for marks in runs])
    print(f"transformers, {frames} frames of {side} px: {first_ms.median:.1f} ms, then {rate.median:.1f} tok/s")
    return {"video": {"frames": frames, "side": side, "first_token_ms": first_ms, "tokens_per_s": rate}}


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of the answer")
    parser.add_argument("--repeats", type=int, default=2)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {"frames": arguments.frames, "tokens": arguments.tokens, "repeats": arguments.repeats}
    script.run_script(arguments, run, run_peer, work)


if __name__ == "__main__":
    main()
