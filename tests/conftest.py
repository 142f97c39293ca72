"""What several test files stand on."""

from __future__ import annotations

import os
import sys

# Before anything imports Triton, and some libraries do: kernels are interpreted here.
# TRITON_INTERPRET=0 (`make test-gpu`) compiles them.
os.environ.setdefault("TRITON_INTERPRET", "1")

import gc

import pytest
import torch

from aria import AriaForConditionalGeneration, AriaImageProcessor, AriaProcessor, cli
from aria.processor import AriaTokenizer

pytest.register_assert_rewrite("tests.helpers")
from tests.helpers import small_tokenizer  # noqa: E402
from tests.helpers.tiny import tiny_config, tiny_model, transformers_twin  # noqa: E402

# The tests' models are small: a second thread costs more than it brings, above all beside other work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without another device are ``cpu``; those of GPUs are skipped where there are none."""
    gpus = 0 if os.environ["TRITON_INTERPRET"] == "1" else torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
        if not needed:
            item.add_marker(pytest.mark.cpu)
        elif gpus < needed:
            reason = f"needs {needed} GPU{'s' * (needed > 1)}, and TRITON_INTERPRET=0 (make test-gpu)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _gives_gpu_memory_back(request: pytest.FixtureRequest):
    """Some tests on GPUs weigh the memory that is free."""
    yield
    if request.node.get_closest_marker("gpu"):
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def command(monkeypatch):
    """Run ``aria`` with arguments, as the shell does; gives its exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["aria", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return call


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A whole model folder of a tiny random Aria: weights, tokenizer and processor."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AriaTokenizer(small_tokenizer.model())
    AriaForConditionalGeneration(tiny_model(tiny_config(vocab_size=tokenizer.vocab_size))).save_pretrained(path)
    AriaProcessor(AriaImageProcessor(max_image_size=490), tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A tiny random Aria, and transformers' own loaded from what ours saved."""
    ours = AriaForConditionalGeneration(tiny_model(tiny_config())).eval()
    folder = tmp_path_factory.mktemp("pair")
    ours.save_pretrained(folder)
    return ours, transformers_twin(folder)
