"""Benchmarks of operations and the engine: floors against hand-computed numbers, and each script end to end."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from aria import AriaConfig
from aria.config import TextConfig
from aria.model import Aria, Packed
from aria.ops import Segments
from bench import floors, measure, performance, plots, script
from bench.engine import adapters, caption, decode, prefill, throughput, video
from bench.floors import Work
from bench.kernels import operations as kernels
from bench.measure import Spread
from bench.shapes import small_config
from tests.helpers.repository import CLIPS

SMALL = ("--model", "small", "--device", "cpu")


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def numbers(value) -> list[float]:
    """Return all numbers in nested results."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_decode_floor_counts_weights_and_cache():
    text = AriaConfig.aria().text
    one = floors.decode_step(text, 1, 0, 6)
    # 28 layers: attention, router, shared experts, six routed experts; then the head.
    layer = 4 * 2560**2 + 64 * 2560 + 3 * 2560 * 3328 + 6 * 3 * 2560 * 1664
    assert one.nbytes == 2 * (28 * layer + 100352 * 2560)
    assert one.flops == one.nbytes  # two bytes and two operations per weight
    cached = floors.decode_step(text, 1, 1000, 6)
    assert cached.nbytes - one.nbytes == 1000 * AriaConfig.aria().cache_bytes_per_token("bfloat16") == 286_720_000
    # 8.2 GB at 2.75 TB/s.
    assert floors.decode_step(text, 1, 128, 6).seconds(2.75e12, 760e12) * 1000 == pytest.approx(2.819, abs=0.001)


def test_expected_experts():
    text = AriaConfig.aria().text
    assert floors.expected_experts(text, 1) == pytest.approx(6)
    assert floors.expected_experts(text, 8) == pytest.approx(34.9, abs=0.05)
    assert floors.expected_experts(text, 64) == pytest.approx(63.9, abs=0.05)


def test_prompt_floor_counts_products_and_causal_attention():
    text = AriaConfig.aria().text
    work = floors.prompt(text, 32768)
    attention = 28 * 4 * 2560 * 32768**2 / 2
    assert attention / 1e12 == pytest.approx(154, abs=0.5)
    assert (work.flops - attention) / 32768 == pytest.approx(2 * 3.601e9, rel=1e-3)
    assert work.seconds(2.75e12, 760e12) * 1000 == pytest.approx(513, abs=1)
    # In two halves, the second attends to the first; all pairs are counted once.
    halves = floors.prompt(text, 16384) + floors.prompt(text, 16384, past=16384)
    assert halves.flops == pytest.approx(work.flops, rel=1e-4)


@pytest.mark.parametrize(("patches", "tera"), [(1225, 1.213), (4900, 7.088)])
def test_image_floor_counts_patches(patches, tera):
    assert floors.image(AriaConfig.aria(), patches).flops / 1e12 == pytest.approx(tera, abs=0.001)


def test_floor_is_the_slower_of_memory_and_products():
    assert Work(10, 1).seconds(5, 1) == 2
    assert Work(10, 30).seconds(5, 1) == 30
    assert (Work(1, 2) + Work(3, 4)) * 2 == Work(8, 12)


def test_idle_time_is_the_time_between_graphs():
    def graph(launch: int, start: int) -> list[tuple[int, int, int]]:
        return [(launch, start + 10 * i, start + 10 * i + 9) for i in range(10)]

    # Three graphs of 99 ns with gaps of 21 and 31 ns; a single copy in the first gap is not a graph.
    kernels_run = [*graph(7, 0), (8, 105, 110), *graph(9, 120), *graph(11, 250)]
    gap, share = decode.idle_between_launches(kernels_run)
    assert (gap, share) == (26, 52 / 349)
    # Overlapping graphs, as with programmatic launches, leave no idle time.
    assert decode.idle_between_launches([*graph(1, 0), *graph(2, 95)])[0] == 0
    with pytest.raises(RuntimeError, match="at least two"):
        decode.idle_between_launches(graph(1, 0))


def test_experts_touched_counts_experts_of_the_same_step():
    config = small_config()
    model = Aria.random(config, std=0.5)
    sequences = [[3, 1, 4, 1, 5], [2, 7, 1, 8], [6, 6, 2]]
    chosen = []
    for ids in sequences:
        logits = model(
            torch.tensor(ids), Packed(config.text, Segments.of([len(ids)])), router_logits=True
        ).router_logits
        chosen.append([layer[-2:].topk(config.text.moe_topk).indices.tolist() for layer in logits])
    counts = [len({expert for one in chosen for expert in one[layer][step]}) for layer in range(2) for step in range(2)]
    assert decode.experts_touched(model, sequences, 2) == sum(counts) / len(counts)
    assert decode.experts_touched(model, sequences[:1], 2) == config.text.moe_topk


def test_random_prompts_have_no_image_tokens():
    config = AriaConfig(text=TextConfig(vocab_size=12))
    ids = measure.random_prompt(config, 2000, torch.Generator().manual_seed(0))
    assert set(ids) == set(range(12)) - {config.image_token_index}


def test_spread():
    assert Spread.of([3, 1, 2]) * 2 == Spread(4, 2, 6)


def test_kernels(capsys):
    kernels.main([*SMALL, "--repeats", "1"])
    results = last_line(capsys)
    assert "moe_layer 5 x 64" in plots.tables(results)
    rows = results["kernels"]
    assert {row["name"].split()[0] for row in rows} >= {"norm_linear", "linear_add", "moe_layer", "decode_attention"}
    assert all(row["error"] < 1e-5 and row["us"]["median"] > 0 and row["floor_us"] > 0 for row in rows)
    assert all(row["library_us"] for row in rows)


