"""``[data]`` of a recipe: which conversations, how they become tokens, and what happens to those that cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aria.train.settings import setting


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained on. ``docs/data.md`` shows the formats."""

    factory: str | None = None
    """``package.module:callable``, called with the recipe, the processor, the rank and the number of ranks; gives a
    stream of the recipe's own. The other settings are then for it to read."""
    paths: tuple[str, ...] = ()
    """Data sets that are taken once an epoch: JSONL files, folders that hold ``<split>.jsonl``, Parquet files, folders
    of Hugging Face ``datasets``, or ``hf:owner/name``, ``hf:owner/name:config``."""
    mixer: Mapping[str, float] = field(default_factory=dict)
    """Data set -> how often it is taken in an epoch. 1.5 is each row once and a random half of them twice, 0.5 a random
    half."""
    split: str = "train"
    """Which file of a folder, and which split of a Hugging Face data set."""
    resample: bool = False
    """Whether the random parts of ``mixer`` are drawn anew for each epoch."""
    shuffle: bool = True
    """Whether rows come in another order in every epoch, drawn by the recipe's seed."""
    labels: Literal["per_turn", "joint"] = setting("per_turn", former_values={"apart": "per_turn", "together": "joint"})
    """How conversations are tokenised: ``per_turn``, each turn's markers and text by themselves, as the authors
    trained; ``joint``, the whole conversation at once, as prompts are at inference."""
    max_length: int | None = None
    """Most tokens of a sequence; None: as many as a batch has, and in any case no more than the model's context."""
    too_long: Literal["skip", "drop_first", "drop_last"] = "skip"
    """What happens to a conversation that is longer, or has more than ``max_crops``: it is skipped, or its first or
    last turns are left out, whole ones (system messages at its beginning stay). Plain text is cut into sequences."""
    max_crops: int | None = None
    """Most crops of all pictures in a batch, which bounds the memory that the vision encoder takes."""
    lookahead: int = 8
    """Sequences wait to be packed until they would fill so many batches; more fill batches better and take memory. As
    many long texts, or more, are read side by side."""
    max_image_size: int | None = None
    """Side of a crop in pixels where a row does not say; None: the processor's for pictures, the smallest for clips."""
    split_image: bool | None = None
    """Whether pictures are split where a row does not say; None: the processor's setting, and yes for documents."""
    num_frames: int = 8
    """Frames of a clip where a row does not say."""
    timestamps: bool = True
    """Whether ``[MM:SS]`` stands before each frame of a clip, as in the authors' cookbook; they trained without."""
    on_error: Literal["skip", "stop"] = "skip"
    """Whether a row that cannot be used is counted, told and passed over, or ends the training."""
    workers: int = 4
    """Threads that tokenise and decode; 0: the one that trains does it."""
    media_workers: int | None = None
    """Processes, confined, that decode images, clips and documents; 0: the threads do it. None: as many as threads."""
    prefetch: int = 4
    """Rows that each of them is ahead."""

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
        """Every data set with its weight."""
        return {**dict.fromkeys(self.paths, 1.0), **self.mixer}
