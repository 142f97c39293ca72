"""Private names of PyTorch and torchao, all in one place: what to check first when either is upgraded.

Each entry says what it is used for and in which version it was seen. All were seen in PyTorch 2.13.0 and torchao 0.18.0
unless an entry says otherwise. Two private names are used through their objects and not listed as aliases here:
``FileSystemReader._slice_file`` (overridden in :mod:`aria.train.stored`, to check a file before PyTorch reads it) and
``Dataset._fingerprint`` of Hugging Face's ``datasets`` (read in :mod:`aria.train.data.sources`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as _pytree
from torch import Tensor, nn

register_pytree_node: Callable[..., None] = _pytree.register_pytree_node
"""Lets FSDP and DDP find the tensors inside an output class. ``torch.utils.pytree`` has no ``serialized_type_name``."""

addmm_activation: Callable[..., Tensor] = torch._addmm_activation
"""Linear and GELU (tanh) in one cuBLASLt call. There is no public name for it."""

cudnn_attention: Callable[..., tuple[Any, ...]] = torch.ops.aten._scaled_dot_product_cudnn_attention
"""Attention that also returns the log-sum-exp, which ``scaled_dot_product_attention`` does not."""

# One launch for a list of tensors; what torch.optim's own ``foreach`` optimizers call. No public names.
foreach_add: Callable[..., Any] = torch._foreach_add_
foreach_copy: Callable[..., Any] = torch._foreach_copy_
foreach_lerp: Callable[..., Any] = torch._foreach_lerp_
foreach_mul: Callable[..., Any] = torch._foreach_mul_
foreach_sub: Callable[..., Any] = torch._foreach_sub
foreach_norm: Callable[..., Any] = torch._foreach_norm


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """``nn.Module._parameters``: parameters by name, without the lookup of attributes, which a property may shadow."""
    return module._parameters


def share_modules(module: nn.Module, other: nn.Module) -> None:
    """Give a module the submodules of another one, in a dictionary of its own (``nn.Module._modules``)."""
    module._modules = dict(other._modules)


def unlimited_recompiles() -> Any:
    """Context in which ``torch.compile`` may compile one function for any number of shapes.

    ``torch._dynamo.utils.disable_cache_limit``, as torchao's own optimizers use it.
    """
    return torch._dynamo.utils.disable_cache_limit()


def storage_info() -> Any:
    """``_StorageInfo``: file, offset and length of a tensor in a checkpoint of ``torch.distributed``.

    Imported when it is called: inference does not need ``torch.distributed.checkpoint``.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo


class Adam8bit(NamedTuple):
    """Parts of torchao's 8-bit AdamW, which has no public function for one parameter."""

    step: Callable[..., None]
    """``torchao.optim.adam.single_param_adam``: one step of one parameter, to be compiled on CUDA."""
    moment: Any
    """``torchao.optim.subclass_8bit.OptimState8bit``: a moment as uint8 codes with a scale for each block."""


def torchao_adam() -> Adam8bit:
    """Parts of torchao's 8-bit AdamW.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    return Adam8bit(single_param_adam, OptimState8bit)
