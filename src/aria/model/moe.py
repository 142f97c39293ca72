"""The mixture of experts (paper section 2.2): a router, fine-grained routed experts, and shared experts for all tokens.

T tokens, D hidden, E experts, A experts per token, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria import ops
from aria.config import TextConfig
from aria.model.layers import join
from aria.model.lora import LoRAModule, apply_linears
from aria.ops import ExpertWeights, LoRA


class Router(nn.Module):
    """Logits of every expert for every token."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight)


class GroupedLinear(nn.Module):
    """One matrix for each expert, ``(E, in, out)``: the opposite order of a linear layer's weight."""

    accepts_lora = True

    def __init__(self, experts: int, size_in: int, size_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size_in, size_out))
        self.adapter: LoRAModule | None = None

    def lora(self) -> LoRA | None:
        """Its LoRA weights, if it has any."""
        return None if self.adapter is None else self.adapter.lora()

    @torch.no_grad()
    def lay_out(self) -> None:
        """Keep the shape, but make the weights of each output contiguous in memory, as in a linear layer.

        A matrix-vector product then reads 2.78 TB/s on an H100, against 2.46 in the order of checkpoints.
        """
        if not self.weight.mT.is_contiguous():
            self.weight.data = self.weight.mT.contiguous().mT


class Experts(nn.Module):
    """The routed experts. ``fc1`` holds gate and up side by side on its last axis."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, D, width = config.moe_num_experts, config.hidden_size, config.intermediate_size
        self.fc1 = GroupedLinear(E, D, 2 * width)
        self.fc2 = GroupedLinear(E, width, D)

    def forward(self, x_TD: Tensor, weights_TA: Tensor, index_TA: Tensor) -> Tensor:
        experts = ExpertWeights(self.fc1.weight, self.fc2.weight, self.fc1.lora(), self.fc2.lora())
        return ops.expert_mlp(x_TD, experts, weights_TA, index_TA)


class SharedExperts(nn.Module):
    """The shared experts: one SwiGLU MLP, added without a gate."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.shared_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.shared_size, bias=False)
        self.down_proj = nn.Linear(config.shared_size, config.hidden_size, bias=False)

    def lay_out(self) -> None:
        """See :meth:`Aria.lay_out`."""
        join(self.gate_proj, self.up_proj)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ops.gated(*apply_linears(x_TD, self.gate_proj, self.up_proj)))


class MoE(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.moe_topk
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the layer's output ``(T, D)`` and the router's logits ``(T, E)``."""
        logits_TE = self.router(x_TD)
        weights_TA, index_TA = ops.route(logits_TE, self.top_k)
        return self.experts(x_TD, weights_TA, index_TA) + self.shared_experts(x_TD), logits_TE
