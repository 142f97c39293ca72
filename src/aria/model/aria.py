"""Aria: vision encoder, projector and decoder reading one packed stream of tokens.

T tokens, D hidden, V vocabulary, Q picture tokens of all crops end to end, E experts, L layers.
Parameters carry the names of today's Hub layout.
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
    """What one pass of the decoder gives."""

    hidden: Tensor
    """``(T, D)``, after the final norm."""
    router_logits: tuple[Tensor, ...]
    """``(T, E)`` of each of the L layers; empty where fused kernels ran and they were not asked for."""


class Aria(nn.Module):
    """The model itself, on one device."""

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
        """A model with random weights made straight on the device: matrices normal, norms one, biases zero."""
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

    def encode_images(self, patches: PackedPatches) -> Tensor:
        """Crops -> picture tokens ``(Q, D)``, crop after crop."""
        hidden = self.vision_tower(patches)
        return self.multi_modal_projector(hidden, patches.segments, patches.grid_patches)

    def embed(self, input_ids_T: Tensor, image_features_QD: Tensor | None = None) -> Tensor:
        """Token embeddings ``(T, D)`` with picture tokens in the places of the image token, in order.

        The number of places must be Q; the callers check it where ids are still on the host.
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
        """One pass of the decoder over packed tokens; :meth:`logits` gives scores for the rows that need them.

        ``states`` gets what goes into each layer, ``(T, D)``.
        """
        x_TD = self.embed(input_ids_T, image_features_QD)
        return self.decode(x_TD, context, router_logits=router_logits, states=states)

    def decode(
        self, x_TD: Tensor, context: Context, *, router_logits: bool = False, states: list[Tensor] | None = None
    ) -> Output:
        """The same on embeddings."""
        return Output(*self.language_model.model(x_TD, context, router_logits, states))

    def lay_out(self) -> Aria:
        """Arrange weights in memory as the inference kernels read them; names, shapes and values stay. Returns itself.

        Takes a moment of each module's weights in memory once more, a module at a time.
        """
        modules = [module for module in self.modules() if module is not self]
        for module in reversed(modules):  # children before their parents, which look at how these lie
            lay_out = getattr(module, "lay_out", None)
            if callable(lay_out):
                lay_out()
        return self

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores ``(T, V)`` of the next token."""
        head = self.language_model.lm_head
        plain = ops.inference_kernels(hidden_TD) and not isinstance(head, LoRALinear)
        return ops.linear(hidden_TD, head.weight) if plain else head(hidden_TD)
