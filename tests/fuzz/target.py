"""A fuzz target as described by its module, with the checks common to all."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(file.stem for file in (HERE / "targets").glob("[!_]*.py"))


@dataclass(frozen=True)
class Target:
    """What is fuzzed, and from what on."""

    name: str
    fuzz: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]
    longest: int
    memory: int

    def __call__(self, data: bytes) -> None:
        """One input.

        Raises:
            AssertionError: it took more memory than the target allows, or whatever the target asserts does not hold.
        """
        before = _peak()
        self.fuzz(data)
        grown = _peak() - before
        assert grown <= self.memory, f"{len(data):,} bytes of input took {grown:,} of memory"


def load(name: str) -> Target:
    """The target of a module; it is imported here, and aria with it."""
    module = importlib.import_module(f"tests.fuzz.targets.{name}")
    module.fuzz(b"")  # what is loaded for the first input is not the input's
    words = getattr(module, "WORDS", ())
    return Target(
        name,
        module.fuzz,
        tuple(module.seeds()),
        tuple(word.encode("utf-8", "surrogatepass") if isinstance(word, str) else word for word in words),
        getattr(module, "LONGEST", 4096),
        getattr(module, "MEMORY", 256 << 20),
    )


def regressions(name: str) -> dict[str, bytes]:
    """Inputs that once found a fault, by the names of their files."""
    return {file.name: file.read_bytes() for file in sorted((HERE / "corpus" / name).glob("*"))}


def _peak() -> int:
    """Most bytes that this process ever had in memory; it never falls, so that growth is of one input."""
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # rusage would start with the peak of the parent process
        return int(re.search(rb"VmHWM:\s*(\d+)", Path("/proc/self/status").read_bytes())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
