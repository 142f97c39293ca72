"""The sandbox of worker processes, entered before reading untrusted input: memory, files, network, system calls.

Resource limits apply on every Unix. Landlock and seccomp are set up through the packages py-landlock and pyseccomp if
they are installed and the kernel supports them. Each missing part is reported by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

OPEN_FILES = 256
SCRATCH_BYTES = 64 << 20
"""Maximum size of a file in the scratch folder."""
_READABLE = ("/usr/share/fonts", "/usr/local/share/fonts", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/fonts")
"""System folders that decoders read: fonts for PDFs, and libraries loaded on first use."""
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
    """Irrevocably drop all permissions that workers do not need.

    Args:
        memory_bytes: Limit of the address space, on top of its present size.
        scratch: The only writable folder.

    Returns:
        The parts of the sandbox that are missing on this system, and why.
    """
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("limits of memory and open files", lambda: _limit(memory_bytes)),
        ("landlock (files and network)", lambda: _restrict_files(scratch)),
        ("seccomp (system calls)", _restrict_system_calls),
    )
    missing = []
    for name, step in steps:
        try:
            step()
        except Exception as error:  # each library has its own errors, and imports may fail
            missing.append(f"{name}: {str(error) or type(error).__name__}")
    return missing


def limit_cpu(seconds: float) -> None:
    """Limit the CPU time of the process, all threads together, from now on; the kernel kills it at the limit."""
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
        # If the machine runs out of memory anyway, the kernel should kill this process before its parent.
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

    # Without rules for ports, Landlock (version 4 and later) denies binding and connecting to any.
    rules = Landlock(strict=False)
    rules.allow_read(*_folders()).allow_read_write(scratch).apply()


def _folders() -> Iterator[Path]:
    """Folders of Python modules, libraries and fonts."""
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
        # Some system calls do not exist on every architecture.
        with contextlib.suppress(OSError):
            rules.add_rule(denied, name)
    # Threads may be started, processes may not. The flags of clone3 are in memory, where filters cannot read them; when
    # it fails with ENOSYS, the C library falls back to clone.
    rules.add_rule(denied, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    # Sending without an address uses the existing connection to the parent.
    rules.add_rule(denied, "sendto", pyseccomp.Arg(4, pyseccomp.NE, 0))
    # Signals only to its own threads.
    rules.add_rule(denied, "tgkill", pyseccomp.Arg(0, pyseccomp.NE, os.getpid()))
    rules.load()
