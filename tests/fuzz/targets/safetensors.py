"""Headers of safetensors files: rejected, or the bytes of all tensors lie in the file without gaps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from aria.checkpoint.stored import read_safetensors
from tests.fuzz.files import folder

WORDS = (
    '"dtype"',
    '"shape"',
    '"data_offsets"',
    '"BF16"',
    '"F32"',
    '"F64"',
    '"I8"',
    '"__metadata__"',
    "[",
    "]",
    "{}",
    "-1",
    "1e9",
    "null",
)
MEMORY = 64 << 20


def fuzz(data: bytes) -> None:
    file = folder("safetensors") / "model.safetensors"
    for content in {data, _with_length(data)}:
        file.write_bytes(content)
        try:
            tensors = read_safetensors(file)
        except ValueError as error:
            assert str(file) in str(error), f"an error that does not name the file: {error}"
            continue
        for name, tensor in tensors.items():
            [segment] = tensor.segments
            assert tensor.nbytes == segment.nbytes == math.prod(tensor.shape) * tensor.dtype.itemsize, name
            assert 8 <= segment.offset <= segment.offset + segment.nbytes <= len(content), name
            out = bytearray(tensor.nbytes)
            tensor.read(0, memoryview(out))
            assert bytes(out) == content[segment.offset : segment.offset + segment.nbytes]


def _with_length(data: bytes) -> bytes:
    """The same with the length of a header that ends with its last brace."""
    end = data.rfind(b"}") + 1
    return (end - 8).to_bytes(8, "little") + data[8:] if end > 8 else data


def seeds() -> Iterator[bytes]:
    for header, size in (
        ({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}, 8),
        (
            {
                "a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]},
                "b": {"dtype": "F64", "shape": [0], "data_offsets": [2, 2]},
            },
            2,
        ),
        ({}, 0),
    ):
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + bytes(size)
