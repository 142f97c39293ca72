"""From a clip file to its caption: ``python -m bench.engine.caption FILE --frames 256 --tokens 100``.

Reports the time of whole runs from the path to the last token, then of the stages of one run: reading and decoding the
clip, moving and resizing its frames, vision encoder with projector, prefill, decoding. Caches are cleared between runs.
``bench.engine.clip --make`` writes a file like a camera's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aria import Engine, SamplingParams
from aria.engine.engine import Answer
from aria.processor.image_inputs import Prepared, load_crops
from bench import measure, script
from bench.measure import Ceilings, Spread


def forget(engine: Engine) -> None:
    """Clear all caches: prefixes, image tokens, decoded frames."""
    engine.reset()
    engine.processor.media = replace(engine.processor.media, cache_bytes=0)


def finish(engine: Engine, answer: Answer) -> tuple[float, float]:
    """Finish an answer; return the times of the first token and of the last."""
    first = 0.0
    while not answer.done:
        if engine.step() and not first:
            first = time.perf_counter()
    return first, time.perf_counter()


def prepare(engine: Engine, path: Path, frames: int) -> Prepared:
    """Prepare the prompt, decoding the clip."""
    clip = {"type": "video", "path": str(path), "num_frames": frames}
    question = {"type": "text", "text": "Describe this video."}
    return engine.prepare([{"role": "user", "content": [clip, question]}])


def whole(engine: Engine, path: Path, frames: int, params: SamplingParams) -> tuple[float, float]:
    """Return seconds to the first token and to the last."""
    forget(engine)
    began = time.perf_counter()
    first, last = finish(engine, engine.queue(prepare(engine, path, frames), params))
    return first - began, last - began


@torch.inference_mode()
def apart(engine: Engine, path: Path, frames: int, params: SamplingParams) -> dict[str, float]:
    """Return seconds of each stage, with a synchronisation after each."""
    forget(engine)
    marks = [time.perf_counter()]

    def mark() -> None:
        measure.synchronize(engine.device)
        marks.append(time.perf_counter())

    prepared = prepare(engine, path, frames)
    mark()
    load_crops([span.data for span in prepared.images], engine.device)
    mark()
    answer = engine.queue(prepared, params)
    engine.encode_images(prepared)
    mark()
    first, last = finish(engine, answer)
    decoded, cropped, encoded = (b - a for a, b in itertools.pairwise(marks))
    # The encoder loads the crops again itself.
    stages = {"decode": decoded, "preprocess": cropped, "encoder": encoded - cropped}
    return stages | {"prompt": first - marks[-1], "answer": last - first}


def run(engine: Engine, limits: Ceilings, *, file: Path, frames: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Caption the clip ``file`` with ``tokens`` tokens."""
    params = SamplingParams(max_tokens=tokens, temperature=2.0, seed=0, ignore_eos=True)
    runs = [whole(engine, file, frames, params) for _ in range(repeats + 1)][1:]
    first, last = (Spread.of(times) for times in zip(*runs, strict=True))
    stages = apart(engine, file, frames, params)
    print(
        f"{file.name}, {frames} frames: first token after {first.median:.2f} s, "
        f"{tokens} tokens after {last.median:.2f} s ({last.low:.2f} to {last.high:.2f})"
    )
    print("stages: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()))
    return {"caption": {"frames": frames, "tokens": tokens, "first_s": first, "last_s": last, "stages_s": stages}}


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("file", type=Path)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of the answer")
    parser.add_argument("--repeats", type=int, default=2)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = script.parse(__doc__, add_work, argv)
    work = {name: getattr(arguments, name) for name in ("file", "frames", "tokens", "repeats")}
    script.run_script(arguments, run, None, work)


if __name__ == "__main__":
    main()
