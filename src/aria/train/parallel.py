"""One model on many GPUs: FSDP2, expert parallelism, sequence parallelism and activation checkpointing.

T tokens of a batch, S ranks that share them. The model's code knows one device and no ranks: modules are changed in
place here, and parameters keep their names and global shapes.
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
    """``[parallel]`` of a recipe. With one process only ``checkpointing`` has an effect."""

    expert: int = 1
    """Expert-parallel ranks: the experts of a layer are spread over them, and tokens are sent to them. 1: all ranks
    compute all experts, and weights are gathered, as those of other parts are."""
    sequence: int = 1
    """Sequence-parallel ranks: they share the tokens of one batch, for long contexts, and the heads in attention."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Layers that keep only their input and are recomputed in the backward pass: none, every other one, or all."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before it raises an error."""

    def __post_init__(self) -> None:
        for name in ("expert", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be 1 or above, but is {getattr(self, name)}")
        if self.timeout <= 0:
            raise ValueError(f"timeout should be above 0, but is {self.timeout}")


class Parallel:
    """The processes that train together (:class:`~aria.train.ranks.Ranks`). :meth:`start` makes it once per process."""

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
            # Checkpoints are written by another thread, whose collectives must not mix with the loop's.
            self.saving: dist.ProcessGroup | None = dist.new_group(backend="gloo")
        else:
            self.saving = None

    @classmethod
    def start(cls, settings: ParallelSettings | None = None) -> Parallel:
        """Join the processes that torchrun started; without torchrun there is one process.

        Raises:
            ValueError: The settings do not fit the number of processes, or there are fewer GPUs than processes.
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
            # Host numbers go over gloo, so that no rank waits for a GPU to exchange them.
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
        """Sum over the ranks with data of their own."""
        return self._reduced(tensor, self._data)

    def join(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that share the tokens of one batch."""
        return self._reduced(tensor, self._sequence)

    def max(self, value: int) -> int:
        """Largest value over all ranks; does not wait for the device."""
        if self.world == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def collect(self, thing: Any) -> list[Any]:
        """Objects of all ranks with data of their own. All ranks call it together, while none is saving."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, thing, group=self.saving)
        return found[:: self.sequence]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.max(0)

    def close(self) -> None:
        """Leave the process group. If this process fails, the next collective of the others raises an error.

        On GPUs a failing process leaves by exiting: NCCL would first wait for collectives that never finish.
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
        """Attention context of sequences whose tokens are split over this rank's group.

        Raises:
            ValueError: The tokens do not divide among the ranks.
        """
        self._check_tokens(segments.total)
        return HeadsForTokens(config, segments, cast(dist.ProcessGroup, self._sequence))

    def shard(self, x_T: Tensor) -> Tensor:
        """This rank's part of the tokens, in the order of ranks."""
        self._check_tokens(len(x_T))
        return x_T.chunk(self.sequence)[self.rank % self.sequence]

    def _check_tokens(self, tokens: int) -> None:
        if tokens % self.sequence:
            raise ValueError(f"[batch] tokens is {tokens}, which does not divide among {self.sequence} sequence ranks")

    def apply(self, model: M, settings: ParallelSettings | None = None) -> M:
        """Shard a model over the ranks in place; every rank passes all of it. Trained parameters start as rank 0's.

        Args:
            model: An :class:`~aria.model.Aria` with adapters attached and frozen parts frozen; or, with one process,
                any module that contains one.
            settings: None means the settings of the start.

        Returns:
            The same model. With more than one rank its parameters are DTensors.

        Raises:
            ValueError: Heads or experts do not divide among the ranks.
        """
        settings = settings or self.settings
        arias = [module for module in model.modules() if isinstance(module, Aria)]
        if self.world > 1:
            if not isinstance(model, Aria):
                raise ValueError(
                    f"a {type(model).__name__} cannot be sharded over {self.world} processes, only a plain Aria; "
                    "train it with one"
                )
            self._check(model, settings)
            _broadcast_trained(model)
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
        """FSDP2, one layer at a time. A frozen vision encoder stays unsharded: it is small, and read often."""
        mesh = init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("shard",))
        layers = _decoder_layers(model)
        tower, decoder = model.vision_tower, model.language_model.model
        towers = [*tower.encoder.layers, tower] if any(p.requires_grad for p in tower.parameters()) else []
        # Embeddings are read before the decoder is called, and the head's weights outside its `forward`.
        _gather_when_read(decoder.embed_tokens, mesh)
        _gather_when_read(model.language_model.lm_head, mesh)
        ignored = set(decoder.embed_tokens.parameters())
        if settings.expert > 1:
            rest = self._expert_mesh(settings.expert)["expert_shard"]
            for experts in (layer.mlp.experts for layer in layers):
                if rest.size() > 1:
                    _fully_shard(experts, rest, _rows_within_experts(rest.size()))
                else:
                    ignored |= set(experts.parameters())  # on no other rank: nothing to gather or to sum
        for module in (*towers, model.multi_modal_projector, *layers, decoder):
            _fully_shard(module, mesh, ignored=ignored)
        _prefetch(layers)


