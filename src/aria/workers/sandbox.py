"""What a worker process gives up for good before it reads anything of a stranger's: memory, files, network, programs.

Resource limits hold on every Unix. Landlock and seccomp are asked for through the packages py-landlock and pyseccomp,
where they are installed and the kernel has them; each part that is missing is reported by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

OPEN_FILES = 256
SCRATCH_BYTES = 64 << 20
"""Of one file in the scratch folder."""
_READABLE = ("/usr/share/fonts", "/usr/local/share/fonts", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/fonts")
"""Folders of the system that decoders read: fonts of PDFs, and libraries that are loaded when they are first needed."""
_DENIED = (
    *("socket", "connect", "bind", "listen", "accept", "accept4"),
    *("execve", "execveat", "fork", "vfork"),
    *("kill", "tkill", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd"),
    *("pidfd_send_signal", "kcmp", "mount", "umount2", "move_mount", "open_tree", "fsopen", "pivot_root", "chroot"),
    *("unshare", "setns", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "keyctl", "add_key"),
    *("request_key", "init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon", "swapoff"),
    *("personality", "quotactl", "acct", "shmget", "semget", "msgget", "mq_open"),
)
_CLONE_THREAD = 0x00010000


def enter_sandbox(memory_bytes: int, scratch: Path) -> list[str]:
    """Give up all that decoding does not need.

    Args:
        memory_bytes: of address space, beyond what the process has now.
        scratch: the only folder where files may be written.

    Returns:
        What could not be given up here, and why.
    """
    steps = (
        ("limits of memory and open files", lambda: _limit(memory_bytes)),
        ("landlock (files and network)", lambda: _restrict_files(scratch)),
        ("seccomp (system calls)", _restrict_system_calls),
    )
    missing = []
    for name, step in steps:
        try:
            step()
        except Exception as error:  # each library has errors of its own, and import errors count too
            missing.append(f"{name}: {str(error) or type(error).__name__}")
    return missing


def limit_cpu(seconds: float) -> None:
    """Let the process use so many seconds of CPU time from now on, over all of its threads; then it is killed."""
    if os.name != "posix":
        return
    import resource

    used = sum(os.times()[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, hard))


def _limit(memory_bytes: int) -> None:
    if os.name != "posix":
        raise OSError(f"{sys.platform} has none")
    import resource

    with contextlib.suppress(OSError):
        # If the machine runs out of memory all the same, this process goes before the one that it works for.
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (SCRATCH_BYTES, SCRATCH_BYTES))
    if sys.platform == "darwin":
        raise OSError("macOS does not limit address space")
    space = psutil.Process().memory_info().vms + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    space = space if hard == resource.RLIM_INFINITY else min(space, hard)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))


def _restrict_files(scratch: Path) -> None:
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has none")
    from py_landlock import Landlock

    # No rule about ports: none may be bound or connected to, from the kernel's fourth version of Landlock on.
    rules = Landlock(strict=False)
    rules.allow_read(*_folders()).allow_read_write(scratch).apply()


def _folders() -> Iterator[Path]:
    """Where modules and libraries are loaded from, and fonts."""
    candidates = [*sys.path, sys.prefix, sys.base_prefix, *_READABLE]
    for folder in {Path(one).resolve() for one in candidates if one}:
        if folder.exists() and folder != Path("/"):
            yield folder


def _restrict_system_calls() -> None:
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has none")
    import pyseccomp

    denied = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in _DENIED:
        # Some do not exist on every architecture.
        with contextlib.suppress(OSError):
            rules.add_rule(denied, name)
    # Threads may be started, processes may not. What clone3 is to start lies in memory, where no filter sees it; the C
    # library falls back on clone.
    rules.add_rule(denied, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    # Sending without an address goes to the parent.
    rules.add_rule(denied, "sendto", pyseccomp.Arg(4, pyseccomp.NE, 0))
    # Signals to its own threads alone.
    rules.add_rule(denied, "tgkill", pyseccomp.Arg(0, pyseccomp.NE, os.getpid()))
    rules.load()
