"""How each published layout names and splits Aria's parameters, and detection of a checkpoint's layout.

A layout is detected from the tensors, never from file names. Our own names are those of today's Hub layout.
E experts, D hidden, F expert width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aria.checkpoint.stored import StoredTensor, describe, names

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A stored tensor, and the part of a parameter that it fills."""

    key: str
    shape: Shape
    """Shape of the stored tensor."""
    index: tuple[int | slice, ...] = ()
    """Index into the parameter; ``()`` is all of it."""
    transposed: bool = False
    """Whether it is stored transposed."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout of the parameters."""

    name: str
    description: str
    renames: tuple[tuple[str, str], ...] = ()
    """Pairs of our name and the layout's, each applied to its first occurrence."""
    expert_prefix: str | None = None
    """If set, routed experts are separate linear layers under this name, not one tensor."""
    linear_in_out: bool = False
    """Whether weights of linear layers are ``(in, out)``, as in PaddlePaddle."""

    def pieces(self, name: str, shape: Shape) -> list[TensorPart]:
        """The stored tensors that make up our parameter ``name``."""
        if self.expert_prefix and name.endswith((".experts.fc1.weight", ".experts.fc2.weight")):
            return self._expert_pieces(name, shape)
        key = name
        for ours, theirs in self.renames:
            key = key.replace(ours, theirs, 1)
        if self.linear_in_out and _is_linear(name, shape):
            return [TensorPart(key, shape[::-1], transposed=True)]
        return [TensorPart(key, shape)]

    def _expert_pieces(self, name: str, shape: Shape) -> list[TensorPart]:
        # Ours: fc1 (E, D, 2F) with gate and up side by side, fc2 (E, F, D). Theirs: linears, which are (out, in).
        base, which, _ = name.rsplit(".", 2)
        prefix = base.removesuffix("experts") + self.expert_prefix  # type: ignore[operator]
        experts, size_in, size_out = shape
        if which == "fc2":
            return [
                TensorPart(f"{prefix}.{e}.down_proj.weight", (size_out, size_in), (e,), transposed=True)
                for e in range(experts)
            ]
        half = size_out // 2
        parts = (("gate_proj", slice(0, half)), ("up_proj", slice(half, None)))
        return [
            TensorPart(f"{prefix}.{e}.{part}.weight", (half, size_in), (e, slice(None), columns), transposed=True)
            for e in range(experts)
            for part, columns in parts
        ]


def _is_linear(name: str, shape: Shape) -> bool:
    tables = ("position_embedding.weight", "embed_tokens.weight", "router.weight")
    return len(shape) == 2 and name.endswith("weight") and not name.endswith(tables)


_ORIGINAL_NAMES = (
    ("vision_tower.", "vision_tower.vision_model."),
    ("cross_attn.layer_norm_kv.", "cross_attn.ln_kv."),
    ("multi_modal_projector.layer_norm.", "multi_modal_projector.ln_ffn."),
    ("multi_modal_projector.feed_forward.", "multi_modal_projector.ffn."),
)
_MEMORY_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_MEMORY_EXPERTS = (("experts.fc1.weight", "experts.gate_up_proj"), ("experts.fc2.weight", "experts.down_proj"))

HUB = Layout("hub", "rhymes-ai/Aria today, and what transformers and this project save")
_ORIGINAL = Layout("original", "the authors' code: Aria-Chat, Aria-Base-8K, Aria-Base-64K", _ORIGINAL_NAMES)
_SEQUENTIAL = Layout(
    "sequential-mlp", "Aria-sequential_mlp: experts as separate linears", _ORIGINAL_NAMES, "experts.experts"
)
_PADDLE = Layout(
    "paddle",
    "PaddleNLP's rhymes-ai/Aria",
    (*_ORIGINAL_NAMES, ("language_model.model.", "language_model.llama.")),
    linear_in_out=True,
)

