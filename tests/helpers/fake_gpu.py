"""A fake GPU: tensors without memory, and kernels that are compiled for it but never run.

Programs run on PyTorch's fake tensors, on any GPU and without values; Triton's launches are recorded. A machine without
a GPU can so determine which kernels a program needs, on which device it launches them, and how much shared memory they
take on a GPU of any generation. Triton must not be in interpreter mode, as it is in the tests' process, so programs
that use this run in a separate process.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction, compute_cache_key

KB = 1024


class GPU(NamedTuple):
    """Properties of a GPU."""

    capability: tuple[int, int]
    shared: int
    """Maximum bytes of shared memory per program."""
    processors: int = 100


GPUS = {
    "8.0": GPU((8, 0), 163 * KB),
    "8.6": GPU((8, 6), 99 * KB),
    "8.9": GPU((8, 9), 99 * KB),
    "9.0": GPU((9, 0), 227 * KB, 132),
    "10.0": GPU((10, 0), 227 * KB),
    "12.0": GPU((12, 0), 99 * KB),
    "12.1": GPU((12, 1), 99 * KB),
}
"""By compute capability, from NVIDIA's programming guide (maximum amount of shared memory per thread block)."""


class Launch(NamedTuple):
    """A launched variant of a kernel."""

    kernel: Any
    key: str
    arguments: tuple[Any, ...]
    """As :class:`ASTSource` takes them, and the options."""

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__}.{self.kernel.__name__}"

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants by name, with ``num_warps`` and ``num_stages``."""
        _, constants, _, options = self.arguments
        names = {self.kernel.arg_names[path[0]]: value for path, value in constants.items()}
        return names | {"num_warps": options.num_warps, "num_stages": options.num_stages}

    def shared(self, gpu: GPU) -> int:
        """Return the bytes of shared memory of a program, compiling up to Triton's allocation of it."""
        signature, constants, attributes, options = self.arguments
        source = GluonASTSource if isinstance(self.kernel, GluonJITFunction) else ASTSource
        major, minor = gpu.capability
        try:
            triton.compile(
                source(self.kernel, signature, constants, attributes),
                target=GPUTarget("cuda", major * 10 + minor, 32),
                options=options.__dict__,
            )
        except _SharedOut as out:
            return out.bytes
        raise AssertionError("compiled past the allocation of shared memory")


class _SharedOut(Exception):  # noqa: N818 (it ends a compilation that succeeded)
    def __init__(self, taken: int):
        self.bytes = taken


def _share_out(self: Any, source: Any, metadata: Any, options: Any, capability: int) -> None:
    """Replace the compiler's stage from Triton's IR to LLVM's: run only its first passes."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options

    manager = ir.pass_manager(source.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    version = get_ptx_version_from_options(options, self.target.arch)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
    manager.run(source, "share_out")
    raise _SharedOut(source.get_int_attr("ttg.shared"))


class _Driver:
    """The driver interface that Triton's launches use."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        major, minor = self._machine.gpu.capability
        return GPUTarget("cuda", major * 10 + minor, 32)

    def get_current_device(self) -> int:
        return self._machine.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._machine.gpu.shared, "multiprocessor_count": self._machine.gpu.processors}


