"""transformers' Aria with random weights of the same shape, as a peer to compare with.

B sequences, T tokens, C images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aria import AriaConfig
from bench import measure
from bench.measure import Spread

KEPT = "grouped_mm_for_decoding_too"
"""transformers' grouped matrix products under a name for which `generate` does not switch to batched ones."""


class _Clock:
    """A stopping criterion of `generate` that never stops and records the time of each token."""

    def __init__(self, device: torch.device):
        self._device = device
        self.marks: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        measure.synchronize(self._device)
        self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Peer:
    """transformers' `AriaForConditionalGeneration`, random weights of standard deviation 0.02.

    Args:
        config: Configuration of the model.
        dtype: Dtype of the weights.
        device: Device of the model.
        compiled: Also decode with a static cache, which `generate` compiles; takes a minute or more.
    """

    def __init__(self, config: AriaConfig, dtype: torch.dtype, device: torch.device, *, compiled: bool = False):
        import transformers
        from transformers.integrations import moe

        self.config, self.device, self._compiled = config, device, compiled
        moe.ALL_EXPERTS_FUNCTIONS.register(KEPT, moe.grouped_mm_experts_forward)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            shape = transformers.AriaConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AriaForConditionalGeneration(shape)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model = model.to_empty(device=device).eval()
        self._fill()
        self._generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def _fill(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        rotary = self.model.model.language_model.rotary_emb
        known = {id(rotary.inv_freq), id(rotary.original_inv_freq)}
        unknown = [name for name, buffer in self.model.named_buffers() if id(buffer) not in known]
        assert not unknown, f"uninitialised buffers: {unknown}"
        # Buffers made on the meta device have no values.
        frequencies, _ = rotary.compute_default_rope_parameters(self.model.config.text_config)
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            buffer.data = frequencies.to(self.device)

    def _prompts(self, batch: int, tokens: int) -> Tensor:
        rows = [measure.random_prompt(self.config, tokens, self._generator) for _ in range(batch)]
        return torch.tensor(rows, device=self.device)

    @contextmanager
    def _experts(self, implementation: str) -> Iterator[None]:
        before = self.model.get_experts_implementation()
        self.model.set_experts_implementation(implementation)
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)

    @torch.inference_mode()
    def _generate(self, ids: Tensor, tokens: int, **inputs: Any) -> list[float]:
        """Generate; return the seconds from the start to each token."""
        clock = _Clock(self.device)
        measure.synchronize(self.device)
        began = time.perf_counter()
        self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, temperature=2.0,
            top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=self.config.pad_token_id, stopping_criteria=[clock],
            **inputs,
        )  # fmt: skip
        assert len(clock.marks) == tokens, f"got {len(clock.marks)} of {tokens} tokens"
        return [mark - began for mark in clock.marks]

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Return milliseconds per step for each expert implementation of transformers; None if out of memory."""
        ways: dict[str, tuple[str, dict[str, Any]]] = {"batched_mm": ("batched_mm", {}), "grouped_mm": (KEPT, {})}
        if self._compiled:
            ways["batched_mm, compiled"] = ("batched_mm", {"cache_implementation": "static"})
        found: dict[str, float | None] = {}
        for name, (implementation, options) in ways.items():
            try:
                # Prefill uses grouped matrix products, as `generate` itself does; only decoding differs.
                with self._experts("grouped_mm" if implementation == "batched_mm" else implementation):
                    self._generate(self._prompts(batch, context), 4, **options)
                    marks = self._generate(self._prompts(batch, context), steps + 4, **options)
                found[name] = (marks[-1] - marks[3]) / steps * 1000
            except torch.cuda.OutOfMemoryError:
                found[name] = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        times = [ms for ms in found.values() if ms is not None]
        rate = batch / min(times) * 1000 if times else None
        return {"batch": batch, "context": context, "ms_per_step": found, "tokens_per_s": rate}

    @torch.inference_mode()
    def prefill(self, tokens: int, repeats: int = 3) -> Spread:
        """Time a forward pass over a prompt, with logits of the last token only."""
        ids = self._prompts(1, tokens)
        run = lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits  # noqa: E731
        return measure.clock(run, self.device, repeats=repeats, warm_up=1)

    def _pixels(self, images: int, side: int) -> dict[str, Tensor]:
        dtype = self.model.lm_head.weight.dtype
        pixels = torch.randn(images, 3, side, side, device=self.device, dtype=dtype)
        return {
            "pixel_values": pixels,
            "pixel_mask": torch.ones(images, side, side, dtype=torch.bool, device=self.device),
        }

    @torch.inference_mode()
    def encode(self, images: int, side: int, repeats: int = 5) -> Spread:
        """Time encoder and projector on square images that are already preprocessed and on the device."""
        inputs = self._pixels(images, side)
        run = lambda: self.model.get_image_features(**inputs, return_dict=True).pooler_output  # noqa: E731
        return measure.clock(run, self.device, repeats=repeats, warm_up=2)

    def answer(self, images: int, side: int, text_tokens: int, tokens: int) -> list[float]:
        """Return seconds to each token of an answer about preprocessed images."""
        queries = self.config.image_sizes()[side]
        places = torch.full((1, images * queries), self.config.image_token_index, device=self.device)
        ids = torch.cat((places, self._prompts(1, text_tokens)), dim=1)
        return self._generate(ids, tokens, **self._pixels(images, side))
