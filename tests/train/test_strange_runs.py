"""Untrusted checkpoints: nothing in them is executed, and anything unusual is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aria.train import stored
from aria.train.rng import random_states, restore_random_states
from aria.train.state import RunState, trained_weights
from aria.train.stored import read_value, write_value
from tests.helpers.saved_run import Run, state_of


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of step 1, in the folder of a run."""
    run, state = Run(), state_of(tmp_path / "run")
    run.step()
    state.save(run, wait=True)
    state.close()
    return tmp_path / "run" / "checkpoints" / "step-00000001"


def resume(checkpoint: Path) -> Run:
    run = Run(seed=3)
    state_of(checkpoint.parents[1]).load(run)
    return run


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def deflated(archive: bytes) -> bytes:
    """The same archive of torch, compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as read, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as write:
        for info in read.infolist():
            write.writestr(info.filename, read.read(info))
    return out.getvalue()


def read_metadata(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def write_metadata(checkpoint: Path, metadata: Any, protocol: int = 4) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))


def replace_entry(checkpoint: Path, name: str, content: bytes) -> None:
    """Have the bytes of one entry of the checkpoint come from a file of their own."""
    metadata = read_metadata(checkpoint)
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path, place.offset, place.length = "__0_7.distcp", 0, len(content)
    (checkpoint / "__0_7.distcp").write_bytes(content)
    write_metadata(checkpoint, metadata)


def spoil(checkpoint: Path, place: str, evil: Call) -> None:
    if place == "rank file":
        (checkpoint / "rank-0.pt").write_bytes(saved({"stream": evil, "random": torch.get_rng_state()}))
    elif place == "rank file, a plain pickle":
        (checkpoint / "rank-0.pt").write_bytes(pickle.dumps(evil))
    elif place == "rank file, before archives":
        torch.save({"stream": evil}, checkpoint / "rank-0.pt", _use_new_zipfile_serialization=False)
    elif place == "metadata":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(evil))
    elif place == "within metadata":
        metadata = read_metadata(checkpoint)
        metadata.planner_data = evil
        write_metadata(checkpoint, metadata)
    elif place == "value":
        replace_entry(checkpoint, "position.step", saved(evil))
    elif place == "tensor":
        replace_entry(checkpoint, "weights.0.weight", saved(evil))
    else:
        metadata = read_metadata(checkpoint)
        metadata.storage_data[next(iter(metadata.storage_data))] = evil
        write_metadata(checkpoint, metadata, protocol=2)


PLACES = (
    "rank file", "rank file, a plain pickle", "rank file, before archives", "metadata", "within metadata", "value",
    "tensor", "place of a tensor",
)  # fmt: skip


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr])
@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_a_checkpoint_is_executed(checkpoint: Path, tmp_path: Path, place: str, function: Any) -> None:
    victim = tmp_path / "made"
    arguments = {eval: (f"__import__('os').mkdir({str(victim)!r})",), getattr: ("", "upper")}.get(
        function, (str(victim),)
    )
    spoil(checkpoint, place, Call(function, *arguments))
    with pytest.raises(ValueError, match=r"step-00000001 cannot be read: ") as refused:
        resume(checkpoint)
    assert not victim.exists()
    if "archives" not in place and "plain" not in place:
        assert function.__name__ in str(refused.value) and "nothing was run" in str(refused.value)
    # Its weights alone are read by the export of a run.
    if "rank" in place or place == "value":
        assert trained_weights(checkpoint).keys() == {"0.weight", "1.weight", "1.bias"}
    else:
        with pytest.raises(ValueError, match="cannot be read"):
            trained_weights(checkpoint)
    assert not victim.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_descriptions_of_every_protocol_are_read(checkpoint: Path, protocol: int) -> None:
    """Python 3.14 writes 5."""
    write_metadata(checkpoint, read_metadata(checkpoint), protocol)
    assert resume(checkpoint).position.step == 1


def test_checkpoints_of_earlier_versions_still_resume(checkpoint: Path) -> None:
    """They have NumPy's random numbers as an array."""
    states = {**random_states(), "numpy": np.random.get_state()}
    assert isinstance(states["numpy"][1], np.ndarray)
    (checkpoint / "rank-0.pt").write_bytes(saved({"stream": {"asked": 7}, "random": states}))
    found = read_value(checkpoint / "rank-0.pt", "rank-0.pt")
    expected = random.random(), np.random.random(), torch.rand(1)
    restore_random_states(found["random"])
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert found["random"]["numpy"] == random_states_of(states["numpy"]) and found["stream"] == {"asked": 7}


def random_states_of(state: Any) -> tuple[Any, ...]:
    kind, keys, *rest = state
    return (kind, keys.tolist(), *rest)


def test_random_numbers_are_saved_without_arrays_and_come_back(tmp_path: Path) -> None:
    states = random_states()
    write_value(states, tmp_path / "rank-0.pt")
    expected = [np.random.random() for _ in range(700)]
    restore_random_states(read_value(tmp_path / "rank-0.pt", "rank-0.pt"))
    assert [np.random.random() for _ in range(700)] == expected


@pytest.mark.parametrize("position", [-1, 625, 10**9])
def test_numpy_does_not_read_beyond_its_state(position: int) -> None:
    """It checks nothing, and would read other memory."""
    states = random_states()
    kind, keys, _, *rest = states["numpy"]
    with pytest.raises(ValueError, match=f"generator is at {position} of 624"):
        restore_random_states({**states, "numpy": (kind, keys, position, *rest)})


