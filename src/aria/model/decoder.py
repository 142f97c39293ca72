"""The decoder: Llama's attention and a mixture of experts in every layer, on packed tokens.

T tokens, D hidden, H heads, KV key/value heads, K head width, E experts, V vocabulary, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aria import ops
from aria.config import TextConfig
from aria.model.context import Context, Paged
from aria.model.layers import RMSNorm, join
from aria.model.lora import apply_linears
from aria.model.moe import MoE
from aria.model.multi_lora import AdapterBatch
from aria.ops import MoEWeights


class Attention(nn.Module):
    """Projections around :meth:`Context.attend`, which rotates, caches and attends."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D, H, KV, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, KV * K, bias=False)
        self.v_proj = nn.Linear(D, KV * K, bias=False)
        self.o_proj = nn.Linear(H * K, D, bias=False)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)) for y in apply_linears(x_TD, self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(context.attend(self.layer, q, k, v).flatten(1))

    def lay_out(self) -> None:
        """See :meth:`Aria.lay_out`."""
        join(self.q_proj, self.k_proj, self.v_proj)


class DecoderLayer(nn.Module):
    """Attention and a mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config)
        self._moe_weights: tuple[tuple[int, int], MoEWeights] | None = None

    def forward(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), context)
        out_TD, router_logits_TE = self.mlp(self.post_attention_layernorm(x_TD))
        return x_TD + out_TD, router_logits_TE

    def infer(self, x_TD: Tensor, context: Context) -> Tensor:
        """The same without gradients and router logits, in three fused operations."""
        adapters = context.adapters if isinstance(context, Paged) else None
        attended_THK = context.attend(self.self_attn.layer, *self._project(x_TD, adapters))
        return self._finish_layer(x_TD, attended_THK, adapters)

    def infer_sampled(self, x_TD: Tensor, context: Paged) -> Tensor:
        """The last layer's :meth:`infer`: returns only the tokens that are sampled from, ``(R, D)``."""
        assert context.sampled is not None, "the context does not say which tokens are sampled from"
        adapters = context.adapters
        attended_RHK = context.attend_sampled(self.self_attn.layer, *self._project(x_TD, adapters))
        sampled = None if adapters is None else adapters.at(context.sampled)
        return self._finish_layer(x_TD.index_select(0, context.sampled), attended_RHK, sampled)

    def _project(self, x_TD: Tensor, adapters: AdapterBatch | None) -> tuple[Tensor, ...]:
        attention, norm = self.self_attn, self.input_layernorm
        weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        qkv = ops.norm_linear(x_TD, norm.weight, norm.eps, *weights)
        if adapters is not None:
            qkv = adapters.add(attention.layer, "qkv", qkv, norm(x_TD))
        heads = [weight.shape[0] // attention.head_dim for weight in weights]
        return qkv.unflatten(-1, (-1, attention.head_dim)).split(heads, dim=1)

    def _finish_layer(self, x_TD: Tensor, attended_THK: Tensor, adapters: AdapterBatch | None) -> Tensor:
        """The layer from the output of attention on."""
        if not len(x_TD):
            return x_TD
        layer, attended_TD = self.self_attn.layer, attended_THK.flatten(1)
        x_TD = ops.linear_add(attended_TD, self.self_attn.o_proj.weight, x_TD)
        if adapters is not None:
            x_TD = adapters.add(layer, "o", x_TD, attended_TD)
        experts = None if adapters is None else adapters.of_experts(layer)
        return ops.moe_layer(x_TD, self.moe_weights(), experts)

    def moe_weights(self) -> MoEWeights:
        """The weights of the layer's second half as operations take them; kept where :meth:`lay_out` was called."""
        kept, moe = self._moe_weights, self.mlp
        places = moe.experts.fc1.weight.data_ptr(), moe.experts.fc2.weight.data_ptr()
        if kept is not None and kept[0] == places:
            return kept[1]
        norm, shared = self.post_attention_layernorm, moe.shared_experts
        return MoEWeights(
            norm.weight,
            norm.eps,
            moe.router.weight,
            moe.experts.fc1.weight,
            moe.experts.fc2.weight,
            (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
            moe.top_k,
        )

    def lay_out(self) -> None:
        """See :meth:`Aria.lay_out`. Finds out which kernels can use the weights, so that calls need not."""
        self._moe_weights = None
        weights, experts = self.moe_weights(), self.mlp.experts
        self._moe_weights = (experts.fc1.weight.data_ptr(), experts.fc2.weight.data_ptr()), weights
        with torch.no_grad():
            ops.moe_layer.resolve(weights.fc1, weights)


class Decoder(nn.Module):
    """Embeddings -> hidden states."""

    has_lora = False

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_TD: Tensor, context: Context, router_logits: bool = False, states: list[Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all layers.

        Args:
            x_TD: Embeddings.
            context: Where keys and values live.
            router_logits: Whether to return router logits, which the fused operations of inference do not compute.
            states: A list to which the input of each layer is appended, ``(T, D)``.

        Returns:
            Normed hidden states ``(T, D)``, of the tokens that are sampled from alone if the context names them, and
            each layer's router logits ``(T, E)``, or none.
        """
        paged = context if isinstance(context, Paged) and context.sampled is not None else None
        stacked = isinstance(context, Paged) and context.adapters is not None
        assert not (stacked and (self.has_lora or router_logits)), (
            "a batch of adapters needs a base model without LoRA modules"
        )
        if (stacked or self.fused(x_TD)) and not router_logits:
            *first, last = (layer for layer in self.layers if isinstance(layer, DecoderLayer))
            for layer in first:
                _note(states, x_TD)
                x_TD = layer.infer(x_TD, context)
            _note(states, x_TD)
            return self.norm(last.infer(x_TD, context) if paged is None else last.infer_sampled(x_TD, paged)), ()
        all_logits = []
        for module in self.layers:
            _note(states, x_TD)
            x_TD, logits_TE = module(x_TD, context)
            all_logits.append(logits_TE)
        if paged is not None and paged.sampled is not None:
            x_TD = x_TD.index_select(0, paged.sampled)
        return self.norm(x_TD), tuple(all_logits)

    def fused(self, x_TD: Tensor) -> bool:
        """Whether layers run as fused operations."""
        return ops.inference_kernels(x_TD) and not self.has_lora


def _note(states: list[Tensor] | None, x_TD: Tensor) -> None:
    if states is not None:
        states.append(x_TD)


class LanguageModel(nn.Module):
    """The decoder with its head, named as in the checkpoints."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
