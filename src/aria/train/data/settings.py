"""``[data]`` of a recipe: which data sets, how they are tokenized, and what happens to unusable rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aria.train.settings import setting


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """``[data]`` of a recipe. ``docs/data.md`` shows the formats."""

    factory: str | None = None
    """``package.module:callable``, called with the recipe, the processor, the rank and the world size; returns a custom
    stream, which may read the other settings."""
    paths: tuple[str, ...] = ()
    """Data sets that are read once per epoch: JSONL files, folders that hold ``<split>.jsonl``, Parquet files, folders
    of Hugging Face ``datasets``, or ``hf:owner/name``, ``hf:owner/name:config``."""
    mixer: Mapping[str, float] = field(default_factory=dict)
    """Data set -> how often it is read per epoch. 1.5 is each row once and a random half twice, 0.5 a random half."""
    split: str = "train"
    """Which file of a folder, and which split of a Hugging Face data set."""
    resample: bool = False
    """Draw the random parts of ``mixer`` again in each epoch."""
    shuffle: bool = True
    """Shuffle the rows in every epoch, by the recipe's seed."""
    labels: Literal["per_turn", "joint"] = setting("per_turn", former_values={"apart": "per_turn", "together": "joint"})
    """How conversations are tokenised: ``per_turn``, each turn's markers and text by themselves, as the authors
    trained; ``joint``, the whole conversation at once, as prompts are at inference."""
    max_length: int | None = None
    """Maximum tokens of a sequence; None: those of a batch. Never more than the model's context."""
    too_long: Literal["skip", "drop_first", "drop_last"] = "skip"
    """What happens to a conversation that is longer, or has more than ``max_crops``: skip it, or drop its first or last
    turns (system messages at the beginning stay). Plain text is cut into sequences."""
    max_crops: int | None = None
    """Maximum image crops in a batch, which limits the memory of the vision encoder."""
    lookahead: int = 8
    """Sequences wait for packing until they would fill this many batches; more fill batches better and take memory. At
    least as many long texts are interleaved."""
    max_image_size: int | None = None
    """Default side of a crop in pixels; None: the processor's for images, the smallest for clips."""
    split_image: bool | None = None
    """Default for splitting images; None: the processor's setting, and yes for documents."""
    num_frames: int = 8
    """Default number of frames of a clip."""
    timestamps: bool = True
    """Write ``[MM:SS]`` before each frame of a clip, as in the authors' cookbook; they trained without."""
    on_error: Literal["skip", "stop"] = "skip"
    """Whether an unusable row is reported and skipped, or ends the training."""
    workers: int = 4
    """Threads that tokenize and decode; 0: the training thread does it."""
    media_workers: int | None = None
    """Sandboxed worker processes that decode media; 0: the threads do it. None: as many as threads."""
    prefetch: int = 4
    """Rows that each thread reads ahead."""

    def __post_init__(self) -> None:
        least = {"max_length": 3, "max_crops": 1, "lookahead": 1, "num_frames": 1, "workers": 0, "prefetch": 1,
                 "media_workers": 0}  # fmt: skip
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"{name} should be {value} or above, but is {given}")
        named = [path.rstrip("/") for path in self.paths]
        if twice := sorted({path for path in named if named.count(path) > 1}):
            raise ValueError(f"paths names {twice[0]!r} more than once; mixer says how often a data set is taken")
        for path, weight in self.mixer.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"mixer should give {path!r} a weight above 0, but gives {weight}")
            if path.rstrip("/") in named:
                raise ValueError(f"{path!r} should stand in paths or in mixer, but stands in both")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every data set."""
        return {**dict.fromkeys(self.paths, 1.0), **self.mixer}
