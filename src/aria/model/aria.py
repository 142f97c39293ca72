"""Aria: vision encoder, projector and decoder reading one packed stream of tokens.

T tokens, D hidden, V vocabulary, Q image tokens of all crops end to end, E experts, L layers.
Parameters have the names of the current Hub layout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aria import ops
from aria.config import AriaConfig
from aria.model.context import Context
from aria.model.decoder import LanguageModel
from aria.model.lora import LoRALinear
from aria.model.patches import PackedPatches
from aria.model.projector import Projector
from aria.model.vision import VisionTower


class Output(NamedTuple):
    """Result of one pass of the decoder."""

    hidden: Tensor
    """``(T, D)``, after the final norm."""
    router_logits: tuple[Tensor, ...]
    """``(T, E)`` for each of the L layers; empty if fused operations ran and they were not requested."""


class Aria(nn.Module):
    """The model, on one device."""

    def __init__(self, config: AriaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision)
        self.multi_modal_projector = Projector(config.projector)
        self.language_model = LanguageModel(config.text)

    @classmethod
    def random(
        cls,
        config: AriaConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        std: float = 0.02,
    ) -> Aria:
        """A model with random weights created on the device: matrices normal, norms one, biases zero."""
        with torch.device("meta"):
            model = cls(config).to(dtype or config.dtype)
        device = torch.device(device or "cpu")
        generator = torch.Generator(device).manual_seed(seed)
        model.to_empty(device=device)
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, std, generator=generator)
                    else:
                        parameter.fill_(1.0 if name == "weight" else 0.0)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.language_model.lm_head.weight.dtype

    def encode_images(self, patches: PackedPatches) -> Tensor:
        """Crops -> image tokens ``(Q, D)``, crop after crop."""
        hidden = self.vision_tower(patches)
        return self.multi_modal_projector(hidden, patches.segments, patches.grid_patches)

    def embed(self, input_ids_T: Tensor, image_features_QD: Tensor | None = None) -> Tensor:
        """Token embeddings ``(T, D)`` with image tokens in place of the placeholder tokens, in order.

        The number of placeholders must be Q; callers check it while the ids are still on the host.
        """
        x_TD = self.language_model.model.embed_tokens(input_ids_T)
        if image_features_QD is None:
            return x_TD
        place_T1 = (input_ids_T == self.config.image_token_index)[:, None]
        return x_TD.masked_scatter(place_T1, image_features_QD.to(x_TD.dtype))

    def forward(
        self,
        input_ids_T: Tensor,
        context: Context,
        image_features_QD: Tensor | None = None,
        *,
        router_logits: bool = False,
        states: list[Tensor] | None = None,
    ) -> Output:
        """One pass of the decoder over packed tokens; call :meth:`logits` on the rows that need them.

        The input of each layer, ``(T, D)``, is appended to ``states``.
        """
        x_TD = self.embed(input_ids_T, image_features_QD)
        return self.decode(x_TD, context, router_logits=router_logits, states=states)

    def decode(
        self, x_TD: Tensor, context: Context, *, router_logits: bool = False, states: list[Tensor] | None = None
    ) -> Output:
        """The same from embeddings."""
        return Output(*self.language_model.model(x_TD, context, router_logits, states))

    def lay_out(self) -> Aria:
        """Arrange weights in memory as the inference kernels read them; names, shapes and values stay the same.

        Needs memory for a second copy of one module's weights at a time. Returns itself.
        """
        modules = [module for module in self.modules() if module is not self]
        for module in reversed(modules):  # children before their parents, which look at their layout
            lay_out = getattr(module, "lay_out", None)
            if callable(lay_out):
                lay_out()
        return self

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits ``(T, V)`` of the next token."""
        head = self.language_model.lm_head
        plain = ops.inference_kernels(hidden_TD) and not isinstance(head, LoRALinear)
        return ops.linear(hidden_TD, head.weight) if plain else head(hidden_TD)
