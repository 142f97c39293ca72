"""The projector: learned queries attend to a crop's patches and become image tokens (paper section 2.1).

P patches, C crops, Q queries of all crops end to end, D vision hidden, H heads, K head width, O decoder hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aria import ops
from aria.config import ProjectorConfig
from aria.ops import Segments


class CrossAttention(nn.Module):
    """Queries attend to patches.

    The checkpoints project q, k and v twice, first without a bias, then with one inside an ``nn.MultiheadAttention``;
    the second projections keep that module's names, but are computed here. There is no residual connection.
    """

    has_lora = False

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        size = config.hidden_size
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.multihead_attn = nn.MultiheadAttention(size, config.num_attention_heads)
        self.linear = nn.Linear(size, size)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layer_norm_kv = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, x_PD: Tensor, query_ND: Tensor, rows_Q: Tensor, queries: Segments, patches: Segments) -> Tensor:
        """Attend from rows ``rows_Q`` of the learned table ``query_ND``, crop after crop, to the patches ``x_PD``."""
        inner = self.multihead_attn
        wq, wk, wv = inner.in_proj_weight.chunk(3)
        bq, bk, bv = inner.in_proj_bias.chunk(3)
        # The same few rows serve every crop, so they are projected once and then repeated.
        q = F.linear(self.q_proj(self.layer_norm(query_ND)), wq, bq)[rows_Q]
        norm = self.layer_norm_kv
        x_PD = ops.layer_norm(x_PD, norm.weight, norm.bias, norm.eps)
        if ops.inference_kernels(x_PD) and not self.has_lora:
            # Two consecutive linear layers are one, and computing its weight costs far less than a pass over patches.
            # Not for values: the rounding error of that weight is the same for all patches, so averages keep it.
            k = F.linear(x_PD, wk @ self.k_proj.weight, bk)
        else:
            k = F.linear(self.k_proj(x_PD), wk, bk)
        v = F.linear(self.v_proj(x_PD), wv, bv)
        q, k, v = (t.unflatten(-1, (inner.num_heads, -1)) for t in (q, k, v))
        attended = ops.attention(q, k, v, queries, patches, causal=False)
        return self.linear(inner.out_proj(attended.flatten(1)))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, into the decoder's width."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_in = nn.Linear(config.hidden_size, config.output_size, bias=False)
        self.linear_out = nn.Linear(config.output_size, config.output_size, bias=False)

    def forward(self, x_QD: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x_QD), approximate="tanh"))


class Projector(nn.Module):
    """Hidden states of patches -> image tokens."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        self.query = nn.Parameter(torch.zeros(config.num_queries, config.hidden_size))
        self.cross_attn = CrossAttention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_PD: Tensor, patches: Segments, grid_patches: tuple[int, ...]) -> Tensor:
        """Project crops.

        Args:
            x_PD: Output of the vision tower.
            patches: Real patches of each crop.
            grid_patches: Patches of each crop with its padding.

        Returns:
            ``(Q, O)``, the image tokens of each crop one after another.

        Raises:
            ValueError: A crop's size is not in the projector's table.
        """
        queries = Segments.of([self.config.queries_for(n) for n in grid_patches], x_PD.device)
        attended = self.cross_attn(x_PD, self.query, queries.positions(), queries, patches)
        return self.feed_forward(self.layer_norm(attended))
