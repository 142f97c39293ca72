"""A training in one TOML file: what is trained, on what, how far, and what is kept of it."""

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
"""The resolved recipe in the folder of a run."""
_MOST_BYTES = 1 << 20
_DEEP = re.compile(r"""(?<![\w"'-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")
"""A dotted key of 32 parts: the time that reading one takes grows with their square."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """``[model]``: what training starts from."""

    path: str | None = None
    """Folder or Hub repository; none is the packaged nano model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights; auto is the checkpoint's on CUDA and float32 on CPU."""
    random: bool = False
    """Start from random weights of this shape instead of its weights."""
    rope_theta: float | None = None
    """Another base of the rotary positions than the checkpoint's, to train longer contexts."""
    max_position_embeddings: int | None = None
    """Another longest context than the checkpoint's."""
    adapter: str | None = None
    """Folder or Hub repository of an adapter to train on from, in place of a fresh one; its rank is ``[targets]``'s."""
    factory: str | None = None
    """``package.module:callable`` from the recipe to a module to train; its attribute ``aria`` is what is exported."""

    def __post_init__(self) -> None:
        for name in ("rope_theta", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")

    def configure(self, config: AriaConfig) -> AriaConfig:
        """The checkpoint's configuration with what these settings change."""
        changed = {
            name: value
            for name in ("rope_theta", "max_position_embeddings")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(config, text=dataclasses.replace(config.text, **changed)) if changed else config


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """``[batch]``: how much one optimizer step sees."""

    tokens: int = 8192
    """Of one micro-batch of one rank; every micro-batch has exactly so many."""
    accumulate: int = 1
    """Micro-batches of one rank whose gradients make one step."""

    def __post_init__(self) -> None:
        for name in ("tokens", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """``[budget]``: how far to train, in exactly one of these measures."""

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    """Of training itself; time spent by runs that were interrupted counts. The schedule always finishes."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"one of steps, epochs and minutes should be set, but {len(given)} are: {given or 'none'}")
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"{name} should be above 0, but is {value}")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """``[schedule]``: the learning rate over a training."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """What follows the warm-up; cosine and linear fall to ``final``."""
    warmup: float = 0.01
    """Share of the training over which the rate rises; in steps where ``warmup_steps`` is set."""
    warmup_steps: int | None = None
    final: float = 0.0
    """Share of the peak rate that is left at the end."""
    average: float | None = None
    """Decay of an exponential moving average of what trains, which is then what is exported and evaluated."""
    max_skipped: int = 0
    """Steps with a gradient that is not finite that one log interval forgives. They change no weight in any case."""

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
    """``[log]``: ``log.jsonl`` in the run's folder is always written."""

    every: int = 10
    """Steps of one line; its numbers are means over them."""
    tensorboard: bool = False
    wandb: str | None = None
    """Project to log to."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every should be 1 or above, but is {self.every}")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """``[evaluate]``: held-out loss and samples, at intervals and at the end."""

    data: tuple[str, ...] = ()
    """Files or folders of held-out conversations, read as ``[data]`` reads its own; none evaluates nothing."""
    split: str = "test"
    """Which file of a folder, and which split of a Hugging Face data set."""
    every: int | None = None
    """Steps between evaluations; none is at the end only."""
    batches: int | None = None
    """A random sample of the held-out rows is used, with as many tokens as so many micro-batches have, of all ranks
    together. The seed draws it; it is the same at each evaluation and on any number of ranks. None: all rows."""
    samples: int = 0
    """Held-out conversations whose last answer is written by the model into ``samples.jsonl``, beside the true one."""
    max_tokens: int = 128
    """Of a sample."""

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
            raise ValueError('[model] adapter is trained on with targets.method = "lora"; merge it to train weights')
        names = ("rope_theta", "max_position_embeddings", "random")
        lost = [name for name in names if getattr(self.model, name) not in (None, False)]
        if lost and self.targets.method == "lora":
            raise ValueError(
                f"[model] {', '.join(lost)}: an adapter's folder cannot hold that, so it would go beside "
                'another base; set targets.method = "full", or export a base with it first and name that as model.path'
            )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Recipe:
        """Check and fill in a table as TOML gives it; see :func:`aria.train.settings.build` for the errors."""
        return build(cls, table)

    @classmethod
    def read(cls, file: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            file: TOML. Paths in it count from the folder that training is started in.
            overrides: ``section.key=value``, the value in TOML; text without quotes is taken as it stands.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: what does not fit, with the file's name.
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
        """The whole recipe, defaults spelled out; :meth:`read` gives the same again."""
        return to_toml(as_table(self))


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The table that a text in TOML holds; ``name`` is what errors call it.

    Raises:
        ValueError: it is not TOML, or deeper than any recipe.
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
    # A budget is one measure; naming another one replaces it.
    if sections == ["budget"]:
        table.clear()
    table[last] = value


def _keys(name: str) -> list[str]:
    """The parts of a dotted key of TOML, in which quotes hold dots together; nothing if it is none."""
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
    """What ``package.module:callable`` names.

    Args:
        name: as a recipe gives it.
        setting: where it stands, for errors.

    Raises:
        ValueError: there is no such module or name, or it cannot be called.
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
    # Data are known by what they hold, wherever they lie; the stream refuses others.
    "data": {"workers", "media_workers", "prefetch", "on_error", "paths"},
    "objective": {"picture_bytes"},
    "optimizer": {"learning_rate", "clip_norm"},
    "schedule": {"max_skipped"},
}
"""Sections, or keys of sections, that may differ when a run is gone on with."""


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
    """What of two recipes differs that a run cannot change half-way, as ``section.key: before -> now``.

    Args:
        before, now: recipes.
        only: names of sections, to give all that differs in these.
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
