"""Host memory and disk space that checkpoints and the export take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from aria.wording import format_bytes as size


@dataclass(frozen=True)
class Storage:
    """Bytes, over all ranks unless stated otherwise.

    Attributes:
        checkpoint: One checkpoint: trained parameters, optimizer state, and averages.
        export: The adapter, or the whole model.
        keep: Number of checkpoints to keep.
        host: Peak memory of this host: the copy that a save makes of its ranks' state, or the exported weights.
        host_free: Free memory of this host.
        there: Checkpoints that the run's folder already holds.
        disk_free: Free space on the disk of the run's folder; None if the folder is unknown.
    """

    checkpoint: int
    export: int
    keep: int
    host: int
    host_free: int
    there: int = 0
    disk_free: int | None = None

    @classmethod
    def of(
        cls,
        *,
        checkpoint: float,
        export: float,
        gathered: float,
        pictures: float,
        keep: int,
        world: int,
        out: Path | None,
    ) -> Storage:
        """Measure what is free.

        Args:
            checkpoint, export, keep: See the attributes.
            gathered: Bytes that rank 0 gathers for the export.
            pictures: Bytes of a rank's cache of image tokens in host memory.
            world: World size; torchrun sets how many of the ranks are on this host.
            out: Folder of the run.
        """
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        host = max(checkpoint / world * here, gathered) + pictures * here
        there, free = 0, None
        if out is not None:
            there = sum(file.stat().st_size for file in out.glob("checkpoints/*/*") if file.is_file())
            exists = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
            free = shutil.disk_usage(exists).free
        return cls(round(checkpoint), round(export), keep, round(host), psutil.virtual_memory().available, there, free)

    @property
    def disk(self) -> int:
        """Disk space of a run: the kept checkpoints, the one being written, and the export."""
        return (self.keep + 1) * self.checkpoint + self.export

    def rows(self) -> Iterator[tuple[str, str]]:
        """Rows of a table."""
        yield "host, a save's copy", size(self.host)
        yield "host, free", size(self.host_free)
        yield f"disk, {self.keep + 1} checkpoints and export", size(self.disk)
        if self.disk_free is not None:
            yield "disk, free", size(self.disk_free + self.there)

    def warnings(self) -> Iterator[str]:
        """Warnings about what would fail hours later, with what helps."""
        if self.host > self.host_free:
            yield (
                f"a save copies {size(self.host)} of state into this host's memory, of which {size(self.host_free)} is "
                "free, and may end the run; optimizer.kind=adamw8bit or targets.method=lora need less"
            )
        if self.disk_free is not None and self.disk > self.disk_free + self.there:
            yield (
                f"{self.keep} checkpoints, one more being written, and the export take {size(self.disk)} on the "
                f"disk (a checkpoint {size(self.checkpoint)}, the export {size(self.export)}), and "
                f"{size(self.disk_free + self.there)} is free; free space, name another --out, or lower checkpoint.keep"
            )
