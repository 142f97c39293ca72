"""Loading a checkpoint of any layout into parameters without a second copy.

Files, headers, names, shapes and dtypes are checked before the first weight is read.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from aria.checkpoint.layouts import Layout, Shape, TensorPart, detect, main_dtype, place
from aria.checkpoint.paddle import read_pdparams
from aria.checkpoint.stored import StoredTensor, names, read_safetensors
from aria.config import CONFIG_NAME, AriaConfig, parse_dtype
from aria.hub import read_json, resolve
from aria.model import Aria
from aria.ops import current

WEIGHT_PATTERNS = ("*.safetensors", "*.pdparams", "*.index.json", CONFIG_NAME)
"""Glob patterns of the files in a Hub repository that loading needs."""

Progress = Callable[[int, int], None]
"""Called with bytes done and total bytes."""

_CHUNK = 32 << 20
_UNSAFE = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_LFS_POINTER = b"version https://git-lfs"


def parameter_shapes(config: AriaConfig) -> dict[str, Shape]:
    """Name and shape of each of the model's parameters."""
    with torch.device("meta"):
        model = Aria(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Checkpoint:
    """A checked checkpoint that fits the model; its weights are still in the files."""

    def __init__(self, path: str | os.PathLike[str], shapes: Mapping[str, Shape]):
        """Open the files and check them.

        Args:
            path: A folder, a weights file, or an index of shards.
            shapes: Name and shape of each parameter of the model, see :func:`parameter_shapes`.

        Raises:
            FileNotFoundError: There are no weights, or shards that the index lists are missing.
            ValueError: Corrupt files, an unknown or unsupported layout, or keys that do not fit, which it names.
        """
        self.files = find_weights(Path(path))
        try:
            stored = _read_all(self.files)
            self.layout: Layout = detect({name: tensor.shape for name, tensor in stored.items()}, shapes)
            self._plan = place(self.layout, stored, shapes)
        except ValueError as error:
            if str(Path(path)) in str(error):
                raise
            raise ValueError(f"{path}: {error}") from error
        self.shapes = dict(shapes)
        used = [tensor for parts in self._plan.values() for _, tensor in parts]
        self.dtype = main_dtype(used)
        """Dtype of most bytes."""
        self.nbytes = sum(tensor.nbytes for tensor in used)

    def dtype_of(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter."""
        return self._plan[name][0][1].dtype

    def read(self, out: Mapping[str, Tensor], progress: Progress | None = None) -> None:
        """Fill tensors of any dtype on any device with the parameters of their names.

        If device, dtype and orientation are as stored, bytes are read directly into the tensor; otherwise through a
        buffer of 32 MiB per thread, pinned for CUDA, so that threads read while others copy.

        Raises:
            ValueError: A file changed or ended while it was read. The contents of ``out`` are then undefined.
        """
        jobs: list[_Job] = []
        for name, tensor in out.items():
            assert tuple(tensor.shape) == self.shapes[name], f"{name}: {tuple(tensor.shape)} != {self.shapes[name]}"
            for piece, stored in self._plan[name]:
                jobs.extend(_jobs(tensor, piece, stored))
        jobs.sort(key=lambda job: (job.stored.segments[0].file, job.stored.segments[0].offset, job.start))
        _run(jobs, progress)

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """All parameters by name, allocated once, on ``device`` in ``dtype`` (None: as stored)."""
        state = {
            name: torch.empty(shape, dtype=dtype or self.dtype_of(name), device=device)
            for name, shape in self.shapes.items()
        }
        self.read(state, progress)
        return state


def load_into(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Layout:
    """Load weights into a model on the meta device. The model changes only if all of them load.

    Returns:
        The detected layout.

    Raises:
        FileNotFoundError, ValueError: see :class:`Checkpoint`.
    """
    parameters = model.state_dict()
    assert all(tensor.is_meta for tensor in parameters.values()), "build the model under torch.device('meta')"
    checkpoint = Checkpoint(path, {name: tuple(tensor.shape) for name, tensor in parameters.items()})
    state = checkpoint.load(dtype=dtype, device=device, progress=progress)
    model.load_state_dict(state, strict=True, assign=True)
    return checkpoint.layout


def load_model(
    path_or_repo_id: str | os.PathLike[str] | AriaConfig | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Aria:
    """A model in evaluation mode, from a checkpoint of any layout.

    Args:
        path_or_repo_id: A folder, a weights file with its ``config.json`` beside it, a Hub repository, None for the
            packaged nano model, or a config for random weights (normal, standard deviation 0.02, seed 0).
        revision: Branch, tag or commit of a Hub repository.
        dtype: Dtype of the parameters; None means the checkpoint's on CUDA and float32 on the CPU.
        device: None means CUDA if available.
        progress: Called with bytes done and total bytes, by one thread at a time.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: See :class:`Checkpoint`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"device {str(device)!r} is not on this machine; PyTorch finds {here}")
    dtype = torch.float32 if dtype is None and device.type == "cpu" else dtype
    dtype = None if dtype is None else parse_dtype(dtype)
    if isinstance(path_or_repo_id, AriaConfig):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for Hub repositories, but a config was given; leave it out")
        with current(device):
            return Aria.random(path_or_repo_id, dtype=dtype, device=device)
    path = resolve(path_or_repo_id, revision=revision, allow_patterns=WEIGHT_PATTERNS)
    config = AriaConfig.from_pretrained(path if path.is_dir() else path.parent)
    with torch.device("meta"):
        model = Aria(config)
    with current(device):
        load_into(model, path, dtype=dtype, device=device, progress=progress)
    return model.eval()


def find_weights(path: Path) -> list[Path]:
    """The files of weights that a folder holds, or that a file or index stands for.

    Raises:
        FileNotFoundError: there are none, or shards of the index are missing.
        ValueError: they are pickles of torch, which are not read.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _indexed(path)
        if path.suffix in _UNSAFE:
            raise ValueError(_unsafe(path, [path.name]))
        return _fetched([path])
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {str(path)!r}; check the path")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (path / name).is_file():
            return find_weights(path / name)
    if shards := sorted(path.glob("model*.safetensors")):
        return _fetched(shards)
    for name in ("model_state.pdparams", "model_state.pdparams.index.json"):
        if (path / name).is_file():
            return find_weights(path / name)
    found = sorted(file.name for file in path.iterdir())
    if unsafe := [name for name in found if name.removesuffix(".index.json").endswith(_UNSAFE)]:
        raise ValueError(_unsafe(path, unsafe))
    raise FileNotFoundError(
        f"{path} has no weights: expected model.safetensors, model.safetensors.index.json with its shards, or "
        f"model_state.pdparams, but it has {names(found) or 'nothing'}"
    )


def _unsafe(path: Path, found: list[str]) -> str:
    return (
        f"{path}: {names(found, 3)} are pickles of torch, which may run code and are not read. Of the published ones, "
        "Aria-torchao-int8wo is quantized and model.pth is gpt-fast's; use the safetensors of rhymes-ai/Aria instead"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file."""
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of shards: {error}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} is not an index of shards: weight_map should give each tensor the name of a file")
    if strange := {file for file in weight_map.values() if Path(file).name != file or "\\" in file or file == ".."}:
        raise ValueError(f"{index} names files outside its folder: {names(sorted(f'{file:.100}' for file in strange))}")
    return weight_map


