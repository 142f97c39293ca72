"""The training loop on a toy problem with known numbers: steps, ends, skipped steps, logs."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from aria.train.curve import LossCurve
from aria.train.objective import Losses
from aria.train.progress import (
    JsonLines,
    Metrics,
    Reporter,
    TensorBoard,
    Wandb,
    drop_after,
    last_evaluated,
    load_report,
    measured_rate,
)
from aria.train.run import run_to_end
from aria.train.schedule import ShareBudget, StepBudget, TimeBudget, lr_factor
from aria.train.trainer import LoopSettings, Position, Trainer
from aria.train.update import ParameterUpdate

RANKS = SimpleNamespace(device=torch.device("cpu"), sum=lambda x: x, max=lambda x: x)


class Numbers:
    """Batches of four pairs of numbers, infinite or a given number; the state counts them."""

    def __init__(self, end: int | None = None, poison: tuple[int, ...] = ()):
        self.given, self._end, self._poison = 0, end, poison

    def __iter__(self):
        while self._end is None or self.given < self._end:
            generator = torch.Generator().manual_seed(self.given)
            x = torch.randn(4, 3, generator=generator)
            if self.given in self._poison:
                x[0, 0] = math.nan
            self.given += 1
            yield SimpleNamespace(input_ids=x, y=x @ torch.tensor([1.0, -2.0, 0.5]), labels=4)

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def toy(**changes):
    """A line to fit, and everything around it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)

    def objective(batch, step):
        loss = (model(batch.input_ids)[:, 0] - batch.y).square().sum() / step.labels
        return Losses(loss, {"loss": loss.detach()}, torch.tensor([[0.5, 0.5, 0.0]]) / step.micro_batches)

    optimizer = changes.pop("optimizer", None) or torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    parameters = dict(model.named_parameters())
    average = changes.pop("average", None)
    update = ParameterUpdate(parameters, optimizer, clip=nn.utils.clip_grad_norm_, clip_norm=10.0, average=average)
    stream = changes.pop("stream", None) or Numbers()
    budget = changes.pop("budget", None) or StepBudget(12)
    lines: list[dict] = []
    sink = SimpleNamespace(write=lambda line: lines.append(dict(line)), close=lambda: None)
    reporter = Reporter([sink], Console(file=io.StringIO()))
    outside = {name: changes.pop(name) for name in ("save", "due", "evaluate", "position", "flops") if name in changes}
    settings = LoopSettings(**{"log_every": 4, **changes})
    trainer = Trainer(objective, stream, update, budget, settings, RANKS, reporter=reporter, **outside)
    return SimpleNamespace(model=model, trainer=trainer, update=update, stream=stream, lines=lines)


def test_it_reduces_the_loss_and_logs_means_of_intervals():
    run = toy(budget=StepBudget(200), schedule={"kind": "cosine"})
    assert run_to_end(run.trainer) == "done"
    torch.testing.assert_close(run.model.weight[0], torch.tensor([1.0, -2.0, 0.5]), atol=0.02, rtol=0)
    assert [line["step"] for line in run.lines] == list(range(4, 201, 4))
    assert run.lines[-1]["loss"] < run.lines[0]["loss"] / 100
    assert run.lines[0]["load entropy 0"] == pytest.approx(math.log(2) / math.log(3))
    assert run.lines[0]["dead experts"] == {"0": [2]}
    assert run.lines[-1]["tokens"] == 200 * 4 and run.lines[-1]["tokens/s"] > 0
    assert run.lines[-1]["learning rate"] < run.lines[0]["learning rate"] == pytest.approx(0.1, rel=0.01)


class Joined(Numbers):
    """The same numbers, two batches as one."""

    def __iter__(self):
        for a, b in zip(*[super().__iter__()] * 2, strict=False):
            x, y = torch.cat([a.input_ids, b.input_ids]), torch.cat([a.y, b.y])
            yield SimpleNamespace(input_ids=x, y=y, labels=8)