def _store_of_this_attempt() -> dist.Store | None:
    """The store for the rendezvous of a restarted run; None means PyTorch's default.

    torchrun keeps one store for all restarts of a run, with the addresses of dead processes.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"attempt {attempt}", store)


def _decoder_layers(model: Aria) -> list[DecoderLayer]:
    return cast("list[DecoderLayer]", list(model.language_model.model.layers))


@torch.no_grad()
def _broadcast_trained(model: nn.Module) -> None:
    """Broadcast trained parameters: fresh adapters may have been drawn differently on each rank."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)


def _fully_shard(
    module: nn.Module,
    mesh: DeviceMesh,
    placement: Callable[[nn.Parameter], Shard | None] | None = None,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """FSDP2 with gradients summed in float32: the loss is already divided by the targets of the whole step."""
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
    # A plain sum, which every backend supports.
    cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)


def _rows_within_experts(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """Shard the second axis where it divides: experts are spread along the first one already."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.ndim > 1 and parameter.shape[1] % ranks == 0 else None

    return placement


def _prefetch(layers: list[DecoderLayer]) -> None:
    """Gather the next layer's weights while a layer computes, forward and backward."""
    for here, after in pairwise(layers):
        cast(FSDPModule, here).set_modules_to_forward_prefetch(_shards_of(after))
        cast(FSDPModule, after).set_modules_to_backward_prefetch(_shards_of(here))


def _shards_of(layer: DecoderLayer) -> list[FSDPModule]:
    return [module for module in (layer, layer.mlp.experts) if isinstance(module, FSDPModule)]


class _Gathered(torch.autograd.Function):
    """Gathers a sharded parameter; its gradient is summed over the ranks in float32 and sharded again."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = parameter.device_mesh, parameter.placements, parameter.dtype
        return parameter.full_tensor()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts = DTensor.from_local(grads[0].float(), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements).to(ctx.dtype)


def _gather_when_read(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard parameters that are read outside their module's ``forward``: reading one gathers it."""
    for inner in module.modules():
        names = [name for name, parameter in own_parameters(inner).items() if parameter is not None]
        for name in names:
            parameter = cast(nn.Parameter, own_parameters(inner)[name])
            sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), parameter.requires_grad)
            inner.register_parameter(name, sharded)
        if names:
            kind = type(inner)
            readers = {name: property(_reader(name)) for name in names}
            inner.__class__ = type(kind.__name__, (kind,), readers)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    return lambda module: _Gathered.apply(own_parameters(module)[name])  # type: ignore[no-untyped-call]


def _change_layers(model: Aria, settings: ParallelSettings) -> None:
    """Activation checkpointing, as the settings say."""
    towers, layers = list(model.vision_tower.encoder.layers), _decoder_layers(model)
    every = {"none": 0, "selective": 2, "full": 1}[settings.checkpointing]
    for stack in (towers, layers):
        for layer in stack[::every] if every else ():
            layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps only its inputs. All of it is recomputed, so that all ranks repeat the same collectives."""

    @wraps(forward)
    def wrapped(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        with set_checkpoint_early_stop(False):
            return checkpoint(forward, *arguments, use_reentrant=False)

    return wrapped
