"""What checkpoints and the export take: memory of the host, into which a save copies the state, and disk space."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from aria.train.progress import size


@dataclass(frozen=True)
class Storage:
    """Bytes, of all ranks together where nothing else is said.

    Attributes:
        checkpoint: of one: what trains, the optimizer's state, and averages.
        export: of the adapter, or of the whole model.
        keep: checkpoints that stay.
        host: of this host's memory, at most: the copy that a save makes of its ranks' state, or what is exported.
        host_free: of this host's memory, now.
        there: of checkpoints that are in the run's folder already.
        disk_free: of the disk that the run's folder is on; None where the folder is not known.
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
            checkpoint, export, keep: see the attributes.
            gathered: bytes that the first rank gathers to export them.
            pictures: bytes of a rank's encoded pictures that are kept in the host's memory.
            world: ranks; torchrun says how many of them this host has.
            out: folder of the run.
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
        """What a run takes on the disk: the checkpoints that stay, the one that is being written, and the export."""
        return (self.keep + 1) * self.checkpoint + self.export

    def rows(self) -> Iterator[tuple[str, str]]:
        """For a table."""
        yield "host, a save's copy", size(self.host)
        yield "host, free", size(self.host_free)
        yield f"disk, {self.keep + 1} checkpoints and export", size(self.disk)
        if self.disk_free is not None:
            yield "disk, free", size(self.disk_free + self.there)

    def warnings(self) -> Iterator[str]:
        """What will fail hours later, with what helps."""
        if self.host > self.host_free:
            yield (
                f"a save copies {size(self.host)} of state into this host's memory, of which {size(self.host_free)} is "
                "free, and may end the run; optimizer.kind=adamw8bit or targets.method=lora make it smaller"
            )
        if self.disk_free is not None and self.disk > self.disk_free + self.there:
            yield (
                f"{self.keep} checkpoints, one more while it is written, and the export take {size(self.disk)} on the "
                f"disk (a checkpoint {size(self.checkpoint)}, the export {size(self.export)}), and "
                f"{size(self.disk_free + self.there)} is free; make room, name another --out, or lower checkpoint.keep"
            )
