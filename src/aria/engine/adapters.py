"""The adapters that an engine serves: multi-LoRA in the decoder, model variants for the encoder.

LoRA weights of the decoder and its head are applied per token, so that requests of several adapters share a step. LoRA
weights of the vision tower or the projector change image tokens, so each such adapter has an encoder of its own, which
shares all base weights, and image tokens are cached per adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import chain, count

import torch
from torch import Tensor

from aria.model import Aria
from aria.model.lora import LoRASettings, attach_lora, lora_modules
from aria.model.multi_lora import AdapterBatch, MultiLoRAWeights
from aria.ops import LoRA
from aria.ops.lora import check_lora
from aria.private_api import share_modules

AdapterWeights = Mapping[str, LoRA]
"""LoRA weights of one adapter, by module name."""

DECODER = "language_model."


class Adapters:
    """Adapters by name. One thread adds, removes and uses them; any thread may read :attr:`names`.

    Requests hold an adapter's key, not its name: a removed adapter serves its requests to their end, while another one
    may already be loaded under the same name. Keys are never reused, so that cached results of one adapter are never
    taken for another's.

    Args:
        model: The base model, laid out for inference. Its weights are not changed.
        weights: LoRA weights of each adapter.

    Raises:
        ValueError: A name is empty, or an adapter does not fit the model.
    """

    def __init__(self, model: Aria, weights: Mapping[str, AdapterWeights] | None = None):
        self.encoding: dict[str | None, Aria] = {None: model}
        """Models that encode images: the base model under None, and a variant by the key of each adapter that changes
        the vision tower or the projector."""
        self.names: tuple[str, ...] = ()
        """Names that requests may ask for."""
        self._model = model
        self._keys: dict[str, str] = {}
        self._used: set[str] = set()
        self._decoder: dict[str, AdapterWeights] = {}
        self._numbers: dict[str | None, int] = {}
        self._put(weights or {})

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        variants = (variant for name, variant in self.encoding.items() if name is not None)
        beside = (adapter for variant in variants for adapter in lora_modules(variant).values())
        return self.loras.nbytes + sum(adapter.a.nbytes + adapter.b.nbytes for adapter in beside)

    def add(self, name: str, weights: AdapterWeights) -> None:
        """Load an adapter, replacing one of the same name. If this fails, nothing has changed.

        Raises:
            ValueError: The name is empty, or the adapter does not fit the model.
        """
        self._put({name: weights})

    def remove(self, name: str) -> None:
        """Refuse further requests for a name. Its memory is kept until :meth:`drop_unused`.

        Raises:
            ValueError: There is no such adapter.
        """
        self.key(name)
        del self._keys[name]
        self.names = tuple(self._keys)

    @property
    def retired(self) -> bool:
        """Whether any removed adapter is still in memory."""
        return len(self._numbers) > len(self._keys) + 1

    def drop_unused(self, keys: Collection[str | None]) -> bool:
        """Free removed adapters whose keys no request holds. Returns whether there were any."""
        unused = self._numbers.keys() - {None, *self._keys.values(), *keys}
        if not unused:
            return False
        self._stack({key: one for key, one in self._decoder.items() if key not in unused})
        for key in unused:
            self.encoding.pop(key, None)
        return True

    def _put(self, weights: Mapping[str, AdapterWeights]) -> None:
        """Load all adapters or none."""
        keys, variants, decoder = dict(self._keys), {}, dict(self._decoder)
        for name, one in weights.items():
            if not name:
                raise ValueError("an adapter has no name; give it one for requests to use")
            if not one:
                raise ValueError(f"the adapter {name!r} changes nothing")
            keys[name] = key = self._new_key(name)
            images = {module: lora for module, lora in one.items() if not module.startswith(DECODER)}
            try:
                if images:
                    variants[key] = _encoder_variant(self._model, images)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"the adapter {name!r} does not fit the model: {error}") from error
            decoder[key] = {module: lora for module, lora in one.items() if module.startswith(DECODER)}
        self._stack(decoder)
        self.encoding.update(variants)
        self._used.update(keys.values())
        self._keys, self.names = keys, tuple(keys)

    def _stack(self, decoder: dict[str, AdapterWeights]) -> None:
        self.loras = MultiLoRAWeights(self._model, list(decoder.values()))
        self._decoder = decoder
        self._numbers = {None: 0} | {key: number for number, key in enumerate(decoder, 1)}

    def _new_key(self, name: str) -> str:
        """A key that was never used: the name itself the first time."""
        tries = (name if not i else f"{name}\0{i}" for i in count())
        return next(key for key in tries if key not in self._used)

    def key(self, name: str | None) -> str | None:
        """Key of a name, for requests to hold.

        Raises:
            ValueError: There is no such adapter; the message lists the existing ones.
        """
        if name is None:
            return None
        if name not in self._keys:
            offered = f"there are {', '.join(self.names)}" if self.names else "the engine has none"
            raise ValueError(f"there is no adapter {name!r:.200}; {offered}")
        return self._keys[name]

    def number(self, key: str | None) -> int:
        """Adapter id of a key in the tensors of the next step: 0 is the base model. It may change from step to step."""
        return self._numbers[key]

    def step(self, adapter_ids_T: Tensor) -> AdapterBatch | None:
        """Adapters of a step by token, int32 ``(T,)``; None if no adapter changes the decoder."""
        return AdapterBatch(self.loras, adapter_ids_T) if len(self.loras) else None


@torch.no_grad()
def _encoder_variant(model: Aria, weights: AdapterWeights) -> Aria:
    """A variant of the model with LoRA in its vision tower and projector, sharing all base weights."""
    variant = copy.copy(model)
    share_modules(variant, model)
    for part in ("vision_tower", "multi_modal_projector"):
        module = model.get_submodule(part)
        shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        setattr(variant, part, copy.deepcopy(module, shared))
    for name, lora in weights.items():
        rank = lora.a.shape[0]
        adapter = attach_lora(variant, name, LoRASettings(rank=rank, alpha=lora.scaling * rank, dropout=0.0))
        check_lora(name, lora.a, lora.b, model.get_parameter(f"{name}.weight").shape, rank)
        adapter.a.copy_(lora.a)
        adapter.b.copy_(lora.b)
        adapter.requires_grad_(False)
    return variant
