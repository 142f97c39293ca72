"""Recipes: errors and their messages, overrides, and the file that is written for a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from aria.config import AriaConfig
from aria.train.recipe import (
    BudgetSettings,
    EvaluateSettings,
    ModelSettings,
    Recipe,
    ScheduleSettings,
    changes,
    load_object,
)
from aria.train.settings import as_table, build, setting, to_toml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["soft", "hard"] = "soft"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate should be 0 or above, but is {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 3
    maybe: float | int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    paths: tuple[str, ...] = ()
    mixer: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    place: Path | None = None


def test_tables_become_settings():
    table = {
        "name": "x",
        "betas": [0, 1],
        "paths": ["a", "b"],
        "mixer": {"a b": 2},
        "inner": {"rate": 1},
        "maybe": 3,
        "place": "here",
    }
    made = build(Outer, table)
    assert made == Outer(
        name="x",
        betas=(0.0, 1.0),
        paths=("a", "b"),
        mixer={"a b": 2.0},
        inner=Inner(rate=1.0),
        maybe=3,
        place=Path("here"),
    )
    assert isinstance(made.betas[0], float) and isinstance(made.maybe, int)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "name is missing"),
        ({"nam": "x"}, "unknown key 'nam' in the recipe; did you mean 'name'?"),
        ({"name": "x", "inner": {"rat": 1}}, r"unknown key 'rat' in \[inner\]; did you mean 'rate'?"),
        ({"name": "x", "inner": {"zzz": 1}}, r"unknown key 'zzz' in \[inner\]; known are kind, rate"),
        ({"name": 7}, "name is 7; expected text"),
        ({"name": "x", "count": 1.5}, "count is 1.5; expected a whole number"),
        ({"name": "x", "count": True}, "count is True; expected a whole number"),
        ({"name": "x", "inner": 3}, "inner is 3; expected a table"),
        ({"name": "x", "inner": {"rate": -1}}, r"\[inner\] rate should be 0 or above, but is -1.0"),
        ({"name": "x", "inner": {"rate": float("nan")}}, "inner.rate is nan; expected a finite number"),
        ({"name": "x", "inner": {"kind": "sof"}}, "inner.kind is 'sof'; expected 'soft' or 'hard'"),
        ({"name": "x", "betas": [0.9]}, "betas has 1 entries; expected 2"),
        ({"name": "x", "betas": 0.9}, "betas is 0.9; expected a list"),
        ({"name": "x", "paths": ["a", 1]}, r"paths\[1\] is 1; expected text"),
        ({"name": "x", "mixer": {"a": "much"}}, "mixer.a is 'much'; expected a number"),
        ({"name": "x", "maybe": "3"}, "maybe is '3'; expected a number or a whole number"),
    ],
)
def test_what_does_not_fit_is_named(table, said):
    with pytest.raises(ValueError, match=said):
        build(Outer, table)


def test_settings_survive_toml():
    import tomllib

    made = Outer(
        name='tab\t"quoted" \\ é 🙂',
        maybe=1e-05,
        paths=("a", "b c"),
        mixer={"data/a.jsonl": 1.5, "b": 2.0},
        inner=Inner(rate=1e22),
    )
    assert build(Outer, tomllib.loads(to_toml(as_table(made)))) == made


# Recipes


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_empty_recipe_is_all_defaults_and_survives_its_own_file(tmp_path):
    recipe = Recipe.read(write(tmp_path, ""))
    assert recipe == Recipe()
    assert Recipe.read(write(tmp_path, recipe.to_toml())) == recipe


def test_overrides_take_toml_or_bare_text(tmp_path):
    file = write(tmp_path, "[budget]\nepochs = 2\n[data]\npaths = ['a']")
    recipe = Recipe.read(
        file,
        [
            "optimizer.learning_rate=1e-3",
            "model.path=some/folder",
            "data.paths=['b', 'c']",
            "budget.steps = 7",
            "seed=3",
            "model.random=true",
            "targets.method=full",
            'data.mixer."c/d.jsonl"=1.5',
            'optimizer.rates."vision_tower.*" = 0.1',
        ],
    )
    assert recipe.data.mixer == {"c/d.jsonl": 1.5} and recipe.optimizer.rates == {"vision_tower.*": 0.1}
    assert recipe.optimizer.learning_rate == 1e-3 and recipe.model.path == "some/folder"
    assert recipe.data.paths == ("b", "c") and recipe.seed == 3 and recipe.model.random
    assert recipe.budget == BudgetSettings(steps=7)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("seed = ", [], "mine.toml: not TOML"),
        ("sed = 1", [], "mine.toml: unknown key 'sed' in the recipe; did you mean 'seed'?"),
        ("[optimiser]\n", [], "unknown key 'optimiser' in the recipe; did you mean 'optimizer'?"),
        ("", ["optimizer.learning_rat=1"], "did you mean 'learning_rate'?"),
        ("", ["seed"], "--set 'seed': expected section.key=value"),
        ("", ['data."mixer=1'], "expected section.key=value"),
        ("", ["data.paths=['a'"], "is not a value of TOML"),
        ("seed = 1", ["seed.x=1"], "seed is not a table"),
        ("", ["batch.tokens=0"], r"\[batch\] tokens should be 1 or above, but is 0"),
        (
            "[budget]\nsteps = 1\nepochs = 1",
            [],
            r"\[budget\] one of steps, epochs and minutes should be set, but 2 are",
        ),
        ("", ["schedule.warmup=3"], r"\[schedule\] warmup should be from 0 to 1, but is 3.0"),
        ("", ["evaluate.every=5"], r"\[evaluate\] data is empty, but every or samples ask"),
        ("", ["model.rope_theta=1e6"], r"\[model\] rope_theta: an adapter's folder cannot hold that.*export a base"),
        ("", ["model.max_position_embeddings=8192", "model.random=true"], "max_position_embeddings, random: an ad"),
        ("", ["objective.balance_group=0"], r"\[objective\] balance_group should be 1 or above"),
    ],
)
def test_mistakes_in_recipes_are_one_clear_error(tmp_path, text, overrides, said):
    with pytest.raises(ValueError, match=said):
        Recipe.read(write(tmp_path, text), overrides)


def test_a_recipe_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"no\.toml: there is no such recipe"):
        Recipe.read("no.toml")


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        (BudgetSettings, {}, "one of steps, epochs and minutes"),
        (BudgetSettings, {"minutes": -1.0}, "minutes should be above 0"),
        (ScheduleSettings, {"average": 1.0}, "average should lie between 0 and 1"),
        (ScheduleSettings, {"warmup_steps": -1}, "warmup_steps should be 0 or above"),
        (ScheduleSettings, {"max_skipped": -1}, "max_skipped should be 0 or above"),
        (EvaluateSettings, {"data": ("a",), "batches": 0}, "batches should be 1 or above"),
        (ModelSettings, {"rope_theta": 0.0}, "rope_theta should be above 0"),
    ],
)
def test_ranges(kind, changed, said):
    with pytest.raises(ValueError, match=said):
        kind(**changed)


def test_the_rope_base_of_longer_contexts():
    config = ModelSettings(rope_theta=5e6, max_position_embeddings=65536).configure(AriaConfig.aria())
    assert config.text.rope_theta == 5e6 and config.text.max_position_embeddings == 65536
    assert ModelSettings().configure(config) is config


def test_only_changes_that_matter_count():
    before = Recipe()
    assert changes(before, dataclasses.replace(before, budget=BudgetSettings(steps=9))) == []
    same = dataclasses.replace(before, data=dataclasses.replace(before.data, workers=9))
    assert changes(before, same) == []
    slower = dataclasses.replace(before, optimizer=dataclasses.replace(before.optimizer, learning_rate=0.5))
    assert changes(before, slower) == []
    other = dataclasses.replace(before, seed=1, optimizer=dataclasses.replace(before.optimizer, weight_decay=0.5))
    found = changes(before, other)
    assert found[0] == "seed: 42 -> 1" and found[1].startswith("optimizer.weight_decay: ") and len(found) == 2


@pytest.mark.parametrize(("former", "today"), [("apart", "per_turn"), ("together", "joint")])
def test_former_values_warn_and_are_equal_to_todays(tmp_path, former, today):
    file = write(tmp_path, f"data.labels = '{former}'")
    with pytest.warns(DeprecationWarning, match=f"data.labels = '{former}' is now called '{today}'"):
        saved = Recipe.read(file)
    now = dataclasses.replace(Recipe(), data=dataclasses.replace(Recipe().data, labels=today))
    assert saved == now and changes(saved, now) == [] and former not in saved.to_toml()


def test_former_keys_warn_and_todays_win():
    @dataclass(frozen=True, kw_only=True)
    class Renamed:
        today: int = setting(1, former="former")

    with pytest.warns(DeprecationWarning, match=r"part\.former is now called part\.today"):
        assert build(Renamed, {"former": 3}, "part") == Renamed(today=3)
    with pytest.raises(ValueError, match="unknown key 'former'"):
        build(Renamed, {"former": 3, "today": 2})


def test_objects_by_name():
    assert load_object("math:sqrt", "[data] factory")(9.0) == 3.0
    for name, said in (
        ("math.sqrt", "expected package.module:callable"),
        ("no_such_module:f", r"\[data\] factory is 'no_such_module:f', but No module named"),
        ("math:pi", "nothing of that name that can be called"),
    ):
        with pytest.raises(ValueError, match=said):
            load_object(name, "[data] factory")


RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_projects_own_recipes_are_valid(file):
    recipe = Recipe.read(file)
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), "a recipe starts by saying what it is for"
    assert recipe.data.weights or recipe.data.factory, "a recipe names its data"
    assert Recipe.from_table(as_table(recipe)) == recipe


def test_there_are_recipes():
    assert {"lora", "full", "projector", "pretrain", "refcoco", "nlvr2", "nextqa", "code"} <= {f.stem for f in RECIPES}