@pytest.mark.slow
def test_decode(capsys, tmp_path):
    file = tmp_path / "decode.json"
    decode.main([*SMALL, "--max-batch", "4", "--batch", "1", "3", "--context", "20", "40", "--steps", "4",
                 "--waiting", "0", "6", "--peer", "transformers", "--json", str(file)])  # fmt: skip
    results = last_line(capsys)
    assert results == json.loads(file.read_text())
    assert [(row["batch"], row["context"]) for row in results["decode"]] == [(1, 20), (3, 20), (1, 40)]
    assert [row["waiting"] for row in results["waiting"]] == [0, 6]
    for row in results["decode"]:
        assert row["tokens_per_s"] * row["ms_per_step"] / 1000 == pytest.approx(row["batch"])
        assert 3 <= row["experts_touched"] <= 8
        assert row["mean_context"] > row["context"]
    assert all(row["tokens_per_s"] > 0 for row in results["peer"]["decode"])


@pytest.mark.slow
def test_adapters(capsys):
    adapters.main([*SMALL, "--batch", "1", "3", "--context", "16", "--steps", "4", "--adapters", "2", "--rank", "4",
                   "--read", "100"])  # fmt: skip
    results = last_line(capsys)
    assert [row["batch"] for row in results["decode"]] == [1, 3]
    assert all(row[f"{kind}_ms"] > 0 for row in results["decode"] for kind in ("none", "one", "all"))
    assert results["adapter_bytes"] > 0


def test_a_cache_that_is_too_small_is_an_error(capsys):
    engine_arguments = [*SMALL, "--max-batch", "4", "--cache-tokens", "96", "--batch", "4", "--context", "20"]
    with pytest.raises(RuntimeError, match="the cache is too small"):
        decode.main([*engine_arguments, "--steps", "8"])


@pytest.mark.slow
def test_prefill(capsys):
    prefill.main([*SMALL, "--tokens", "20", "5000", "--images", "2", "--repeats", "1", "--peer", "transformers"])
    results = last_line(capsys)
    names = [row["name"] for row in results["prefill"]]
    assert names[0] == "text, 20 tokens"
    assert "encoder, 2 of 56 x 31" in names
    assert "image of 28 px + question" in names
    assert {row["name"] for row in results["peer"]["prefill"]} >= {"encoder, 2 of 28 x 28"}
    assert all(row["ms"]["median"] > 0 and row["floor_ms"] > 0 for row in results["prefill"])


def test_caption(capsys):
    clip = CLIPS / "cut.mp4"
    caption.main([str(clip), *SMALL, "--frames", "3", "--tokens", "4", "--repeats", "1"])
    row = last_line(capsys)["caption"]
    assert 0 < row["first_s"]["median"] < row["last_s"]["median"]
    assert set(row["stages_s"]) == {"decode", "preprocess", "encoder", "prompt", "answer"}
    assert row["stages_s"]["decode"] > 0


def test_video(capsys):
    video.main([*SMALL, "--frames", "3", "--tokens", "4", "--repeats", "1", "--peer", "transformers"])
    results = last_line(capsys)
    assert results["video"]["frames"] == 3
    assert results["video"]["prompt_tokens"] > 3 * small_config().image_sizes()[28]
    assert results["video"]["tokens_per_s"]["median"] > 0
    assert results["peer"]["video"]["first_token_ms"]["median"] > 0


@pytest.mark.slow
def test_throughput(capsys):
    throughput.main([*SMALL, "--max-batch", "4", "--rates", "20", "60", "--seconds", "0.2", "--longest", "16"])
    rows = last_line(capsys)["throughput"]
    assert [(row["mix"], row["requests_per_s"]) for row in rows] == [
        ("text", 20), ("text", 60), ("images", 20), ("images", 60),
    ]  # fmt: skip
    for row in rows:
        assert row["requests"] >= 2
        assert row["first_token_ms"]["p99"] >= row["first_token_ms"]["p50"] > 0


@pytest.mark.slow
def test_all_benchmarks_on_one_engine_make_a_page(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    performance.main([*SMALL, "--max-batch", "6", "--peer", "transformers", "--json", str(file)])
    results = last_line(capsys)
    assert "failed" not in results
    assert "failed" not in results["peer"]
    assert all(number == number for number in numbers(results)), "a result is not a number"
    page.write_text(f"Before\n{plots.BEGIN}\nold\n{plots.END}\nafter\n")
    plots.main([str(file), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("Before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for word in ("batch 3, context 16", "transformers 5.", "encoder, 2 of 56 x 56", "images, 50/s"):
        assert word in text
    for figure in ("latency.png", "context.png"):
        assert f"(page/{figure})" in text
        assert (tmp_path / "page" / figure).read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="should have"):
        plots.main([str(file), "--page", str(page)])


def test_a_failing_part_does_not_stop_the_others(capsys):
    results: dict = {}

    def broken() -> dict:
        raise ValueError("too small")

    performance.attempt(results, "decode", broken)
    performance.attempt(results, "video", lambda: {"video": 1})
    assert results == {"failed": {"decode": "ValueError: too small"}, "video": 1}


def test_disposed_engine_releases_its_memory():
    arguments = script.parse(None, decode.add_work, [*SMALL, "--max-batch", "2"])
    engine = script.make_engine(arguments)
    decode.run(engine, measure.Ceilings(1e9, 1e9, 1e9), batches=(1,), contexts=(8,), steps=2)
    weight = weakref.ref(engine.model.language_model.lm_head.weight)
    script.dispose(engine)
    assert weight() is None


def test_clock_reports_median_minimum_and_maximum():
    calls = []
    spread = measure.clock(lambda: calls.append(1), torch.device("cpu"), repeats=5, warm_up=2)
    assert len(calls) == 7
    assert 0 <= spread.low <= spread.median <= spread.high
