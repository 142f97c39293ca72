"""Paddle's pickles: every form that paddle.save writes is read, nothing is executed, all else is refused."""

from __future__ import annotations

import collections
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from aria.checkpoint import paddle, pickles
from aria.checkpoint.paddle import read_pdparams
from aria.checkpoint.stored import StoredTensor


def arrays() -> dict[str, np.ndarray]:
    random_bits = np.random.default_rng(0).integers(0, 2**16, (70, 500), dtype=np.uint16)
    return {
        "bits": random_bits,
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "single": np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 8, 8),
        "double": np.array([np.pi]),
        "short": np.frombuffer(b"ab", dtype=np.uint16),
    }


INTERNAL = {"StructuredToParameterName@@": {"bits": "linear_0.w_0", "half": "linear_0.b_0"}}


def value(stored: StoredTensor) -> torch.Tensor:
    """Read all of a tensor, the way its form allows."""
    data = stored.read_text() if not stored.seekable else bytearray(stored.nbytes)
    if stored.seekable:
        stored.read(0, memoryview(data))
    return torch.frombuffer(data, dtype=stored.dtype).view(stored.shape)


def check(found: dict[str, StoredTensor], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        tensor = value(found[key])
        # Bits, not numbers: uint16 stands for bfloat16.
        same = tensor.view(torch.uint16).numpy() if array.dtype == np.uint16 else tensor.numpy()
        assert same.dtype == array.dtype and np.array_equal(same, array), key


def write(content, folder, protocol=4):
    file = folder / "model_state.pdparams"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return file


@pytest.mark.parametrize("pickler", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_state_dictionary_of_any_protocol(protocol, pickler, tmp_path):
    file = write(pickler({**arrays(), **INTERNAL}, protocol=protocol), tmp_path)
    found = read_pdparams(file)
    check(found, arrays())
    assert found["bits"].dtype == torch.bfloat16 and found["bits"].shape == (70, 500)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pairs_of_internal_name_and_array(protocol, tmp_path):
    class Pair:
        """Pickles as a call of `tuple`, as Paddle's tensors do."""

        def __init__(self, array):
            self.array = array

        def __reduce__(self):
            return tuple, (("linear_0.w_0", self.array),)

    check(read_pdparams(write({k: Pair(v) for k, v in arrays().items()}, tmp_path, protocol)), arrays())
    check(read_pdparams(write({k: ("name", v) for k, v in arrays().items()}, tmp_path, protocol)), arrays())


@pytest.mark.parametrize("protocol", [2, 3])
def test_sliced_arrays_are_put_together(protocol, tmp_path):
    whole = arrays()
    flat = whole.pop("bits").ravel()
    parts = {f"bits@@.{i}": part for i, part in enumerate(np.array_split(flat, 4))}
    info = {"UnpackBigParamInfor@@": {"bits": {"OriginShape": (70, 500), "slices": list(parts)}}}
    file = write({**whole, **parts, **info, **INTERNAL}, tmp_path, protocol)
    found = read_pdparams(file)
    check(found, arrays())
    if protocol == 3:
        out = bytearray(20_000)
        found["bits"].read(30_001, memoryview(out))
        assert bytes(out) == flat.tobytes()[30_001:50_001]


def test_slices_that_do_not_add_up_are_refused(tmp_path):
    info = {"UnpackBigParamInfor@@": {"bits": {"OriginShape": (7, 3), "slices": ["bits@@.0"]}}}
    with pytest.raises(ValueError, match="slices of bits that do not add up"):
        read_pdparams(write({"bits@@.0": np.zeros(20, np.uint16), **info}, tmp_path))


def test_arrays_of_numpy_1_and_ordered_dictionaries(tmp_path):
    content = pickle.dumps(collections.OrderedDict(arrays()), protocol=2)
    assert b"numpy._core.multiarray" in content
    check(read_pdparams(write(content.replace(b"numpy._core.", b"numpy.core."), tmp_path)), arrays())


def test_arrays_stay_in_the_file(tmp_path, monkeypatch):
    taken = 0
    take = pickles.Machine.take

    def count(machine, size):
        nonlocal taken
        taken += size
        return take(machine, size)

    monkeypatch.setattr(pickles.Machine, "take", count)
    for protocol in (2, 3, 4):
        read_pdparams(write({f"layer.{i}": np.zeros((512, 1024), np.uint16) for i in range(8)}, tmp_path, protocol))
    assert taken < 10_000


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.mkdir, r"a call of '(posix|nt)\.mkdir'"),
        (eval, r"a call of '(builtins|__builtin__)\.eval'"),
        (np.memmap, r"a call of 'numpy\.memmap'"),
        (getattr, r"getattr'"),
    ],
)
def test_nothing_is_called(function, named, protocol, tmp_path):
    victim = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(victim)!r})" if function is eval else str(victim)
    for content in (
        {"x": Call(function, argument)},
        [Call(function, argument)],
        {"a": np.zeros(3), "b": (Call(function, argument),)},
    ):
        with pytest.raises(ValueError, match=named + r", which a file of its kind has no need of; nothing was run"):
            read_pdparams(write(content, tmp_path, protocol))
    assert not victim.exists()


