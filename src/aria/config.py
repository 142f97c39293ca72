"""Configuration of Aria: frozen dataclasses, read from every published ``config.json``, written in the current layout.

Defaults are the values of rhymes-ai/Aria (25.3B), because the published files omit many keys and the class defaults of
other implementations are far from the real model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from aria.hub import read_json, resolve, write_json

CONFIG_NAME = "config.json"

MOST_PARAMETERS = 10**13
MOST_CROP_TOKENS = 1 << 16
"""Maximum number of image tokens of one crop."""
_MOST: Mapping[str, float] = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "layer_norm_eps": 1.0,
    "rms_norm_eps": 1.0,
    "image_size": 4096,
    "patch_size": 4096,
    "num_channels": 16,
    "vocab_size": 1 << 22,
    "moe_num_experts": 4096,
    "moe_topk": 4096,
    "moe_num_shared_experts": 4096,
    "max_position_embeddings": 1 << 26,
    "rope_theta": 1e15,
}
"""Upper bounds, far beyond any model. Modules are created from the configuration before weights are checked, so larger
values must fail here."""
_MOST_EXPERTS = 1 << 17
"""Maximum over all layers: some layouts have separate tensors for each expert."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name such as ``bfloat16`` or ``torch.bfloat16``; a dtype passes through."""
    if isinstance(dtype, torch.dtype):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder, a ViT with the shape of SigLIP-SO400M and fractional positions as in NaViT."""

    model_type: ClassVar[str] = "idefics3_vision"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 980
    patch_size: int = 14
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patches_per_side(self) -> int:
        """Side of the learned position grid."""
        return self.image_size // self.patch_size

    @property
    def patch_weights(self) -> int:
        """Weights of the patch embedding, by which each patch is multiplied."""
        return self.num_channels * self.patch_size**2 * self.hidden_size

    @property
    def layer_weights(self) -> int:
        """Weights of one layer by which each patch is multiplied: projections of attention and the MLP."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    def num_parameters(self) -> int:
        """All parameters of the vision encoder."""
        D, F = self.hidden_size, self.intermediate_size
        biases_and_norms = 4 * D + D + F + 4 * D
        layers = self.num_hidden_layers * (self.layer_weights + biases_and_norms)
        return self.patch_weights + D + self.patches_per_side**2 * D + layers


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector, a cross-attention resampler with a number of queries for each crop size."""

    patch_to_query: Mapping[int, int] = field(default_factory=lambda: {1225: 128, 4900: 256})
    hidden_size: int = 1152
    num_attention_heads: int = 16
    output_size: int = 2560
    layer_norm_eps: float = 1e-5

    @property
    def num_queries(self) -> int:
        """Rows of the learned query table; smaller crops use the first ones."""
        return max(self.patch_to_query.values())

    def queries_for(self, patches: int) -> int:
        """Number of image tokens of a crop of ``patches`` patches, padding included.

        Raises:
            ValueError: The table has no such crop.
        """
        if patches not in self.patch_to_query:
            raise ValueError(
                f"a crop of {patches} patches has no entry in the projector's table {dict(self.patch_to_query)}; "
                "use one of the image sizes that the model was trained for"
            )
        return self.patch_to_query[patches]

    def num_parameters(self) -> int:
        """All parameters of the projector."""
        D, O = self.hidden_size, self.output_size
        attention = 3 * D * D + (3 * D * D + 3 * D) + 2 * (D * D + D)
        return self.num_queries * D + attention + 3 * 2 * D + D * O + O * O


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder: Llama's attention and a mixture of experts in every layer."""

    model_type: ClassVar[str] = "aria_text"
    vocab_size: int = 100352
    hidden_size: int = 2560
    intermediate_size: int = 1664
    """Width of one expert."""
    moe_num_experts: int = 64
    moe_topk: int = 6
    moe_num_shared_experts: int = 2
    num_hidden_layers: int = 28
    num_attention_heads: int = 20
    num_key_value_heads: int = 20
    head_dim: int = 128
    max_position_embeddings: int = 65536
    rope_theta: float = 5_000_000.0
    rms_norm_eps: float = 1e-6

    @property
    def num_experts_per_tok(self) -> int:
        """:attr:`moe_topk`, as transformers names it too."""
        return self.moe_topk

    @property
    def shared_size(self) -> int:
        """Width of the shared experts, which are one SwiGLU MLP."""
        return self.intermediate_size * self.moe_num_shared_experts

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def dense_weights(self) -> int:
        """Weights of one layer by which each token is multiplied: attention, router and shared experts."""
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.hidden_size * (attention + self.moe_num_experts + 3 * self.shared_size)

    @property
    def head_weights(self) -> int:
        """Weights of the language model head, as many as in the embedding table."""
        return self.vocab_size * self.hidden_size

    def _layer_parameters(self, experts: int) -> int:
        return self.dense_weights + experts * self.expert_weights + 2 * self.hidden_size

    def num_parameters(self) -> int:
        """All parameters of the decoder, with embedding table and head."""
        layers = self.num_hidden_layers * self._layer_parameters(self.moe_num_experts)
        return 2 * self.head_weights + layers + self.hidden_size

    def active_parameters(self) -> int:
        """Parameters used for one token: layers, final norm and head, without the embedding table."""
        layers = self.num_hidden_layers * self._layer_parameters(self.moe_topk)
        return self.head_weights + layers + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class AriaConfig:
    """Vision encoder, projector and decoder. Fields have the Hub's names; every default is filled in."""

    model_type: ClassVar[str] = "aria"
    tie_word_embeddings: ClassVar[bool] = False
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_index: int = 9
    pad_token_id: int | None = 2
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _check(self)

    @property
    def text_config(self) -> TextConfig:
        """:attr:`text`, as transformers names it."""
        return self.text

    @property
    def vision_config(self) -> VisionConfig:
        """:attr:`vision`, as transformers names it."""
        return self.vision

    @property
    def image_token_id(self) -> int:
        """:attr:`image_token_index`, as transformers names it too."""
        return self.image_token_index

    @property
    def projector_patch_to_query_dict(self) -> dict[int, int]:
        """The projector's table, as transformers names it."""
        return dict(self.projector.patch_to_query)

    def get_text_config(self, decoder: bool = False) -> TextConfig:
        """:attr:`text`; ``decoder`` changes nothing, because the decoder is the only text model here."""
        return self.text

    @classmethod
    def aria(cls) -> AriaConfig:
        """The published model, 25.3B parameters."""
        return cls()

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | os.PathLike[str] | None = None, *, revision: str | None = None
    ) -> AriaConfig:
        """Read ``config.json`` of a folder, a file, a Hub repository, or (None) the packaged nano model.

        Raises:
            FileNotFoundError: There is no such folder, repository or file.
            ValueError: The file is not a configuration of Aria.
        """
        path = resolve(path_or_repo_id, revision=revision, allow_patterns=[CONFIG_NAME])
        file = path / CONFIG_NAME if path.is_dir() else path
        data = read_json(file)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AriaConfig:
        """Read the JSON object of any published variant, original or as transformers writes it.

        Raises:
            ValueError: Not Aria, or a setting changes the arithmetic in a way that Aria does not support.
        """
        if not isinstance(data, Mapping) or data.get("model_type") != "aria":
            came = data.get("model_type") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"not a configuration of Aria: model_type is {came!r:.100}, expected 'aria'")
        text, vision = _object(data, "text_config"), _object(data, "vision_config")
        _refuse(data, {"tie_word_embeddings": False, "vision_feature_layer": -1}, "the model")
        vision_config = _read_vision(vision)
        text_config = _read_text(text)
        pad = data.get("pad_token_id", text.get("pad_token_id", 2))
        table = data.get("projector_patch_to_query_dict") or ProjectorConfig().patch_to_query
        try:
            patch_to_query = {int(patches): _whole(queries) for patches, queries in table.items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f"projector_patch_to_query_dict should map patches to queries, but is {table!r:.100}"
            ) from None
        return cls(
            vision=vision_config,
            text=text_config,
            projector=ProjectorConfig(
                patch_to_query=patch_to_query,
                hidden_size=vision_config.hidden_size,
                num_attention_heads=vision_config.num_attention_heads,
                output_size=text_config.hidden_size,
            ),
            image_token_index=_integer(data, "image_token_index", data.get("image_token_id", 9)),
            pad_token_id=None if pad is None else _integer({"pad_token_id": pad}, "pad_token_id", 2),
            dtype=parse_dtype(data.get("dtype") or data.get("torch_dtype") or "bfloat16"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The current Hub layout with every value spelled out; transformers and vLLM can read it."""
        dtype = str(self.dtype).removeprefix("torch.")
        vision, text = dataclasses.asdict(self.vision), dataclasses.asdict(self.text)
        return {
            "architectures": ["AriaForConditionalGeneration"],
            "model_type": self.model_type,
            "image_token_index": self.image_token_index,
            "ignore_index": -100,
            "initializer_range": 0.02,
            "pad_token_id": self.pad_token_id,
            "projector_patch_to_query_dict": {str(k): v for k, v in self.projector.patch_to_query.items()},
            "text_config": {"model_type": self.text.model_type, **text, "num_experts_per_tok": self.text.moe_topk},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "vision_config": {"model_type": self.vision.model_type, **vision, "hidden_act": "gelu_pytorch_tanh"},
            "vision_feature_layer": -1,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into ``folder``, which is created if it does not exist."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())

    def image_sizes(self) -> dict[int, int]:
        """Side of a square crop in pixels -> its number of image tokens, e.g. ``{490: 128, 980: 256}``."""
        sizes = {math.isqrt(p) * self.vision.patch_size: q for p, q in self.projector.patch_to_query.items()}
        return dict(sorted(sizes.items()))

    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of each component; they add up to :meth:`num_parameters`."""
        text, embedding = self.text, self.text.head_weights
        experts = text.num_hidden_layers * text.moe_num_experts * text.expert_weights
        return {
            "vision encoder": self.vision.num_parameters(),
            "projector": self.projector.num_parameters(),
            "token embedding": embedding,
            "decoder, routed experts": experts,
            "decoder, the rest": text.num_parameters() - 2 * embedding - experts,
            "language head": embedding,
        }

    def num_parameters(self) -> int:
        """All parameters of the model, without the unused post-LayerNorm in the Hub's files."""
        return self.vision.num_parameters() + self.projector.num_parameters() + self.text.num_parameters()

    def active_parameters(self) -> int:
        """Parameters used for one text token, with the head and without the embedding table."""
        return self.text.active_parameters()

    def cache_bytes_per_token(self, dtype: torch.dtype | str = torch.bfloat16) -> int:
        """Bytes of keys and values for one token of context."""
        text = self.text
        return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * parse_dtype(dtype).itemsize


def _object(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} should be an object, but is {value!r:.100}")
    return value


def _integer(data: Mapping[str, Any], key: str, default: int) -> int:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} should be a whole number, but is {value!r:.100}")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is not a whole number")
    return value


