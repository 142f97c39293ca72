"""How many blocks of cache fit beside the weights and the largest step."""

from __future__ import annotations

import psutil
import torch

from aria.engine.adapters import Adapters
from aria.model import Aria, Paged, PagedCache

GRAPHS_BYTES = 1 << 30
"""Left free on CUDA for graphs and for what libraries allocate later."""
CPU_SHARE = 0.25
"""Of the memory that is free, the most that a cache on the CPU may take."""


def block_bytes(model: Aria, block_size: int) -> int:
    """Bytes of one block of the cache, all layers."""
    return model.config.cache_bytes_per_token(model.language_model.lm_head.weight.dtype) * block_size


def blocks_beside(
    model: Aria,
    block_size: int,
    *,
    step_tokens: int,
    max_rows: int,
    utilization: float,
    reserved: int,
    adapters: Adapters,
) -> int:
    """Blocks that fit on the model's device.

    Args:
        model: with its weights in place.
        block_size: tokens of a block.
        step_tokens: of the largest step; it is run once, to see what it takes.
        max_rows: sequences of the largest decoding step.
        utilization: share of the device's memory that everything together may take (on the CPU of no effect).
        reserved: bytes that other parts of the engine will take.
        adapters: on the device already; a step with them takes more than one without.
    """
    device = model.language_model.lm_head.weight.device
    if device.type != "cuda":
        return int(psutil.virtual_memory().available * CPU_SHARE) // block_bytes(model, block_size)
    step = _step_bytes(model, block_size, step_tokens, max_rows, adapters)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free
    return int(total * utilization - taken - step - reserved - GRAPHS_BYTES) // block_bytes(model, block_size)


@torch.inference_mode()
def _step_bytes(model: Aria, block_size: int, tokens: int, rows: int, adapters: Adapters) -> int:
    """Most bytes that a chunk of ``tokens`` takes beside the weights, with the longest past it can have."""
    weight = model.language_model.lm_head.weight
    device = weight.device
    text = model.config.text
    past = max(text.max_position_embeddings - tokens, 0)
    cache = PagedCache(text, 1, block_size, text.max_position_embeddings, 1, weight.dtype, device)
    # All in the block that is nobody's: what is computed does not matter here.
    blocks = torch.zeros(-(-(past + tokens) // block_size), dtype=torch.int32, device=device)
    place = torch.arange(tokens, dtype=torch.int32, device=device)
    ids = torch.randint(text.vocab_size, (tokens,), device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    context = Paged(
        cache,
        place + past,
        blocks.new_zeros(0, 1),
        place % block_size,
        blocks[None],
        [tokens],
        [past],
        adapters=adapters.step(torch.zeros_like(place)),
    )
    hidden = model(ids, context).hidden[:rows]
    # Sampling works in float32, with as much again in between.
    model.logits(hidden).float().softmax(-1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
