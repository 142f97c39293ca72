"""One model on many GPUs, from outside: weights in shards, experts and sequences spread, layers computed again.

T tokens of a batch, S ranks that share them, D hidden, E experts, A experts per token, V vocabulary. The model's code
knows one device and no ranks; modules are changed in place here, and parameters keep their names and (whole) shapes.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from aria.config import TextConfig
from aria.model import Aria
from aria.model.context import Context
from aria.model.decoder import DecoderLayer
from aria.ops import Segments
from aria.private_api import own_parameters
from aria.train.expert_parallel import spread_experts
from aria.train.sequence_parallel import HeadsForTokens

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """``[parallel]`` of a recipe. With one process only ``checkpointing`` changes anything."""

    expert: int = 1
    """Ranks over which the experts of a layer are spread; tokens travel to them. 1: all ranks compute all experts, and
    their weights travel, as those of other parts do."""
    sequence: int = 1
    """Ranks that share the tokens of one batch, for long contexts; inside attention they share the heads."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Layers that keep only their input and are computed again for gradients: none, every other one, or all."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name in ("expert", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")
        if self.timeout <= 0:
            raise ValueError(f"timeout should be above 0, but is {self.timeout}")


class Parallel:
    """The processes that train together; :meth:`start` makes it, once in a process.

    Attributes:
        rank, world: of this process, and how many there are.
        device: this process computes here.
        data_rank, data_world: of those that have data of their own: ranks that share sequences have the same.
        sequence: ranks that share the tokens of one batch.
    """

    def __init__(self, settings: ParallelSettings, rank: int, world: int, device: torch.device):
        self.settings, self.rank, self.world, self.device = settings, rank, world, device
        self.sequence = settings.sequence
        for name, count in (("expert", settings.expert), ("sequence", settings.sequence)):
            if world % count:
                raise ValueError(
                    f"[parallel] {name} is {count}, which does not divide {world} "
                    f"process{'es' if world > 1 else ''}; start some with torchrun --nproc-per-node, or set it to 1"
                )
        self.data_rank, self.data_world = rank // self.sequence, world // self.sequence
        self._data: dist.ProcessGroup | None = None
        self._sequence: dist.ProcessGroup | None = None
        if world > 1:
            grid = init_device_mesh(device.type, (self.data_world, self.sequence), mesh_dim_names=("data", "sequence"))
            self._data, self._sequence = grid.get_group("data"), grid.get_group("sequence")
            # Checkpoints are written by a thread of their own, whose messages must not mix with the loop's.
            self.saving: dist.ProcessGroup | None = dist.new_group(backend="gloo")
        else:
            self.saving = None

    @classmethod
    def start(cls, settings: ParallelSettings | None = None) -> Parallel:
        """Join the processes that torchrun started; without it this is the only one.

        Raises:
            ValueError: the settings do not fit the number of processes, or there are fewer GPUs than that.
        """
        settings = settings or ParallelSettings()
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if not torch.cuda.is_available():
            device = torch.device("cpu")
        else:
            number = int(os.environ.get("LOCAL_RANK", "0"))
            if number >= torch.cuda.device_count():
                raise ValueError(
                    f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; lower "
                    "--nproc-per-node"
                )
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        if world > 1:
            # Numbers of the host go by gloo, so that nobody waits for a GPU to tell them.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=_store_of_this_attempt(),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=settings.timeout),
                device_id=device if device.type == "cuda" else None,
            )
        return cls(settings, rank, world, device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks that have data of their own."""
        return self._reduced(tensor, self._data)

    def join(self, tensor: Tensor) -> Tensor:
        """Over the ranks that share the tokens of one batch."""
        return self._reduced(tensor, self._sequence)

    def max(self, value: int) -> int:
        """The largest value of all ranks; the device is not waited for."""
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def collect(self, thing: Any) -> list[Any]:
        """What every rank that has data of its own brings. All ranks have to call it together, while none is saving."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, thing, group=self.saving)
        return found[:: self.sequence]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.max(0)

    def close(self) -> None:
        """Leave the other processes. Where this one fails, they notice: their next exchange raises an error.

        On GPUs a failing process leaves by ending: NCCL would first wait for exchanges that nobody finishes.
        """
        failing = sys.exc_info()[0] is not None
        if self.world > 1 and dist.is_initialized() and not (failing and self.device.type == "cuda"):
            dist.destroy_process_group()

    def _reduced(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if self.world == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    def context(self, config: TextConfig, segments: Segments) -> Context:
        """Attention over sequences of which every rank of this group has its part of the tokens.

        Raises:
            ValueError: the tokens do not divide among the ranks.
        """
        self._check_tokens(segments.total)
        return HeadsForTokens(config, segments, cast(dist.ProcessGroup, self._sequence))

    def shard(self, x_T: Tensor) -> Tensor:
        """This rank's part of the tokens: the first of S is the first rank's."""
        self._check_tokens(len(x_T))
        return x_T.chunk(self.sequence)[self.rank % self.sequence]

    def _check_tokens(self, tokens: int) -> None:
        if tokens % self.sequence:
            raise ValueError(f"[batch] tokens is {tokens}, which does not divide among {self.sequence} sequence ranks")

    def apply(self, model: M, settings: ParallelSettings | None = None) -> M:
        """Spread a model over the ranks, in place; every rank brings it whole. Parameters that train start as rank 0's.

        Args:
            model: an :class:`~aria.model.Aria`, its adapters attached and its frozen parts frozen; or, with one
                process, any module that holds one.
            settings: None means those of the start.

        Returns:
            The same model. Its parameters are DTensors where there is more than one rank.

        Raises:
            ValueError: heads or experts do not divide among the ranks, or there are parameters of no known part.
        """
        settings = settings or self.settings
        arias = [module for module in model.modules() if isinstance(module, Aria)]
        if self.world > 1:
            if not isinstance(model, Aria):
                raise ValueError(
                    f"a {type(model).__name__} cannot be spread over {self.world} processes, only a plain Aria; train "
                    "it with one"
                )
            self._check(model, settings)
            _start_alike(model)
            if settings.expert > 1:
                self._spread_experts(model, settings.expert)
        for aria in arias:
            _change_layers(aria, settings)
        if self.world > 1:
            self._shard_weights(cast(Aria, model), settings)
        return model

    def _check(self, model: Aria, settings: ParallelSettings) -> None:
        text = model.config.text
        for name, count in (("attention heads", text.num_attention_heads), ("key heads", text.num_key_value_heads)):
            if count % settings.sequence:
                raise ValueError(
                    f"[parallel] sequence is {settings.sequence}, which does not divide the model's {count} {name}"
                )
        if text.moe_num_experts % settings.expert:
            raise ValueError(
                f"[parallel] expert is {settings.expert}, which does not divide {text.moe_num_experts} experts"
            )

    def _spread_experts(self, model: Aria, ranks: int) -> None:
        mesh = self._expert_mesh(ranks)
        for layer in _decoder_layers(model):
            spread_experts(layer.mlp.experts, mesh["expert"])

    def _expert_mesh(self, ranks: int) -> DeviceMesh:
        if not hasattr(self, "_experts"):
            names = ("expert_shard", "expert")
            self._experts = init_device_mesh(self.device.type, (self.world // ranks, ranks), mesh_dim_names=names)
        return self._experts

    def _shard_weights(self, model: Aria, settings: ParallelSettings) -> None:
        """FSDP2, a layer at a time. A vision encoder that is frozen stays whole: it is small, and read often."""
        mesh = init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("shard",))
        layers = _decoder_layers(model)
        tower, decoder = model.vision_tower, model.language_model.model
        towers = [*tower.encoder.layers, tower] if any(p.requires_grad for p in tower.parameters()) else []
        # The embeddings are read before the decoder is called, and the head's weights outside of its `forward`.
        _whole_where_read(decoder.embed_tokens, mesh)
        _whole_where_read(model.language_model.lm_head, mesh)
        apart = set(decoder.embed_tokens.parameters())
        if settings.expert > 1:
            rest = self._expert_mesh(settings.expert)["expert_shard"]
            for experts in (layer.mlp.experts for layer in layers):
                if rest.size() > 1:
                    _fully_shard(experts, rest, _rows_within_experts(rest.size()))
                else:
                    apart |= set(experts.parameters())  # no other rank has them: nothing to gather, nothing to sum
        for module in (*towers, model.multi_modal_projector, *layers, decoder):
            _fully_shard(module, mesh, ignored=apart)
        _prefetch(layers)


def _store_of_this_attempt() -> dist.Store | None:
    """Where processes find each other; None means as PyTorch does it.

    torchrun keeps one store for a run and all its restarts, with the addresses of processes that are dead.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"attempt {attempt}", store)


def _decoder_layers(model: Aria) -> list[DecoderLayer]:
    return cast("list[DecoderLayer]", list(model.language_model.model.layers))


@torch.no_grad()
def _start_alike(model: nn.Module) -> None:
    """Fresh adapters may have been drawn differently on each rank."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)


def _fully_shard(
    module: nn.Module,
    mesh: DeviceMesh,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """Gradients are summed, in float32: the loss is divided by the whole step's targets already."""
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=precision,
        reshard_after_forward=True,
        shard_placement_fn=placement,
        ignored_params=ignored,
    )
    cast(FSDPModule, module).set_gradient_divide_factor(1.0)
    # As a plain sum, which every backend has.
    cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)


def _rows_within_experts(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Experts are spread along their first axis already; the second one is cut where it divides."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % ranks == 0 else None

    return placement


def _prefetch(layers: list[DecoderLayer]) -> None:
    """The next layer's weights travel while a layer computes, in either direction."""
    for here, after in pairwise(layers):
        cast(FSDPModule, here).set_modules_to_forward_prefetch(_shards_of(after))
        cast(FSDPModule, after).set_modules_to_backward_prefetch(_shards_of(here))


def _shards_of(layer: DecoderLayer) -> list[FSDPModule]:
    return [module for module in (layer, layer.mlp.experts) if isinstance(module, FSDPModule)]


class _Whole(torch.autograd.Function):
    """A spread parameter, gathered; its gradient is summed over the ranks in float32 and cut up again."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = parameter.device_mesh, parameter.placements, parameter.dtype
        return parameter.full_tensor()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts = DTensor.from_local(grads[0].float(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements).to(ctx.dtype)


def _whole_where_read(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of a module whose weights others read, not its ``forward``: reading one gathers it."""
    for inner in module.modules():
        names = [name for name, parameter in own_parameters(inner).items() if parameter is not None]
        for name in names:
            parameter = cast(nn.Parameter, own_parameters(inner)[name])
            spread = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), parameter.requires_grad)
            inner.register_parameter(name, spread)
        if names:
            kind = type(inner)
            readers = {name: property(_reader(name)) for name in names}
            inner.__class__ = type(kind.__name__, (kind,), readers)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    return lambda module: _Whole.apply(own_parameters(module)[name])  # type: ignore[no-untyped-call]


def _change_layers(model: Aria, settings: ParallelSettings) -> None:
    """Keep less of layers for gradients, as the settings say."""
    towers, layers = list(model.vision_tower.encoder.layers), _decoder_layers(model)
    every = {"none": 0, "selective": 2, "full": 1}[settings.checkpointing]
    for stack in (towers, layers):
        for layer in stack[::every] if every else ():
            layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps its inputs only. All of it is computed again, so that all ranks exchange the same again."""

    @wraps(forward)
    def wrapped(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        with set_checkpoint_early_stop(False):
            return checkpoint(forward, *arguments, use_reentrant=False)

    return wrapped