LAYOUTS = (
    HUB,
    Layout("transformers", "transformers' names in memory", _MEMORY_PREFIXES + _MEMORY_EXPERTS),
    Layout("transformers-4.52", "transformers 4.52's mixture of both", _MEMORY_PREFIXES),
    _ORIGINAL,
    _SEQUENTIAL,
    replace(_SEQUENTIAL, expert_prefix="experts"),
    _PADDLE,
    # An earlier revision of PaddleMIX has the authors' name of the decoder, and differs only in orientation.
    replace(_PADDLE, renames=_ORIGINAL_NAMES),
)

# Unused tensors: the final norm of the vision encoder, which is all zeros in the Hub's files, and rotary tables.
_DEAD = re.compile(r"(^|\.)vision_tower\.(vision_model\.)?post_layernorm\.(weight|bias)$|\.inv_freq$")


def is_dead(key: str) -> bool:
    """Whether a stored tensor is known and unused by all versions of Aria."""
    return _DEAD.search(key) is not None


def detect(stored: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Layout:
    """Detect the layout of a checkpoint: the one whose names match best, and among equals, whose shapes do.

    Args:
        stored: Name and shape of every tensor of the checkpoint.
        shapes: Name and shape of each parameter of the model.

    Raises:
        ValueError: No layout matches, or the layout is known and not supported.
    """
    if any(key.startswith("llm.layers.") for key in stored):
        raise ValueError(
            "this is a gpt-fast file of the authors' runner, whose decoder is renamed and re-ordered; "
            "load the checkpoint that it was made from (rhymes-ai/Aria)"
        )

    def fit(layout: Layout) -> tuple[int, int]:
        pieces = [piece for name, shape in shapes.items() for piece in layout.pieces(name, shape)]
        found = [piece for piece in pieces if piece.key in stored]
        return len(found), sum(stored[piece.key] == piece.shape for piece in found)

    fits = {layout: fit(layout) for layout in LAYOUTS}
    best = max(LAYOUTS, key=fits.__getitem__)
    if fits[best][0] * 2 < len([key for key in stored if not is_dead(key)]) or not fits[best][0]:
        known = "; ".join(dict.fromkeys(f"{layout.name} ({layout.description})" for layout in LAYOUTS))
        raise ValueError(
            f"unknown layout: the checkpoint has {len(stored)} tensors ({names(sorted(stored), 4)}), which are not "
            f"Aria's in any layout known: {known}"
        )
    return best


def place(
    layout: Layout, stored: Mapping[str, StoredTensor], shapes: Mapping[str, Shape]
) -> dict[str, list[tuple[TensorPart, StoredTensor]]]:
    """For each parameter of the model, the stored tensors that fill it.

    Raises:
        ValueError: Keys are missing, unexpected or wrongly shaped; the message has their names in the file.
    """
    plan = {name: layout.pieces(name, shape) for name, shape in shapes.items()}
    pieces = [piece for parts in plan.values() for piece in parts]
    missing = [piece.key for piece in pieces if piece.key not in stored]
    expected = {piece.key for piece in pieces}
    unexpected = [key for key in stored if key not in expected and not is_dead(key)]
    wrong = [
        f"{piece.key} is {list(stored[piece.key].shape)} and should be {list(piece.shape)}"
        for piece in pieces
        if piece.key in stored and stored[piece.key].shape != piece.shape
    ]
    mixed = [name for name, parts in plan.items() if len({stored[p.key].dtype for p in parts if p.key in stored}) > 1]
    faults = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong, "of mixed dtypes": mixed}
    if any(faults.values()):
        raise ValueError(f"the checkpoint (layout {layout.name}) does not fit its config: {describe(faults)}")
    return {name: [(piece, stored[piece.key]) for piece in parts] for name, parts in plan.items()}


def main_dtype(tensors: Iterable[StoredTensor | Tensor]) -> torch.dtype:
    """The dtype of most bytes of a checkpoint, which its config states."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]
