"""The adapters that an engine serves: stacked for the decoder, beside shared weights for images.

What an adapter changes in the decoder and its head is added token by token, in steps that requests of other adapters
share. What it changes in the vision tower or the projector changes image tokens: these are made, and kept, for each
such adapter apart, by modules that share all weights with the model's.
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

Changes = Mapping[str, LoRA]
"""What one adapter changes, by names of modules."""

DECODER = "language_model."


class Adapters:
    """Adapters by name. One thread adds, removes and uses them; any may ask for :attr:`names`.

    What requests hold is an adapter's key, not its name: one that is removed serves the requests that have it to their
    end, while another may already be loaded under its name. Keys are never used twice, so that nothing computed by one
    adapter is taken for another's.

    Args:
        model: laid out for inference; its weights are not touched.
        changes: of each adapter.

    Raises:
        ValueError: a name is empty, or an adapter does not fit the model.
    """

    def __init__(self, model: Aria, changes: Mapping[str, Changes] | None = None):
        self.encoding: dict[str | None, Aria] = {None: model}
        """What encodes images: the model, and by the keys of adapters that change its vision tower or projector a
        twin."""
        self.names: tuple[str, ...] = ()
        """Names that requests may ask for."""
        self._model = model
        self._keys: dict[str, str] = {}
        self._used: set[str] = set()
        self._decoder: dict[str, Changes] = {}
        self._numbers: dict[str | None, int] = {}
        self._put(changes or {})

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        twins = (twin for name, twin in self.encoding.items() if name is not None)
        beside = (adapter for twin in twins for adapter in lora_modules(twin).values())
        return self.loras.nbytes + sum(adapter.a.nbytes + adapter.b.nbytes for adapter in beside)

    def add(self, name: str, changes: Changes) -> None:
        """Load one more adapter, or another one in place of the one of this name. If this fails, nothing has changed.

        Raises:
            ValueError: the name is empty, or the adapter does not fit the model.
        """
        self._put({name: changes})

    def remove(self, name: str) -> None:
        """Let no more requests ask for a name. Its memory is kept until :meth:`drop_unused`.

        Raises:
            ValueError: there is no such adapter.
        """
        self.key(name)
        del self._keys[name]
        self.names = tuple(self._keys)

    @property
    def retired(self) -> bool:
        """Whether any that was removed is still there."""
        return len(self._numbers) > len(self._keys) + 1

    def drop_unused(self, keys: Collection[str | None]) -> bool:
        """Free what was removed and belongs to none of the keys that requests have. Whether there was any."""
        unused = self._numbers.keys() - {None, *self._keys.values(), *keys}
        if not unused:
            return False
        self._stack({key: one for key, one in self._decoder.items() if key not in unused})
        for key in unused:
            self.encoding.pop(key, None)
        return True

    def _put(self, changes: Mapping[str, Changes]) -> None:
        """Load adapters, all of them or none."""
        keys, twins, decoder = dict(self._keys), {}, dict(self._decoder)
        for name, one in changes.items():
            if not name:
                raise ValueError("an adapter has no name; give it one that requests can ask for")
            if not one:
                raise ValueError(f"the adapter {name!r} changes nothing")
            keys[name] = key = self._new_key(name)
            images = {module: lora for module, lora in one.items() if not module.startswith(DECODER)}
            try:
                if images:
                    twins[key] = _twin(self._model, images)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"the adapter {name!r} does not fit the model: {error}") from error
            decoder[key] = {module: lora for module, lora in one.items() if module.startswith(DECODER)}
        self._stack(decoder)
        self.encoding.update(twins)
        self._used.update(keys.values())
        self._keys, self.names = keys, tuple(keys)

    def _stack(self, decoder: dict[str, Changes]) -> None:
        self.loras = MultiLoRAWeights(self._model, list(decoder.values()))
        self._decoder = decoder
        self._numbers = {None: 0} | {key: number for number, key in enumerate(decoder, 1)}

    def _new_key(self, name: str) -> str:
        """The name itself the first time."""
        tries = (name if not i else f"{name}\0{i}" for i in count())
        return next(key for key in tries if key not in self._used)

    def key(self, name: str | None) -> str | None:
        """What requests of a name hold.

        Raises:
            ValueError: there is no such adapter; the message names those that there are.
        """
        if name is None:
            return None
        if name not in self._keys:
            offered = f"there are {', '.join(self.names)}" if self.names else "the engine has none"
            raise ValueError(f"there is no adapter {name!r:.200}; {offered}")
        return self._keys[name]

    def number(self, key: str | None) -> int:
        """The adapter's number in a step's tensors, 0 for none. It may change from step to step."""
        return self._numbers[key]

    def step(self, adapter_ids_T: Tensor) -> AdapterBatch | None:
        """The adapters of a step, from the number of each token's; None where they change nothing in the decoder."""
        return AdapterBatch(self.loras, adapter_ids_T) if len(self.loras) else None


@torch.no_grad()
def _twin(model: Aria, changes: Changes) -> Aria:
    """The model with an adapter beside its vision tower and projector, on the same weights."""
    twin = copy.copy(model)
    share_modules(twin, model)
    for part in ("vision_tower", "multi_modal_projector"):
        module = model.get_submodule(part)
        shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
        setattr(twin, part, copy.deepcopy(module, shared))
    for name, lora in changes.items():
        rank = lora.a.shape[0]
        adapter = attach_lora(twin, name, LoRASettings(rank=rank, alpha=lora.scaling * rank, dropout=0.0))
        check_lora(name, lora.a, lora.b, model.get_parameter(f"{name}.weight").shape, rank)
        adapter.a.copy_(lora.a)
        adapter.b.copy_(lora.b)
        adapter.requires_grad_(False)
    return twin