def test_operations_that_make_objects_are_refused(tmp_path):
    for content, named in (
        (b"\x80\x02(S'true'\nios\nsystem\n.", "STRING"),
        (b"\x80\x02(\x8c\x04trueios\nsystem\n.", "INST"),
        (b"\x80\x02cnumpy\nndarray\n(o.", "OBJ"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
    ):
        with pytest.raises(ValueError, match=f"the pickle operation {named}"):
            read_pdparams(write(content, tmp_path))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([np.zeros(3)], "a list at its top"),
        ({"x": 3}, "x that is not an array"),
        ({"x": {"y": np.zeros(3)}}, "x that is not an array"),
        ({"x": np.zeros(3, np.int64)}, "x as numpy 'i8'"),
        ({"x": np.zeros(3, ">f4")}, "byte order '>'"),
        ({"x": np.zeros(3, [("a", "f4")])}, "x as numpy 'V4'"),
        ({"x": np.zeros((3, 4)).T}, "a column-major array"),
        ({3: np.zeros(3)}, "an entry that has no name"),
    ],
)
def test_other_contents_are_refused_by_name(content, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        read_pdparams(write(content, tmp_path))


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "model_state.pdparams"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x")
    for content in (file.read_bytes(), b"", b"hello", pickle.dumps(arrays(), protocol=5), pickle.dumps({}, protocol=0)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model_state\.pdparams is not a PaddlePaddle checkpoint"):
            read_pdparams(file)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_truncated_file_is_an_error_wherever_it_ends(protocol, tmp_path):
    content = pickle.dumps({"a": np.arange(9.0), "b": np.zeros((2, 2), np.uint16), **INTERNAL}, protocol=protocol)
    for size in range(len(content)):
        with pytest.raises(ValueError, match=r"model_state\.pdparams is not a PaddlePaddle checkpoint"):
            read_pdparams(write(content[:size], tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_random_damage_is_a_clear_error_or_harmless(protocol, tmp_path):
    """Whatever the bytes, the outcome is tensors inside the file or a ValueError that names it."""
    content = pickle.dumps({"a": np.arange(9.0), "b": np.zeros((2, 2), np.uint16), **INTERNAL}, protocol=protocol)
    chance = random.Random(protocol)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(2, len(damaged))
            action = chance.random()
            if action < 0.6:
                damaged[at] = chance.randrange(256)
            elif action < 0.8:
                del damaged[at : at + chance.randrange(1, 9)]
            else:
                damaged[at:at] = chance.randbytes(chance.randrange(1, 9))
        file = write(bytes(damaged), tmp_path)
        try:
            for tensor in read_pdparams(file).values():
                value(tensor)
        except ValueError as error:
            assert "model_state.pdparams is" in str(error)
            refused += 1
    assert refused > 300


MANY = b"(" + b"K\x01" * 100_000
"""Numbers since a mark."""
BOMBS = {
    # Each of a few bytes would make another copy of all numbers.
    "copies of a tuple": (
        b"]" + MANY + b"eq\x00cbuiltins\ntuple\nq\x01" + b"h\x01h\x00\x85R" * 10_000 + b".",
        "a tuple made",
    ),
    "copies of a dictionary": (
        b"}q\x00ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 10_000 + b".",
        "it is corrupt",
    ),
    # Hashing it takes a frame of C for each level.
    "tuples in tuples as a key": (
        b"ccollections\nOrderedDict\n)" + b"\x85" * 300_000 + b"K\x01\x86\x85\x85R.",
        "corrupt",
    ),
    "tuples in tuples as a name": (b"})" + b"\x85" * 300_000 + b"K\x01s.", "an entry that has no name"),
    "tuples in tuples as a slice": (
        b"}\x8c\x15UnpackBigParamInfor@@}\x8c\x01a}(\x8c\x06slices])"
        + b"\x85" * 300_000
        + b"a\x8c\x0bOriginShape)uss.",
        "slices of a that do not add up",
    ),
    "a number without end": (b"\x8a\xff" + b"\x7f" * 255 + b".", "a whole number of 255 bytes"),
    "a text without end": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", "an end before its contents are complete"),
    "a memo far off": (b"}r\xff\xff\xff\x7f\x8c\x01aK\x01s.", "a that is not an array"),
    "an array without a state": (
        b"}\x8c\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x8c\x01b\x87Rs.",
        "a without its shape, dtype and bytes",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_all_memory_or_crash_is_refused(name, tmp_path):
    content, message = BOMBS[name]
    with pytest.raises(ValueError, match=message) as refused:
        read_pdparams(write(b"\x80\x04" + content, tmp_path))
    assert len(str(refused.value)) < 500


def test_operations_and_names_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(paddle, "_MOST_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 operations"):
        read_pdparams(write(b"\x80\x04" + b"]" * 1000 + b".", tmp_path))
    monkeypatch.setattr(pickles, "_MOST_TEXT", 1000)
    with pytest.raises(ValueError, match="names of more than 1,000 bytes"):
        read_pdparams(write({"a": "b" * 1000}, tmp_path))
