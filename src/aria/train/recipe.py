"""The recipe: one training as a TOML file."""

from __future__ import annotations

import dataclasses
import importlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aria.config import AriaConfig
from aria.hub import read_text
from aria.train.data import DataSettings
from aria.train.objective import ObjectiveSettings
from aria.train.optimizer import OptimizerSettings
from aria.train.parallel import ParallelSettings
from aria.train.settings import as_table, build, to_toml
from aria.train.state import CheckpointSettings
from aria.train.targets import Targets

FILE_NAME = "recipe.toml"
"""File of the resolved recipe in a run's folder."""
_MOST_BYTES = 1 << 20
_DEEP = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")
"""A dotted key of 32 parts: parsing takes quadratic time."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """``[model]``: the base model."""

    path: str | None = None
    """Folder or Hub repository; None is the packaged nano model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of the weights; auto is the checkpoint's on CUDA and float32 on the CPU."""
    random: bool = False
    """Start from random weights of this shape."""
    rope_theta: float | None = None
    """RoPE base in place of the checkpoint's, to train longer contexts."""
    max_position_embeddings: int | None = None
    """Maximum context in place of the checkpoint's."""
    adapter: str | None = None
    """Folder or Hub repository of an adapter to continue from; its modules and rank must be those of ``[targets]``."""
    factory: str | None = None
    """``package.module:callable``, called with the recipe; returns a module whose attribute ``aria`` is exported."""

    def __post_init__(self) -> None:
        for name in ("rope_theta", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")

    def configure(self, config: AriaConfig) -> AriaConfig:
        """Apply these settings to the checkpoint's configuration."""
        changed = {
            name: value
            for name in ("rope_theta", "max_position_embeddings")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(config, text=dataclasses.replace(config.text, **changed)) if changed else config


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """``[batch]``: the size of an optimizer step."""

    tokens: int = 8192
    """Tokens of one micro-batch of one rank; every micro-batch has exactly this many."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches of one rank in one step."""

    def __post_init__(self) -> None:
        for name in ("tokens", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """``[budget]``: how long to train, in exactly one of these units."""

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    """Minutes of training, over all runs. The schedule always finishes."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"one of steps, epochs and minutes should be set, but {len(given)} are: {given or 'none'}")
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """``[schedule]``: the learning rate during a training."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up; cosine and linear fall to ``final``."""
    warmup: float = 0.01
    """Fraction of the training that the warm-up takes."""
    warmup_steps: int | None = None
    """Steps that the warm-up takes, in place of ``warmup``."""
    final: float = 0.0
    """Fraction of the peak rate at the end."""
    average: float | None = None
    """Decay of an exponential moving average of the trained weights, which is exported and evaluated in their place."""
    max_skipped: int = 0
    """Steps with a gradient that is not finite that one log interval allows. They never change a weight."""

    def __post_init__(self) -> None:
        for name in ("warmup", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} should be from 0 to 1, but is {getattr(self, name)}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps should be 0 or above, but is {self.warmup_steps}")
        if self.average is not None and not 0.0 < self.average < 1.0:
            raise ValueError(f"average should lie between 0 and 1, but is {self.average}")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped should be 0 or above, but is {self.max_skipped}")


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """``[log]``: where metrics go. ``log.jsonl`` in the run's folder is always written."""

    every: int = 10
    """Steps per log line; its numbers are means over them."""
    tensorboard: bool = False
    wandb: str | None = None
    """Weights & Biases project."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every should be 1 or above, but is {self.every}")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """``[evaluate]``: held-out loss and samples, at intervals and at the end."""

    data: tuple[str, ...] = ()
    """Held-out data sets, in the formats of ``[data] paths``; empty means no evaluation."""
    split: str = "test"
    """Which file of a folder, and which split of a Hugging Face data set."""
    every: int | None = None
    """Steps between evaluations; None evaluates at the end only."""
    batches: int | None = None
    """Evaluate on a random sample of the rows with the tokens of this many micro-batches of all ranks. The seed draws
    it; it is the same at each evaluation and for any number of ranks. None: all rows."""
    samples: int = 0
    """Number of held-out conversations whose last answer the model writes to ``samples.jsonl``, beside the true one."""
    max_tokens: int = 128
    """Maximum tokens of a sample."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("batches", 1), ("samples", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} should be {least} or above, but is {value}")
        if not self.data and (self.every is not None or self.samples):
            raise ValueError("data is empty, but every or samples ask for an evaluation; name held-out files")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training. Each field is a section of the TOML file."""

    seed: int = 42
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    targets: Targets = field(default_factory=Targets)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    budget: BudgetSettings = field(default_factory=lambda: BudgetSettings(epochs=1.0))
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed should be from 0 to {2**32 - 1}, but is {self.seed}")
        if self.model.adapter is not None and self.targets.method != "lora":
            raise ValueError('[model] adapter needs targets.method = "lora"; merge it to train weights')
        names = ("rope_theta", "max_position_embeddings", "random")
        lost = [name for name in names if getattr(self.model, name) not in (None, False)]
        if lost and self.targets.method == "lora":
            raise ValueError(
                f"[model] {', '.join(lost)}: an adapter's folder cannot hold that, so it would not fit "
                'its base; set targets.method = "full", or export a base with it first and name that as model.path'
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Recipe:
        """Make a recipe from a TOML table; see :func:`aria.train.settings.build` for the errors."""
        return build(cls, table)

    @classmethod
    def read(cls, file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            file: TOML file. Paths in it are relative to the working directory.
            overrides: ``section.key=value`` with a TOML value; text without quotes is a string.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: Something does not fit; the message names the file.
        """
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such recipe; the project's own are in its folder recipes/")
        table = parse_toml(read_text(path, _MOST_BYTES), str(path))
        for override in overrides:
            _override(table, override)
        try:
            return cls.from_table(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """The whole recipe with all defaults; :meth:`read` returns an equal one."""
        return to_toml(as_table(self))


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse TOML; ``name`` is used in errors.

    Raises:
        ValueError: It is not TOML, or nested deeper than any recipe.
    """
    try:
        if deep := _DEEP.search(text):
            raise ValueError(f"the key {deep[0]:.60} has too many parts")
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{name}: not TOML: its values are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: not TOML: {error}") from None


def _override(table: dict[str, Any], override: str) -> None:
    """Put ``section.key=value`` into a table."""
    name, sign, text = override.partition("=")
    keys = _keys(name)
    if not sign or not keys:
        raise ValueError(f"--set {override!r}: expected section.key=value, such as optimizer.learning_rate=1e-4")
    try:
        value = parse_toml(f"value = {text.strip()}", "--set")["value"]
    except ValueError:
        if text.strip()[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"--set {override!r}: {text.strip()} is not a value of TOML") from None
        value = text.strip()
    *sections, last = keys
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set {override!r}: {section} is not a table")
    # A budget has one unit; another one replaces it.
    if sections == ["budget"]:
        table.clear()
    table[last] = value


def _keys(name: str) -> list[str]:
    """The parts of a dotted TOML key, which may be quoted; empty if it is not a key."""
    try:
        table: Any = parse_toml(f"{name} = 0", "--set")
    except ValueError:
        return []
    keys = []
    while isinstance(table, dict):
        [(key, table)] = table.items()
        keys.append(key)
    return keys


def load_object(name: str, setting: str) -> Callable[..., Any]:
    """Import what ``package.module:callable`` names.

    Args:
        name: The name in the recipe.
        setting: Name of the setting, for errors.

    Raises:
        ValueError: There is no such module or name, or it cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"{setting} is {name!r}; expected package.module:callable")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{setting} is {name!r}, but {error}") from error
    value = getattr(found, attribute, None)
    if not callable(value):
        raise ValueError(f"{setting} is {name!r}, but {module} has nothing of that name that can be called")
    return value


_FREE = {
    "budget": None,
    "parallel": None,
    "checkpoint": None,
    "log": None,
    "evaluate": None,
    "batch": {"accumulate"},
    # Data are identified by their contents, not their paths; the stream refuses others.
    "data": {"workers", "media_workers", "prefetch", "on_error", "paths"},
    "objective": {"picture_bytes"},
    "optimizer": {"learning_rate", "clip_norm"},
    "schedule": {"max_skipped"},
}
"""Sections, or keys of sections, that may differ when a run is resumed."""


def refuse_changes(file: Path, before: Recipe, now: Recipe) -> None:
    """Refuse to resume a run with another recipe.

    Raises:
        ValueError: A key that may not change differs.
    """
    if found := changes(before, now):
        raise ValueError(
            f"{file.parent} holds checkpoints of another recipe ({'; '.join(found[:6])}); name another --out, or "
            f"resume with the recipe of the run: {file}"
        )


def changes(before: Recipe, now: Recipe, *, only: Sequence[str] = ()) -> list[str]:
    """Differences between two recipes that a resumed run may not have, as ``section.key: before -> now``.

    Args:
        before, now: The recipes.
        only: Names of sections, to return all differences in these.
    """
    old, new = as_table(before), as_table(now)
    for table in () if only else (old, new):
        # In the order of the data sets, as the fingerprints of those are.
        table["data"]["mixer"] = list(table["data"].get("mixer", {}).values())
    found = []
    for section in only or dict.fromkeys([*old, *new]):
        free = set() if only else _FREE.get(section, set())
        if free is None:
            continue
        a, b = old.get(section), new.get(section)
        if not isinstance(a, dict) or not isinstance(b, dict):
            if a != b:
                found.append(f"{section}: {a} -> {b}")
            continue
        for key in dict.fromkeys([*a, *b]):
            if key not in free and a.get(key) != b.get(key):
                found.append(f"{section}.{key}: {a.get(key)} -> {b.get(key)}")
    return found
