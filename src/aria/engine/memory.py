"""How many KV-cache blocks fit into memory beside the weights and the largest step."""

from __future__ import annotations

import psutil
import torch

from aria.engine.adapters import Adapters
from aria.model import Aria, Paged, PagedCache

GRAPHS_BYTES = 1 << 30
"""Memory left free on CUDA for graphs and for later allocations of libraries."""
CPU_SHARE = 0.25
"""Maximum fraction of free memory that a KV cache on the CPU takes."""


def block_bytes(model: Aria, block_size: int) -> int:
    """Bytes of one block of the KV cache, over all layers."""
    return model.config.cache_bytes_per_token(model.dtype) * block_size


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
    """Number of blocks that fit on the model's device.

    Args:
        model: The model, with its weights on the device.
        block_size: Tokens of a block.
        step_tokens: Tokens of the largest prefill step, which is run once to measure its memory.
        max_rows: Sequences of the largest decode step.
        utilization: Fraction of the device's memory to use in total. No effect on CPUs.
        reserved: Bytes that other parts of the engine will allocate.
        adapters: Those on the device; steps with adapters take more memory.
    """
    device = model.device
    if device.type != "cuda":
        return int(psutil.virtual_memory().available * CPU_SHARE) // block_bytes(model, block_size)
    step = _step_bytes(model, block_size, step_tokens, max_rows, adapters)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free
    return int(total * utilization - taken - step - reserved - GRAPHS_BYTES) // block_bytes(model, block_size)


@torch.inference_mode()
def _step_bytes(model: Aria, block_size: int, tokens: int, rows: int, adapters: Adapters) -> int:
    """Peak memory in bytes of a chunk of ``tokens`` with the longest possible past, without the weights."""
    device = model.device
    text = model.config.text
    past = max(text.max_position_embeddings - tokens, 0)
    cache = PagedCache(text, 1, block_size, text.max_position_embeddings, 1, model.dtype, device)
    # All in block 0, which no sequence uses: the values do not matter here.
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
    # Sampling takes float32 logits, and as much memory again for intermediate values.
    model.logits(hidden).float().softmax(-1)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
