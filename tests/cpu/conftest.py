"""What several test files stand on."""

from __future__ import annotations

import os
import sys

# Before anything imports Triton, and some libraries do: kernels are interpreted here.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import small_tokenizer
import torch
from tiny import tiny_config, tiny_model, transformers_twin

from aria import AriaForConditionalGeneration, AriaImageProcessor, AriaProcessor, cli
from aria.processor import AriaTokenizer

# The tests' models are small: a second thread costs more than it brings, above all beside other work.
torch.set_num_threads(1)


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
