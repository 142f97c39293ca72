"""PaddlePaddle's pickles, parsed without executing them: rejected, or the bytes of every array lie in the file. Nothing
that they name is ever called."""

from __future__ import annotations

import collections
import math
import os
import pickle
from collections.abc import Iterator

import numpy as np

from aria.checkpoint.paddle import read_pdparams
from tests.fuzz.files import folder

WORDS = (
    *(
        "cbuiltins\neval\n",
        "cposix\nsystem\n",
        "cnumpy\ndtype\n",
        "cnumpy\nndarray\n",
        "c_codecs\nencode\n",
        "\x80\x04",
    ),
    *(
        "numpy.core.multiarray",
        "_reconstruct",
        "UnpackBigParamInfor@@",
        "OriginShape",
        "slices",
        "latin1",
        "R.",
        "b.",
        "(",
    ),
)
MEMORY = 128 << 20
MAX_READ = 1 << 20


def fuzz(data: bytes) -> None:
    file = folder("pdparams") / "model_state.pdparams"
    file.write_bytes(data)
    try:
        tensors = read_pdparams(file)
    except ValueError as error:
        assert str(file) in str(error), f"an error that does not name the file: {error}"
        assert len(str(error)) < 2000, "a message as long as the file"
        return
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        assert tensor.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize
        for segment in tensor.segments:
            assert 0 <= segment.offset <= segment.offset + segment.nbytes <= len(data), name
        if tensor.nbytes > MAX_READ:
            continue
        try:
            if tensor.seekable:
                tensor.read(0, memoryview(bytearray(tensor.nbytes)))
            else:
                assert len(tensor.read_text()) == tensor.nbytes
        except ValueError:
            continue


class _Runs:
    """Pickles as a call that would leave a trace."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(folder("pdparams") / "it-ran"),)


def seeds() -> Iterator[bytes]:
    arrays = {"a": np.arange(4, dtype=np.float32).reshape(2, 2), "b": np.arange(3, dtype=np.uint16)}
    sliced = {"c@@.0": arrays["b"], "UnpackBigParamInfor@@": {"c": {"OriginShape": (3, 1), "slices": ["c@@.0"]}}}
    for protocol in (2, 3, 4):
        yield pickle.dumps({**arrays, **sliced}, protocol=protocol)
    yield pickle.dumps(collections.OrderedDict(a=("name", arrays["a"])), protocol=2)
    yield pickle.dumps({"a": _Runs()}, protocol=4)