def test_accumulated_parts_make_the_step_of_the_whole():
    weights = []
    for stream, accumulate in ((Joined(), 1), (Numbers(), 2)):
        run = toy(stream=stream, budget=StepBudget(3), accumulate=accumulate)
        run_to_end(run.trainer)
        weights.append(run.model.weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_stops_the_run(fused):
    saved = []
    run = toy(
        stream=Numbers(poison=(5,)), save=lambda wait, prune: saved.append((prune, run.model.weight.detach().clone()))
    )
    if not fused:
        run.update.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
        run.update.optimizer.param_groups[0]["initial_lr"] = 0.1
    with pytest.raises(FloatingPointError, match="1 of the last 4 steps before step 8"):
        run_to_end(run.trainer)
    assert run.lines[-1]["skipped"] == 1 and len(saved) == 1
    [(prune, weight)] = saved
    assert weight.isfinite().all() and not prune, "older weights may be what is wanted"
    forgiving = toy(stream=Numbers(poison=(5,)), max_skipped=1)
    assert run_to_end(forgiving.trainer) == "done" and forgiving.model.weight.isfinite().all()


def test_a_skipped_step_leaves_weights_and_moments_to_the_bit():
    states = []

    def look(step: int) -> bool:
        moments = run.update.optimizer.state[run.model.weight]
        states.append([run.model.weight.detach().clone(), *(value.clone() for value in moments.values())])
        return False

    run = toy(stream=Numbers(poison=(2,)), max_skipped=1, budget=StepBudget(4), due=look)
    run_to_end(run.trainer)
    _, second, third, fourth = states
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert not torch.equal(third[0], fourth[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_quietly(number):
    saves, before = [], signal.getsignal(number)
    run = toy(budget=StepBudget(1000), save=lambda wait, prune: saves.append(wait))
    inner = run.trainer.objective

    def interrupted(batch, step):
        if run.trainer.position.step == 6:
            signal.raise_signal(number)
        return inner(batch, step)

    run.trainer.objective = interrupted
    assert run_to_end(run.trainer) == "terminated"
    assert run.trainer.position.step == 7 and saves == [True]
    assert run.lines[-1]["step"] == 7
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait():
    run = toy(budget=StepBudget(1000))
    inner = run.trainer.objective

    def interrupted(batch, step):
        # Signals to the process may be merged into one, or reach Python after the step.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return inner(batch, step)

    run.trainer.objective = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_to_end(run.trainer)
    assert run.trainer.position.step == 0


def test_it_stops_after_a_time_and_when_the_data_end():
    assert run_to_end(toy(stop_after=0.0).trainer) == "time is up"
    run = toy(stream=Numbers(5), accumulate=2)
    assert run_to_end(run.trainer) == "data ended"
    # The last step has one part less, as many labels less, and is a step all the same.
    assert run.trainer.position.step == 3


def test_it_saves_when_it_is_time_and_once_more_at_the_end():
    saves = []
    run = toy(budget=StepBudget(7), due=lambda step: step % 3 == 0, save=lambda wait, prune: saves.append(wait))
    run_to_end(run.trainer)
    assert saves == [False, False, True]


def test_held_out_data_are_evaluated_at_intervals_and_at_the_end():
    saves = []
    run = toy(
        budget=StepBudget(10),
        evaluate_every=4,
        evaluate=lambda: {"held-out loss": 1.5},
        save=lambda wait, prune: saves.append(run.trainer.position.step),
    )
    run_to_end(run.trainer)
    assert [line["step"] for line in run.lines if "held-out loss" in line] == [4, 8, 10]
    assert saves == [10], "evaluating writes no checkpoint"


@pytest.mark.parametrize("disk", ["there", "full"])
def test_steps_before_held_out_data_that_fail_are_saved(disk):
    def fails():
        raise KeyError("no such row")

    def save(wait, prune):
        saves.append((run.trainer.position.step, wait, prune))
        if disk == "full":
            raise OSError("no space left")

    saves = []
    run = toy(evaluate_every=4, evaluate=fails, save=save)
    said = "no such row" if disk == "there" else "no such row.*could not be saved either: no space left"
    with pytest.raises(KeyError if disk == "there" else RuntimeError, match=said):
        run_to_end(run.trainer)
    assert saves == [(4, True, False)] and not run.trainer.finished


def test_a_training_is_saved_before_held_out_data_can_fail():
    def fails():
        raise OSError("no such file")

    saves = []
    run = toy(budget=StepBudget(3), evaluate=fails, save=lambda wait, prune: saves.append(wait))
    with pytest.raises(OSError, match="no such file"):
        run_to_end(run.trainer)
    assert saves == [True]


def test_a_last_checkpoint_that_fails_leaves_a_finished_training():
    def full(wait, prune):
        raise OSError("no space left")

    run = toy(budget=StepBudget(3), save=full)
    with pytest.raises(OSError, match="no space left"):
        run_to_end(run.trainer)
    assert run.trainer.finished


def test_data_without_a_batch_are_an_error():
    run = toy(stream=Numbers(0))
    with pytest.raises(ValueError, match="ended before the first step"):
        run_to_end(run.trainer)
    assert not run.trainer.finished


class Ending(Numbers):
    """Numbers that end, with a filler."""

    def filler(self):
        return SimpleNamespace(input_ids=torch.zeros(4, 3), y=torch.zeros(4), labels=0)


class Two:
    """Ranks that are threads."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._all, self._given = threading.Barrier(2, timeout=60), []

    def max(self, value):
        return max(self._exchange(value))

    def sum(self, value):
        return sum(self._exchange(value))

    def _exchange(self, value):
        self._given.append(value)
        self._all.wait()
        found = list(self._given)
        if not self._all.wait():
            self._given.clear()
        self._all.wait()
        return found


@pytest.mark.parametrize(("kind", "used"), [(Ending, [4, 4]), (Numbers, [3, 3])])
def test_a_rank_whose_data_end_first_takes_part_in_the_steps_of_the_other(kind, used):
    ranks, runs = Two(), [toy(stream=kind(count), accumulate=2) for count in (3, 4)]
    seen = [[], []]
    for run, batches in zip(runs, seen, strict=True):
        run.trainer.ranks, run.trainer._data_ranks, inner = ranks, 2, run.trainer.objective
        run.trainer.objective = lambda batch, step, i=inner, b=batches: b.append(batch.labels) or i(batch, step)
    with ThreadPoolExecutor(2) as pool:
        ends = [future.result() for future in [pool.submit(run_to_end, run.trainer) for run in runs]]
    assert ends == ["data ended"] * 2 and [len(batches) for batches in seen] == used
    assert seen[0] == [4, 4, 4, 0][: used[0]] and seen[1] == [4] * used[1]
    assert [run.trainer.position.step for run in runs] == [2, 2]


@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_step_counts_in_the_printed_time_and_not_in_the_budget(monkeypatch, steps):
    now = [100.0]
    monkeypatch.setattr("aria.train.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))

    def evaluate():
        now[0] += 1000
        return {}

    run = toy(budget=StepBudget(steps), evaluate_every=1, evaluate=evaluate)
    inner = run.trainer.objective

    def slow(batch, step):
        now[0] += 5
        return inner(batch, step)

    run.trainer.objective = slow
    run_to_end(run.trainer)
    assert (run.trainer.clock.spent, run.trainer.clock.seconds) == (5 * steps, 5 * (steps - 1))


def test_the_average_follows_the_weights_and_is_lent():
    run = toy(average=0.5, budget=StepBudget(40))
    run_to_end(run.trainer)
    weight, average = run.model.weight.detach().clone(), run.update.average["weight"]
    assert not torch.equal(weight, average) and torch.allclose(weight, average, atol=0.2)
    with run.update.averaged():
        assert torch.equal(run.model.weight, average)
    assert torch.equal(run.model.weight, weight)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="nothing trains"):
        ParameterUpdate({}, torch.optim.SGD([torch.zeros(1)]), clip=nn.utils.clip_grad_norm_, clip_norm=1.0)


# Schedules and budgets


@pytest.mark.parametrize(
    ("step", "progress", "settings", "expected"),
    [
        (0, 0.0, {"kind": "constant"}, 1.0),
        (4, 0.5, {"kind": "cosine"}, 0.5),
        (4, 1.0, {"kind": "cosine", "final": 0.1}, 0.1),
        (4, 0.25, {"kind": "linear"}, 0.75),
        (4, 0.05, {"kind": "constant", "warmup": 0.1}, 0.5),
        (0, 0.0, {"kind": "cosine", "warmup": 0.1, "reached": 0.02}, 0.2),
        (0, 0.0, {"kind": "cosine", "warmup": 0.1, "reached": 1.0}, 1.0),
        (1, 0.9, {"kind": "constant", "warmup_steps": 8}, 0.25),
        (9, 0.5, {"kind": "linear", "final": 0.2, "warmup_steps": 8}, 0.6),
    ],
)
def test_rates(step, progress, settings, expected):
    assert lr_factor(step, progress, **settings) == pytest.approx(expected)


def test_budgets():
    assert [StepBudget(8).progress(n) for n in (0, 4, 9)] == [0.0, 0.5, 1.0]
    assert ShareBudget(2.0, lambda: 0.5).progress(7) == 0.25
    now = iter([10.0, 15.0, 99.0])
    budget = TimeBudget(10.0, start=0.5, clock=lambda: next(now))
    assert [budget.progress(0), budget.progress(1)] == [0.75, 1.0]


# Logs


def test_a_resumed_log_drops_what_is_done_again(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"st', encoding="utf-8")
    JsonLines(file, step=10).write({"step": 11, "loss": math.nan, "x": 1 / 3})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 5},
        {"step": 10},
        {"step": 11, "loss": None, "x": 0.3333333},
    ]


def test_lines_end_at_newlines_alone(tmp_path):
    file = tmp_path / "samples.jsonl"
    whole = [
        json.dumps({"step": i, "answer": "one\u2028two\u2029three\x85four"}, ensure_ascii=False) for i in (5, 10, 15)
    ]
    cut = json.dumps({"step": 15, "answer": "über"}, ensure_ascii=False).encode().partition(b"\xbc")[0]
    file.write_bytes("".join(f"{line}\n" for line in whole).encode() + cut)
    drop_after(file, 10)
    assert file.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in whole[:2])
    logged = {"step": 20, "held-out loss": 1.0, "held-out problems": ["a\u2028b"]}
    file.write_text(json.dumps(logged, ensure_ascii=False) + "\n", encoding="utf-8")
    assert last_evaluated(file) == 20


def test_metrics_are_means_over_steps_and_sums_over_their_parts():
    metrics = Metrics()
    for value, last in ((1.0, 0), (2.0, 1), (5.0, 1)):
        metrics.add({"loss": torch.tensor(value)}, count=last)
    assert metrics.steps == 2
    assert metrics.drain(lambda x: x * 10) == {"loss": 40.0}
    assert metrics.steps == 0


def test_even_experts_have_entropy_one():
    report = load_report(torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]))
    assert report["load entropy 0"] == pytest.approx(1.0) and report["load entropy 1"] == 0.0
    assert report["dead experts"] == {"1": [1, 2, 3]}


def test_loggers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"\[log\] wandb is 'aria'.*pip install wandb"):
        Wandb(tmp_path, "aria", {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"\[log\] tensorboard.*pip install tensorboard"):
        TensorBoard(tmp_path)


def test_each_run_has_a_wandb_id_of_its_own_and_keeps_it(tmp_path, monkeypatch):
    begun = []
    wandb = SimpleNamespace(init=lambda **settings: begun.append(settings["id"]))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("a", "b", "a"):
        folder = tmp_path / name / "lora"
        folder.mkdir(parents=True, exist_ok=True)
        Wandb(folder, "aria", {})
    first, other, again = begun
    assert first == again != other and "lora" not in (first, other)


def test_wandb_and_tensorboard_get_numbers(tmp_path, monkeypatch):
    begun, logged, scalars = {}, [], []
    run = SimpleNamespace(log=lambda line, step: logged.append((step, line)), finish=lambda: logged.append("finished"))
    wandb = SimpleNamespace(init=lambda **settings: begun.update(settings) or run)
    writer = SimpleNamespace(add_scalar=lambda *one: scalars.append(one), close=lambda: scalars.append("closed"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    line = {"step": 7, "loss": 1.5, "dead experts": {"0": [1]}}
    reporter = Reporter([Wandb(tmp_path, "aria", {"seed": 1}), TensorBoard(tmp_path)], Console(file=io.StringIO()))
    reporter.write(line)
    reporter.close()
    assert begun["project"] == "aria" and begun["resume"] == "allow" and begun["config"] == {"seed": 1}
    assert logged == [(7, {"loss": 1.5, "dead experts": {"0": [1]}}), "finished"]
    assert scalars == [("loss", 1.5, 7), "closed"]


def test_the_bar_shows_what_matters():
    out = io.StringIO()
    reporter = Reporter([], Console(file=out, force_terminal=True, width=160))
    reporter.start(0.25)
    reporter.write({"step": 4, "loss": 1.23456, "tokens/s": 12345.0, "MFU": 0.41, "memory": 2**31})
    reporter.close()
    shown = out.getvalue()
    for text in ("25%", "loss 1.2346", "12,345 tokens/s", "MFU 41.0%", "2.00 GiB"):
        assert text in shown


def test_the_bar_ends_full():
    out = io.StringIO()
    run = toy(budget=StepBudget(7), log_every=5)
    run.trainer._reporter = Reporter([], Console(file=out, force_terminal=True, width=160))
    run_to_end(run.trainer)
    run.trainer._reporter.close()
    assert "100%" in out.getvalue() and "step 7/7" in out.getvalue()


def test_a_log_that_is_piped_says_how_far_it_is_and_what_is_left():
    run = toy(budget=StepBudget(12))
    run_to_end(run.trainer)
    shown = run.trainer._reporter.console.file.getvalue()
    assert re.search(r"^step 8: loss .*, 8/12 steps, \d+(\.\d)? (s|min) left$", shown, re.MULTILINE), shown
    assert [line["total steps"] for line in run.lines] == [12, 12, 12]
    assert run.lines[-1]["progress"] == 1.0 and run.lines[-1]["seconds left"] == 0.0


def test_the_loss_curve_is_that_of_the_log(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 2, "loss": 3.5, "learning rate": 0.1}, {"step": 4, "loss": 3.0}, {"step": 4, "held-out loss": 3.2}]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 5, "other": 1}]), encoding="utf-8")
    assert LossCurve(log).close() == f"loss curve: {tmp_path / 'loss.png'} and {tmp_path / 'loss.tsv'}"
    table = (tmp_path / "loss.tsv").read_text(encoding="utf-8")
    assert table == "step\tloss\theld-out loss\tlearning rate\n2\t3.5\t\t0.1\n4\t3.0\t3.2\t\n"
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).format == "PNG"
    picture.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = LossCurve(log).close()
    assert "no loss.png, because" in said and "pip install matplotlib" in said
    assert not picture.exists() and (tmp_path / "loss.tsv").read_text(encoding="utf-8") == table


def test_the_measured_rate_is_a_rate():
    assert 1e8 < measured_rate(torch.device("cpu"), torch.float32) < 1e14


def test_positions_are_plain_numbers():
    assert json.loads(json.dumps(vars(Position(step=3, progress=0.5)))) == {
        "step": 3,
        "progress": 0.5,
        "seconds": 0.0,
        "tokens": 0,
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_before_the_data_fail_are_saved(accumulate):
    class Failing(Numbers):
        def __iter__(self):
            for batch in super().__iter__():
                if self.given == 8:
                    raise OSError("the disk is gone")
                yield batch

    saved = []
    stream = Failing()
    run = toy(
        stream=stream, accumulate=accumulate, save=lambda wait, prune: saved.append((run_step(), stream.given, wait))
    )

    def run_step():
        return run.trainer.position.step

    with pytest.raises(OSError, match="the disk is gone"):
        run_to_end(run.trainer)
    steps = 7 // accumulate
    assert saved == [(steps, steps * accumulate, True)], "batches of the step that was not made come again"
    assert run.lines[-1]["step"] == steps


def test_data_and_disk_that_fail_together_are_both_reported():
    class Failing(Numbers):
        def __iter__(self):
            batches = super().__iter__()
            yield from (next(batches) for _ in range(3))
            raise ValueError("rows.jsonl:7: not JSON")

    def full(wait, prune):
        raise OSError("no space left")

    with pytest.raises(RuntimeError, match=r"rows\.jsonl:7: not JSON.*no space left") as caught:
        run_to_end(toy(stream=Failing(), save=full).trainer)
    assert isinstance(caught.value.__cause__, ValueError)


def test_another_rank_whose_data_fail_ends_this_one():
    saved, asked = [], []
    run = toy(save=lambda wait, prune: saved.append(run.stream.given))

    def most(value):
        asked.append(value)
        # Of each step's questions the third is for missing batches; the other rank's fail before step 4.
        return 2 if run.trainer.position.step == 4 and run.stream.given == 5 and value == 0 else value

    run.trainer.ranks = SimpleNamespace(device=torch.device("cpu"), sum=lambda x: x, max=most)
    with pytest.raises(RuntimeError, match="data of another process"):
        run_to_end(run.trainer)
    assert saved == [4]


def test_data_that_fail_at_once_leave_no_checkpoint():
    class Empty(Numbers):
        def __iter__(self):
            raise ValueError("no rows")
            yield

    saved = []
    with pytest.raises(ValueError, match="no rows"):
        run_to_end(toy(stream=Empty(), save=lambda wait, prune: saved.append(wait)).trainer)
    assert not saved