def change(checkpoint: Path, how: str) -> None:
    metadata = read_metadata(checkpoint)
    name = "weights.0.weight"
    entry = metadata.state_dict_metadata[name]
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
    if how == "file outside":
        place.relative_path = "../../../secret.distcp"
    elif how == "absolute file":
        place.relative_path = str(checkpoint / "__0_0.distcp")
    elif how == "compressed":
        place.transform_descriptors = ["zstd"]
    elif how == "negative":
        place.offset = -8
    elif how == "no tensor":
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata["position.step"]
    elif how == "no value":
        metadata.state_dict_metadata["position.step"] = entry
    elif how == "sizes":
        entry.chunks[0].sizes = torch.Size([16] * 17)
    else:
        assert how == "list"
        metadata.state_dict_metadata = ["weights.0.weight"]
    write_metadata(checkpoint, metadata)


@pytest.mark.parametrize(("how", "message"), [
    ("file outside", r"tensors in the file '\.\./\.\./\.\./secret\.distcp'; expected names such as __0_0\.distcp"),
    ("absolute file", "tensors in the file '/.*' expected|tensors in the file "),
    ("compressed", "tensors that are compressed"),
    ("negative", "the size -8"),
    ("no tensor", r"has weights\.0\.weight of None, not torch\.Size\(\[16, 8\]\)"),
    ("no value", r"has position\.step of \(16, 8\), not None"),
    ("sizes", "a shape that is none"),
    ("list", "no whole description of its tensors"),
])  # fmt: skip
def test_odd_descriptions_are_refused(checkpoint: Path, how: str, message: str) -> None:
    change(checkpoint, how)
    with pytest.raises(ValueError, match=message):
        resume(checkpoint)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("position.step", "1", r"position\.step is '1'; expected int"),
    ("position.step", [1], r"position\.step is \[1\]; expected int"),
    ("optimizer.kind", 3, r"optimizer\.kind is 3; expected str"),
])  # fmt: skip
def test_values_of_other_types_are_refused(checkpoint: Path, name: str, value: Any, message: str) -> None:
    replace_entry(checkpoint, name, saved(value))
    with pytest.raises(ValueError, match=message):
        resume(checkpoint)


@pytest.mark.parametrize(("field", "value"), [("world", 0), ("world", "2"), ("step", True), ("data_world", 1.5)])
def test_bad_numbers_in_the_description_of_a_run(checkpoint: Path, field: str, value: Any) -> None:
    file = checkpoint / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"run.json has the {field} {value!r}; expected a whole number"):
        resume(checkpoint)


def test_archives_that_grow_are_refused(checkpoint: Path) -> None:
    zeros = saved({"stream": {"asked": torch.zeros(1 << 20)}, "random": torch.get_rng_state()})
    before = (checkpoint / "rank-0.pt").read_bytes()
    for content in (deflated(zeros), deflated(before)):
        (checkpoint / "rank-0.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"rank-0\.pt is compressed, which torch\.save never does"):
            resume(checkpoint)
    (checkpoint / "rank-0.pt").write_bytes(before)
    replace_entry(checkpoint, "weights.0.weight", deflated(saved(torch.zeros(16, 8, dtype=torch.bfloat16))))
    for read in (resume, trained_weights):
        with pytest.raises(ValueError, match=r"__0_7\.distcp is compressed"):
            read(checkpoint)


def test_weights_larger_than_their_files_are_refused(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint)
    metadata.state_dict_metadata["weights.0.weight"].size = torch.Size([1 << 24, 1 << 20])
    write_metadata(checkpoint, metadata)
    with pytest.raises(ValueError, match=r"its weights would have 35,184,372,08.,... bytes, its files have"):
        trained_weights(checkpoint)


def test_descriptions_have_a_limit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_MOST_STEPS", 1000)
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + b"]" * 5000 + b".")
    with pytest.raises(ValueError, match=r"\.metadata has more than 1,000 operations"):
        resume(checkpoint)


def test_a_stream_state_that_could_not_be_read_again_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"plain values and tensors, but its result could not be read again: rank-0\.pt asks for"
    ):
        write_value({"stream": Call(os.mkdir, str(tmp_path / "made"))}, tmp_path / "rank-0.pt")
    assert not list(tmp_path.iterdir())


def test_only_exact_names_are_checkpoints(checkpoint: Path) -> None:
    """A copy that somebody kept is neither the newest checkpoint nor cleaned away."""
    out = checkpoint.parents[1]
    copies = (
        "step-00000009.bak",
        "step-00000009 copy",
        "step-٠٠٠٠٠٠٠٩",
        "step-9",
        "step-00000009.partial.bak",
        "my.partial",
    )
    for name in copies:
        shutil.copytree(checkpoint, checkpoint.parent / name)
    (checkpoint.parent / "step-00000008").write_text("no folder")
    (checkpoint.parent / "step-00000007.partial").mkdir()
    assert RunState.latest_in(out) == checkpoint
    said: list[str] = []
    run, state = Run(), state_of(out, keep=1)
    state._report = said.append
    assert state.load(run)["folder"] == checkpoint
    assert len(said) == 1 and said[0].startswith("step-00000001 is loaded; ") and "step-00000009.bak" in said[0]
    for _ in range(2):
        run.step()
        state.save(run, wait=True)
    state.close()
    assert {path.name for path in checkpoint.parent.iterdir()} == {*copies, "step-00000003", "step-00000008"}
    # Beyond eight digits, names are no longer in the order of steps.
    shutil.copytree(state.latest(), checkpoint.parent / "step-100000000")
    assert RunState.latest_in(out).name == "step-100000000"
