"""Search for inputs that break the targets, each in a separate process, so that a crash does not end this one.

    python -m tests.fuzz.run                            every target, one minute each
    python -m tests.fuzz.run image clip --seconds 600   two of them, for longer
    python -m tests.fuzz.run image --replay FILE        replay one input, without a search

Inputs that reach new branches are kept in `build/fuzz/TARGET`, from where a later run resumes; those that find a
fault in `build/fuzz/findings`. The search is atheris' (`pip install 'aria-moe[fuzz]'`, for Linux on x86-64).
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.target import HERE, NAMES, load, regressions

ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "fuzz"
INPUT_SECONDS = 25
"""Of one input, on a machine that does other things too; beyond it the input is a finding."""
MAX_INPUT = 1 << 20
_LENGTH = 8
START_SECONDS = 120.0
SEARCH_BYTES = 1 << 30
"""Of address space for the search itself."""
WATCHED = ("aria", "tests.fuzz.targets", "PIL", "httpcore2", "jinja2")
"""Packages whose branches guide the search."""


def can_search() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def search(name: str, seconds: float, folder: Path = FOLDER) -> tuple[list[Path], str]:
    """Search in a child process.

    Args:
        name: of the target.
        seconds: after which it ends, if nothing was found.
        folder: of inputs and findings.

    Returns:
        Inputs that found a fault, and the last of what the child said; no inputs and no words where all is well.
    """
    findings = folder / "findings" / name
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    (folder / f"{name}.last").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--search", str(folder), "--seconds", str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = child.communicate(timeout=seconds + INPUT_SECONDS + START_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        output += b"\nit did not end"
    if child.returncode == 0:
        return [], ""
    found = sorted(set(findings.iterdir()) - before)
    if not found and (last := _last_input(folder / f"{name}.last")) is not None:  # it ended too suddenly to tell
        found = [findings / f"last-{hashlib.sha1(last).hexdigest()}"]
        found[0].write_bytes(last)
    lines = [
        line for line in output.decode(errors="replace").splitlines() if not line.startswith(("INFO:", "WARNING:"))
    ]
    return found, "\n".join([*lines, f"the search ended with status {child.returncode}"])[-6000:]


def _search(name: str, seconds: float, folder: Path) -> None:
    """The child: never returns."""
    import atheris

    with atheris.instrument_imports(include=list(WATCHED)):
        target = load(name)
    kept, seeds = folder / name, folder / "seeds" / name
    for place in (kept, seeds):
        place.mkdir(parents=True, exist_ok=True)
    inputs = [*target.seeds, *regressions(name).values()]
    for number, data in enumerate(inputs):
        (seeds / f"{number}").write_bytes(data)
    longest = max(target.longest, *map(len, inputs))
    assert longest <= MAX_INPUT
    options = [
        f"-max_total_time={seconds:.0f}",
        f"-timeout={INPUT_SECONDS}",
        f"-max_len={longest}",
        f"-artifact_prefix={folder / 'findings' / name}/",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    if target.words:
        words = folder / f"{name}.dict"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), encoding="ascii")
        options.append(f"-dict={words}")
    (folder / f"{name}.last").write_bytes(bytes(_LENGTH + MAX_INPUT))
    with (folder / f"{name}.last").open("r+b") as file:
        last = mmap.mmap(file.fileno(), 0)

    def kept_until_done(data: bytes) -> None:
        last[: _LENGTH + len(data)] = len(data).to_bytes(_LENGTH, "little") + data
        target(data)

    _limit(target.memory + SEARCH_BYTES)
    atheris.Setup([sys.argv[0], *options, str(kept), str(seeds)], kept_until_done)
    atheris.Fuzz()


def _last_input(file: Path) -> bytes | None:
    """What a child was trying when it ended; None where it never began."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(_LENGTH), "little"))


def _escaped(word: bytes) -> str:
    return "".join(chr(one) if 32 < one < 127 and one not in b'"\\' else f"\\x{one:02x}" for one in word)


def _limit(nbytes: int) -> None:
    import resource

    import psutil

    space = psutil.Process().memory_info().vms + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """The command line; its status is 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz what reads strangers' bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each target; default: 60")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="run these inputs and nothing else")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.targets or NAMES
    if unknown := [name for name in names if not (HERE / "targets" / f"{name}.py").is_file()]:
        parser.error(f"there is no target {unknown[0]!r}; there are {', '.join(NAMES)}")
    if arguments.replay:
        faulthandler.enable()
        for name in names:
            target = load(name)
            for file in arguments.replay:
                target(file.read_bytes())
        return 0
    if not can_search():
        print("nothing was fuzzed: atheris is not installed (pip install 'aria-moe[fuzz]', for Linux on x86-64)")
        return 0
    if arguments.search:
        _search(names[0], arguments.seconds, arguments.search)
    failed = 0
    for name in names:
        found, said = search(name, arguments.seconds)
        failed += bool(said)
        if said:
            print(said)
        print(f"{name}: {'FAILED ' + ' '.join(map(str, found)) if said else 'nothing found'}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
