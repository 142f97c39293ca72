"""Parts of :func:`aria.ops.sample` in plain PyTorch: the specification of :mod:`aria.ops.kernels.sample`.

N sequences, V vocabulary, R rows (slots of running requests), G groups of ids that share counters of noise.

A draw is the maximum of logit / temperature + Gumbel noise (Gumbel-max), which samples from the softmax. The noise
comes from a counter-based generator, keyed by the seed, the position and the token: a seed gives the same text in any
batch and on any device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 2048
"""Token ids that share :data:`LANES` counters of four words each."""
LANES = GROUP // 4
"""Id ``g * GROUP + w * LANES + j`` takes word w of counter ``g * LANES + j``."""
_WORD = 0xFFFFFFFF


class Settings(NamedTuple):
    """Sampling settings of each row: tensors ``(R,)``, all of them columns of one table."""

    temperature: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int32; 0 keeps all."""
    top_p: Tensor
    """float32; 1 keeps all."""
    min_p: Tensor
    """float32; 0 keeps all."""
    seed_low: Tensor
    """int32: the lower half of the seed's bits."""
    seed_high: Tensor
    """int32: the upper half."""

    @staticmethod
    def of(table_RC: Tensor) -> Settings:
        """Read an int32 table ``(R, 6 or more)``, in which floating-point columns are stored by their bits."""
        words, floats = table_RC.unbind(1), table_RC.view(torch.float32).unbind(1)
        return Settings(floats[0], words[1], floats[2], floats[3], words[4], words[5])


def draw(logits_NV: Tensor, positions_N: Tensor, settings: Settings) -> Tensor:
    """A token of each sequence, int64 ``(N,)``, from float32 logits; temperatures are above 0."""
    least = thresholds(logits_NV, settings)
    noise = gumbel_noise(settings.seed_low, settings.seed_high, positions_N, logits_NV.shape[1])
    noisy = logits_NV / settings.temperature[:, None] + noise
    return noisy.masked_fill(logits_NV < least[:, None], float("-inf")).argmax(-1)


def thresholds(logits_NV: Tensor, settings: Settings) -> Tensor:
    """The lowest logit that each sequence keeps, float32 ``(N,)``; -inf where it keeps all.

    Args:
        logits_NV: float32 logits before temperature.
        settings: Of each sequence; temperatures are above 0.
    """
    V = logits_NV.shape[1]
    temperature = settings.temperature[:, None]
    most = logits_NV.amax(-1, keepdim=True)
    least = torch.where(settings.min_p[:, None] > 0, most + temperature * settings.min_p[:, None].log(), -math.inf)
    if not ((settings.top_k > 0) | (settings.top_p < 1)).any():
        return least[:, 0]
    ordered = logits_NV.sort(dim=-1, descending=True).values
    last = torch.where(settings.top_k > 0, settings.top_k.clamp(max=V), V).long() - 1
    kth = ordered.gather(1, last[:, None])
    mass = ((ordered - most) / temperature).exp().masked_fill(ordered < kth, 0.0).double()
    before = mass.cumsum(-1) - mass
    # 1 keeps all, even if rounding lets the sum reach it early.
    share = torch.where(settings.top_p < 1, settings.top_p.double(), math.inf)
    kept = (before < share[:, None] * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    nucleus = ordered.gather(1, kept.clamp(min=1) - 1)
    return torch.maximum(least, torch.maximum(kth, nucleus))[:, 0]


def gumbel_noise(seed_low_N: Tensor, seed_high_N: Tensor, positions_N: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of each token at each sequence's position: float32 ``(N, V)``."""
    groups = -(-vocab_size // GROUP)
    counters = torch.arange(groups * LANES, device=seed_low_N.device)
    key = (seed_low_N.long()[:, None] & _WORD, seed_high_N.long()[:, None] & _WORD)
    words = philox(key, counters[None, :], positions_N.long()[:, None] & _WORD)
    bits_NGWJ = torch.stack([word.unflatten(1, (groups, LANES)) for word in words], dim=2)
    # Exponential, exact to float32 even where it is small: those are the draws that win.
    u = (bits_NGWJ.flatten(1)[:, :vocab_size].float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def philox(key: tuple[Tensor, Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 on counters ``(low, high, 0, 0)``: four words of 32 random bits (Salmon et al., SC 2011).

    All are int64 tensors that hold 32-bit values and broadcast against each other.
    """
    k0, k1 = key
    c0, c1, c2, c3 = low, high, torch.zeros_like(low), torch.zeros_like(low)
    for _ in range(10):
        # Products wrap around at 64 bits; their halves are still right.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD
        c2, c3 = (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3
