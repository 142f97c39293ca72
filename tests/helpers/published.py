"""Published checkpoint layouts made from our parameters by independent code, to check the tables under test."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from aria.config import AriaConfig

State = dict[str, Tensor]


def hub(state: State) -> State:
    """Add the unused final norm, which would change everything if it were applied."""
    size = state["vision_tower.encoder.layers.0.layer_norm1.bias"].shape
    filler = {f"vision_tower.post_layernorm.{kind}": torch.zeros(size) for kind in ("weight", "bias")}
    return {**state, **filler}


def transformers_hybrid(state: State) -> State:
    return {
        "lm_head.weight"
        if key == "language_model.lm_head.weight"
        else re.sub(
            r"^(vision_tower|multi_modal_projector)",
            r"model.\1",
            re.sub(r"^language_model\.model", "model.language_model", key),
        ): value
        for key, value in hub(state).items()
    }


def transformers_memory(state: State) -> State:
    spelled = {"mlp.experts.fc1.weight": "mlp.experts.gate_up_proj", "mlp.experts.fc2.weight": "mlp.experts.down_proj"}
    out = {}
    for key, value in transformers_hybrid(state).items():
        for ours, theirs in spelled.items():
            key = key.replace(ours, theirs)
        out[key] = value
    return out


def original(state: State) -> State:
    out = {}
    for key, value in state.items():
        key = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", key)
        key = re.sub(r"^multi_modal_projector\.layer_norm\.", "multi_modal_projector.ln_ffn.", key)
        key = re.sub(r"^multi_modal_projector\.feed_forward\.", "multi_modal_projector.ffn.", key)
        out[key.replace(".layer_norm_kv.", ".ln_kv.")] = value
    return out


def sequential(state: State, prefix: str = "experts.experts") -> State:
    out = {}
    for key, value in original(state).items():
        if not (found := re.fullmatch(r"(.*\.mlp\.)experts\.(fc[12])\.weight", key)):
            out[key] = value
            continue
        for e, matrix in enumerate(value):
            base = f"{found[1]}{prefix}.{e}."
            if found[2] == "fc1":
                gate, up = matrix.chunk(2, dim=1)
                out[base + "gate_proj.weight"], out[base + "up_proj.weight"] = gate.T.contiguous(), up.T.contiguous()
            else:
                out[base + "down_proj.weight"] = matrix.T.contiguous()
    return out


def sequential_single(state: State) -> State:
    return sequential(state, "experts")


def paddle(state: State, decoder: str = "llama") -> State:
    transposed = re.compile(
        r"(q_proj|k_proj|v_proj|out_proj|o_proj|linear|linear_in|linear_out|gate_proj|up_proj|down_proj|lm_head)\.weight$"
        r"|encoder\.layers\.\d+\.mlp\.fc[12]\.weight$|in_proj_weight$"
    )
    out = {}
    for key, value in original(state).items():
        value = value.T.contiguous() if transposed.search(key) else value
        out[key.replace("language_model.model.", f"language_model.{decoder}.")] = value
    return out


def paddle_early(state: State) -> State:
    return paddle(state, "model")


LAYOUTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "hub": ("hub", hub),
    "hub without filler": ("hub", dict),
    "transformers": ("transformers", transformers_memory),
    "transformers 4.52": ("transformers-4.52", transformers_hybrid),
    "original": ("original", original),
    "sequential": ("sequential-mlp", sequential),
    "sequential, one prefix": ("sequential-mlp", sequential_single),
    "paddle": ("paddle", paddle),
    "paddle, early names": ("paddle", paddle_early),
}
"""Name in tests -> (name that should be detected, function that makes it)."""


def to_paddle_array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor; bfloat16 becomes uint16 bits, as in Paddle."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def write_layout(name: str, state: State, config: AriaConfig, folder: Path, *, shards: int = 1) -> Path:
    """Write a checkpoint folder in a layout of :data:`LAYOUTS`; Paddle's are pickles, the others safetensors."""
    published = LAYOUTS[name][1](state)
    config.save_pretrained(folder)
    is_paddle = name.startswith("paddle")
    stem, suffix = ("model_state", "pdparams") if is_paddle else ("model", "safetensors")
    keys, weight_map = list(published), {}
    for i in range(shards):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {key: published[key].contiguous() for key in keys[i::shards]}
        if is_paddle:
            arrays = {key: to_paddle_array(value) for key, value in part.items()}
            internal = {"StructuredToParameterName@@": {key: f"linear_{i}.w_0" for i, key in enumerate(part)}}
            (folder / file).write_bytes(pickle.dumps({**arrays, **internal}, protocol=4))
        else:
            save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder
