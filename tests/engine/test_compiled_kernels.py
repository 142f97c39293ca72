"""What kernels ask of GPUs of every generation, found out without any: see :mod:`fake_gpu` and :mod:`gpu_programs`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from tests.helpers.repository import environment

triton = pytest.importorskip("triton")

KB = 1024
ROOM = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99, "12.1": 99}
"""KB of shared memory that a program may have, by compute capability (NVIDIA's programming guide)."""
DECODE = {
    "moe_decode._experts_up_kernel",
    "moe_decode._down_kernel",
    "gemv._up_kernel",
    "paged_attention._decode_kernel",
}

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="the stand-in for a GPU's driver is written for Triton 3.6"
)


@pytest.fixture
def ask(tmp_path) -> Callable[..., Any]:
    """Ask a question of :mod:`gpu_programs` in a process that compiles kernels instead of interpreting them."""

    def answer(*question: str) -> Any:
        script = [sys.executable, "-m", "tests.helpers.gpu_programs", *question]
        variables = environment(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
        done = subprocess.run(script, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return answer


def check(capability: str, needs: dict[str, int]) -> None:
    needs = {name.removeprefix("aria.ops.kernels."): taken for name, taken in needs.items()}
    assert {name: taken for name, taken in needs.items() if taken > ROOM[capability] * KB} == {}
    assert needs.keys() >= DECODE
    major = int(capability.split(".")[0])
    assert ("grouped_gemm._grouped" in needs) == (major >= 9)  # which needs the copy engine
    assert ("vision_attention._attention_kernel" in needs) == (major == 9)  # which is written for Hopper alone


@pytest.mark.slow
def test_kernels_fit_into_the_shared_memory_of_a_workstations_card(ask):
    heavy = (
        "moe_decode,gemv,grouped_gemm,chunk,paged,lora_train,swiglu,multi_lora_decode._thin,permute._norm,"
        "vision_attention"
    )
    check("12.0", ask("shared", "12.0", "bfloat16", "0", heavy))


TUNED = {
    "grouped_gemm._grouped": [
        {"ROWS_BLOCK": 64, "O_BLOCK": 64, "I_BLOCK": 128, "GROUP": 1, "num_warps": 4},
        {"ROWS_BLOCK": 128, "O_BLOCK": 128, "I_BLOCK": 64, "GROUP": 6, "num_warps": 8},
    ],
    "moe_decode._experts_up_kernel": [
        {"BLOCK_O": 64, "BLOCK_T": 16, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4},
        {"BLOCK_O": 64, "BLOCK_T": 32, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4},
        {"BLOCK_O": 64, "BLOCK_T": 64, "BLOCK_D": 128, "STAGES": 4, "num_warps": 4},
        {"BLOCK_O": 64, "BLOCK_T": 64, "BLOCK_D": 128, "STAGES": 5, "num_warps": 4},
    ],
    "moe_decode._down_kernel": [
        {"BLOCK_O": 64, "BLOCK_T": 16, "BLOCK_F": 128, "STAGES": 4, "num_warps": 4},
        {"BLOCK_O": 64, "BLOCK_T": 32, "BLOCK_F": 128, "STAGES": 4, "num_warps": 4},
        {"BLOCK_O": 128, "BLOCK_T": 64, "BLOCK_F": 128, "STAGES": 3, "num_warps": 8},
    ],
    "gemv._up_kernel": [{"BLOCK_F": 8, "BLOCK_D": 256, "HELD": 4, "STAGES": 4, "num_warps": 4}],
    "gemv._down_kernel": [{"BLOCK_D": 4, "BLOCK_F": 512, "HELD": 4, "STAGES": 5, "num_warps": 4}],
    "chunk_attention._chunk_kernel": [
        {"QUERIES": 64, "KEYS": 64, "STAGES": 3, "num_warps": 4},
        {"QUERIES": 128, "KEYS": 64, "STAGES": 3, "num_warps": 8},
    ],
    "lora_train._shrink": [{"I_BLOCK": 128, "E_BLOCK": 64, "R_BLOCK": 16, "num_stages": 3, "num_warps": 4}],
    "swiglu._backward": [
        {"F_BLOCK": 64, "E_BLOCK": 64, "R_BLOCK": 16, "num_stages": 3, "num_warps": 4},
        {"F_BLOCK": 64, "E_BLOCK": 1, "R_BLOCK": 16, "num_stages": 3, "num_warps": 4},
    ],
}
"""What was fastest on an H100 (docs/lab/kernels.md)."""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", pytest.param("8", marks=pytest.mark.soak)])
def test_hopper_compiles_what_was_tuned_and_nothing_after_warming_up(ask, rank):
    found = ask("warmed", "9.0", rank)
    assert found["new"] == []
    # Chunks of up to 36,864 tokens, by themselves and over up to 16,384 of their past, in steps of 4,096.
    assert found["plans"] == 9 * (1 + 4)
    for name, tuned in TUNED.items():
        tiles = [{key: tile[key] for key in tuned[0]} for tile in found["tiles"][f"aria.ops.kernels.{name}"]]
        assert [tile for tile in tiles if tile not in tuned] == [], name
        assert [tile for tile in tuned if tile not in tiles] == [], name


@pytest.mark.soak
@pytest.mark.parametrize(
    ("capability", "dtype", "rank"),
    [*product(ROOM, ["bfloat16"], ["0", "8", "64"]), *product(ROOM, ["float16"], ["8"])],
)
def test_kernels_fit_into_shared_memory(ask, capability, dtype, rank):
    check(capability, ask("shared", capability, dtype, rank))


@pytest.mark.soak
@pytest.mark.parametrize(("capability", "rank"), list(product(ROOM, ["8", "64"])))
def test_kernels_fit_into_shared_memory_in_float32(ask, capability, rank):
    needs = ask("shared", capability, "float32", rank)
    assert {name: taken for name, taken in needs.items() if taken > ROOM[capability] * KB} == {}
    assert {name.removeprefix("aria.ops.kernels.") for name in needs} >= DECODE


@pytest.mark.soak
def test_kernels_run_on_the_gpu_of_their_tensors(ask):
    found = ask("placed")
    assert found["misplaced"] == []
    assert found["launches"].keys() == {"engine", "steps", "forward", "generate"} and all(found["launches"].values())


@pytest.mark.slow
def test_a_gpu_that_runs_no_kernels_is_reported_at_the_start_and_answers(ask):
    found = ask("unfit")
    assert found["launches"] == 0 and found["tokens"] == 3
    assert found["at start"] == found["heard"]
    [message] = found["heard"]
    assert "compute capability is 7.5" in message and "need 8.0" in message