def _number(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{key} should be a number above 0, but is {value!r:.100}")
    return float(value)


def _refuse(data: Mapping[str, Any], expected: Mapping[str, Any], owner: str) -> None:
    """Reject settings that would change the arithmetic: they must be absent or have Aria's value."""
    for key, value in expected.items():
        if data.get(key) is not None and data[key] != value:
            came = f"{data[key]!r:.100}"
            raise ValueError(f"{key} of {owner} is {came}, but Aria has {value!r}; this is another architecture")


def _read_vision(data: Mapping[str, Any]) -> VisionConfig:
    known = ("idefics3_vision", "aria_vision_model", "idefics2_vision")
    if data.get("model_type", known[0]) not in known:
        came = f"{data['model_type']!r:.100}"
        raise ValueError(f"vision_config.model_type is {came}, expected one of {', '.join(known)}")
    _refuse(data, {"hidden_act": "gelu_pytorch_tanh"}, "the vision encoder")
    defaults = VisionConfig()
    # The current Hub config names the heads `attention_heads`; loaders ignore that key, so the default applies.
    names = [f.name for f in dataclasses.fields(VisionConfig) if f.name != "layer_norm_eps"]
    integers = {name: _integer(data, name, getattr(defaults, name)) for name in names}
    return VisionConfig(**integers, layer_norm_eps=_number(data, "layer_norm_eps", defaults.layer_norm_eps))


def _read_text(data: Mapping[str, Any]) -> TextConfig:
    known = ("aria_text", "aria_moe_lm")
    if data.get("model_type", known[0]) not in known:
        came = f"{data['model_type']!r:.100}"
        raise ValueError(f"text_config.model_type is {came}, expected one of {', '.join(known)}")
    arithmetic = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    _refuse(data, arithmetic, "the decoder")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters should be an object, but is {rope!r:.100}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rotary scaling {rope!r:.100} is not Aria's; only the default type is supported")
    defaults = TextConfig()
    hidden = _integer(data, "hidden_size", defaults.hidden_size)
    heads = _integer(data, "num_attention_heads", defaults.num_attention_heads)
    if not heads:
        raise ValueError("num_attention_heads should be above 0")
    # `intermediate_size` is an expert's width in current files; in the others it is an unused 13568 beside
    # `moe_intermediate_size`, which is the width.
    width = "moe_intermediate_size" if data.get("moe_intermediate_size") else "intermediate_size"
    topk = _integer(data, "moe_topk", _integer(data, "num_experts_per_tok", defaults.moe_topk))
    if _integer(data, "num_experts_per_tok", topk) != topk:
        alias = data["num_experts_per_tok"]
        raise ValueError(f"moe_topk is {topk}, but num_experts_per_tok is {alias}; they mean the same")
    return TextConfig(
        vocab_size=_integer(data, "vocab_size", defaults.vocab_size),
        hidden_size=hidden,
        intermediate_size=_integer(data, width, defaults.intermediate_size),
        moe_num_experts=_integer(data, "moe_num_experts", defaults.moe_num_experts),
        moe_topk=topk,
        moe_num_shared_experts=_integer(data, "moe_num_shared_experts", defaults.moe_num_shared_experts),
        num_hidden_layers=_integer(data, "num_hidden_layers", defaults.num_hidden_layers),
        num_attention_heads=heads,
        num_key_value_heads=_integer(data, "num_key_value_heads", heads),
        head_dim=_integer(data, "head_dim", hidden // heads),
        max_position_embeddings=_integer(data, "max_position_embeddings", defaults.max_position_embeddings),
        rope_theta=_number(
            {"rope_theta": rope.get("rope_theta") or data.get("rope_theta")}, "rope_theta", defaults.rope_theta
        ),
        rms_norm_eps=_number(data, "rms_norm_eps", defaults.rms_norm_eps),
    )


def _check(config: AriaConfig) -> None:
    """Reject shapes that cannot work, before any memory is allocated."""
    vision, text = config.vision, config.text
    for owner, part in (("vision", vision), ("text", text)):
        for f in dataclasses.fields(part):
            value, most = getattr(part, f.name), _MOST[f.name]
            if not 0 < value <= most:
                limits = f"at most {most:,}" if value > most else "above 0"
                raise ValueError(f"{owner}.{f.name} should be {limits}, but is {value!r:.40}")
    experts = text.num_hidden_layers * text.moe_num_experts
    if experts > _MOST_EXPERTS:
        raise ValueError(
            f"text.num_hidden_layers {text.num_hidden_layers} and text.moe_num_experts {text.moe_num_experts} make "
            f"{experts:,} experts; at most {_MOST_EXPERTS:,} are supported"
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise ValueError(
            f"vision.hidden_size {vision.hidden_size} does not divide over {vision.num_attention_heads} heads"
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"{text.num_attention_heads} attention heads do not divide over {text.num_key_value_heads} key/value heads"
        )
    if not 0 <= config.image_token_index < text.vocab_size:
        raise ValueError(f"image_token_index {config.image_token_index} is not in the vocabulary of {text.vocab_size}")
    if text.moe_topk > text.moe_num_experts:
        raise ValueError(f"moe_topk {text.moe_topk} is more than the number of experts, {text.moe_num_experts}")
    if text.head_dim % 2:
        raise ValueError(f"head_dim {text.head_dim} is odd; rotary positions need an even number")
    if config.pad_token_id is not None and config.pad_token_id >= text.vocab_size:
        raise ValueError(f"pad_token_id {config.pad_token_id} is not in the vocabulary of {text.vocab_size}")
    table = config.projector.patch_to_query
    if not table or any(p <= 0 or not 0 < q <= MOST_CROP_TOKENS or math.isqrt(p) ** 2 != p for p, q in table.items()):
        raise ValueError(
            f"the projector's table should map square numbers of patches to 1 to {MOST_CROP_TOKENS:,} queries, but is "
            f"{dict(table)!s:.100}"
        )
    if math.isqrt(max(table)) > vision.patches_per_side:
        raise ValueError(
            f"crops of {max(table)} patches are larger than the grid of {vision.patches_per_side}^2 positions"
        )
    if (parameters := config.num_parameters()) > MOST_PARAMETERS:
        sizes = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        raise ValueError(
            f"a model of {parameters:.3g} parameters is too large; at most {MOST_PARAMETERS:.0e} are supported (text: "
            f"{', '.join(f'{name} {size:,}' for name, size in sizes.items())})"
        )