def read_index(path: Path) -> list[str]:
    """Names of the tensors in an index of shards, or in that of a folder; empty if there is no index."""
    indices = [path] if path.is_file() else sorted(path.glob("*.index.json"))
    return list(_weight_map(indices[0])) if indices and indices[0].name.endswith(".index.json") else []


def _indexed(index: Path) -> list[Path]:
    listed = sorted(dict.fromkeys(_weight_map(index).values()))
    if index.name.removesuffix(".index.json").endswith(_UNSAFE):
        raise ValueError(_unsafe(index, listed))
    if missing := [f"{name:.100}" for name in listed if not _is_file(index.parent / name)]:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(listed)} shards that its index lists: {names(missing)}; "
            "fetch them again"
        )
    if not listed:
        raise ValueError(f"{index} lists no weights")
    return _fetched([index.parent / name for name in listed])


def _is_file(path: Path) -> bool:
    """``path.is_file()``, also for names that are too long for the file system."""
    try:
        return path.is_file()
    except OSError:
        return False


def _fetched(files: list[Path]) -> list[Path]:
    """The same files, unless one is a pointer of Git LFS."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise FileNotFoundError(f"{file} is a pointer of Git LFS, not the weights; run git lfs pull there")
    return files


def _read_all(files: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if file.suffix not in (".safetensors", ".pdparams"):
            raise ValueError(f"{file} is of a kind that is not read; expected .safetensors or .pdparams")
        found = read_safetensors(file) if file.suffix == ".safetensors" else read_pdparams(file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise ValueError(f"{file} repeats tensors of another shard: {names(twice)}")
        tensors.update(found)
    return tensors


class _Job:
    """Rows of a stored tensor, and the view of a parameter that they fill."""

    __slots__ = ("nbytes", "out", "start", "stored")

    def __init__(self, out: Tensor, stored: StoredTensor, start: int):
        self.out, self.stored, self.start = out, stored, start
        self.nbytes = out.numel() * stored.dtype.itemsize

    @property
    def as_stored(self) -> bool:
        """Whether the bytes can be copied without conversion."""
        return self.out.is_contiguous() and self.out.dtype == self.stored.dtype


def _jobs(parameter: Tensor, piece: TensorPart, stored: StoredTensor) -> list[_Job]:
    view = parameter.detach()[piece.index]
    view = view.mT if piece.transposed else view
    if not stored.seekable:
        return [_Job(view, stored, 0)]
    if view.is_contiguous():
        view = view.view(-1)
    row_bytes = view[0].numel() * stored.dtype.itemsize
    rows = max(1, _CHUNK // row_bytes)
    return [_Job(part, stored, i * rows * row_bytes) for i, part in enumerate(view.split(rows))]


def _run(jobs: list[_Job], progress: Progress | None) -> None:
    """Run jobs with a few threads; reading and copying release the interpreter lock."""
    todo: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    total, done, lock = sum(job.nbytes for job in jobs), 0, threading.Lock()
    stop = threading.Event()

    def work() -> None:
        nonlocal done
        copier = _Copier()
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                copier.copy(job)
                with lock:
                    done += job.nbytes
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                stop.set()
                raise

    # More threads than cores hide the latency of the disk; more than eight are no faster on NVMe disks.
    workers = min(8, max(3, os.cpu_count() or 1), max(1, len(jobs)))
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()
    if any(job.out.is_cuda and not job.as_stored for job in jobs):
        # Conversion used memory of streams that no longer exist.
        torch.cuda.empty_cache()


class _Copier:
    """Copies from files to tensors in one thread, with its own buffer and, for CUDA, its own stream."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, job: _Job) -> None:
        device = job.out.device
        if device.type == "cpu" and job.as_stored and job.stored.seekable:
            job.stored.read(job.start, job.out.view(torch.uint8).numpy().data)
        elif device.type != "cuda":
            job.out.copy_(self.stage(job, pinned=False))
        else:
            with torch.cuda.stream(self.stream(device)):
                rows = self.stage(job, pinned=True)
                # Conversion and transposition run on the device; only this thread waits for them.
                job.out.copy_(rows if job.as_stored else rows.to(device, non_blocking=True), non_blocking=True)
                self.stream(device).synchronize()

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            # Queued work may still use the memory of the parameters.
            self.streams[device] = torch.cuda.Stream(device)
            self.streams[device].wait_stream(torch.cuda.current_stream(device))
        return self.streams[device]

    def stage(self, job: _Job, *, pinned: bool) -> Tensor:
        """The job's rows in host memory, as stored."""
        if not job.stored.seekable:
            return torch.frombuffer(job.stored.read_text(), dtype=job.stored.dtype).view(job.out.shape)
        if self.buffer is None or self.buffer.numel() < job.nbytes:
            self.buffer = torch.empty(max(job.nbytes, _CHUNK), dtype=torch.uint8, pin_memory=pinned)
        part = self.buffer[: job.nbytes]
        job.stored.read(job.start, part.numpy().data)
        return part.view(job.stored.dtype).view(job.out.shape)