class _OnTheGPU(TorchDispatchMode):
    """Fakes operations on a GPU; operations on the CPU alone are computed."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        device = kwargs.get("device")
        fake = device is not None and torch.device(device).type == "cuda"
        if not fake and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return op(*args, **kwargs)
        args, kwargs = tree_map(self._without_values, (args, kwargs))
        with self._fakes:
            return op(*args, **kwargs)

    def _without_values(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        return FakeTensor(self._fakes, x.to("meta"), x.device)


class Machine:
    """A machine with GPUs of one kind; within :meth:`running`, programs find them and may work on them.

    Args:
        gpu: the kind.
    """

    def __init__(self, gpu: GPU):
        self.gpu = gpu
        self.current = 0
        """Index of the current device."""
        self._binders: dict[Any, tuple[Any, ...]] = {}
        self.launches: dict[tuple[str, str], Launch] = {}
        """Launched variants of kernels."""
        self.misplaced: list[str] = []
        """Kernels launched while the current device was not that of their tensors."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make this the process's machine until the block ends; the process cannot use the real one afterwards."""
        triton.runtime.driver.set_active(_Driver(self))
        JITFunction.run = lambda kernel, *args, grid, warmup, **options: self._note(kernel, args, options)
        CUDABackend.make_llir = _share_out
        self._replace_driver_calls()
        _use_cpu_device_guard()
        _forget()
        with warnings.catch_warnings(), _OnTheGPU():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield

    def _note(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if kernel not in self._binders:
            self._binders[kernel] = kernel.create_binder()
        _, keys, _, backend, binder = self._binders[kernel]
        options["debug"] = False
        options["instrumentation_mode"] = ""
        bound, specialization, rest = binder(*args, **options)
        key = compute_cache_key(keys, specialization, rest)
        if (kernel.__name__, key) not in self.launches:
            parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
            launch = Launch(kernel, key, (signature, constants, attributes, parsed))
            self.launches[kernel.__name__, key] = launch
        tensors = (getattr(x, "base", x) for x in bound.values())  # of a descriptor, the tensor it describes
        used = {x.device.index for x in tensors if isinstance(x, torch.Tensor)}
        if used != {self.current}:
            self.misplaced.append(f"{kernel.__name__} on {self.current}, its tensors on {sorted(used)}")

    def _replace_driver_calls(self) -> None:
        """Replace functions of PyTorch that would call a driver."""
        machine = self

        class Current:
            """``torch.cuda.device``."""

            def __init__(self, device: Any):
                self.index = torch.device(device).index if not isinstance(device, int) else device

            def __enter__(self) -> None:
                self.before, machine.current = machine.current, self.index or 0

            def __exit__(self, *_: object) -> None:
                machine.current = self.before

        class Properties(NamedTuple):
            name: str
            major: int
            minor: int
            multi_processor_count: int
            shared_memory_per_block_optin: int

        properties = Properties("a GPU", *self.gpu.capability, self.gpu.processors, self.gpu.shared)

        class Anything:
            """Stands in for events, streams and graphs."""

            def __getattr__(self, name: str) -> Any:
                return lambda *_, **__: None

        answers: dict[str, Any] = {
            "_lazy_init": lambda: None,
            "device": Current,
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: machine.current,
            "get_device_capability": lambda device=None: machine.gpu.capability,
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: properties.name,
            "mem_get_info": lambda device=None: (64 << 30, 80 << 30),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "current_stream": lambda device=None: Anything(),
            "stream": lambda stream: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, 0),
            "Event": Anything,
            "Stream": lambda *_, **__: Anything(),
            "CUDAGraph": Anything,
        }
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        torch.backends.cudnn.is_available = lambda: True
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
        # Unknown numbers are one, and unknown conditions are true.
        FakeTensor.tolist = lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype).tolist()
        FakeTensor.numpy = lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype).numpy()
        FakeTensor.item = FakeTensor.__int__ = lambda tensor: 1
        FakeTensor.__bool__ = lambda tensor: True
        fake_impls.op_implementations_dict[torch.ops.aten.nonzero.default] = lambda mode, op, tensor: tensor.new_empty(
            tensor.numel(), tensor.ndim, dtype=torch.int64
        )


def _use_cpu_device_guard() -> None:
    """Use the CPU's device guard in PyTorch's core for GPUs, whose own guard calls a driver."""
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[0]  # by c10::DeviceType: CPU, CUDA
    torch._C._set_only_lift_cpu_tensors(True)  # copy values of new tensors to a GPU in a separate step


def _forget() -> None:
    """Clear the package's caches about another machine's GPUs."""
    for name, module in list(sys.modules.items()):
        if name.startswith("aria."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
