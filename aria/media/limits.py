"""What media may cost and where they may come from: every limit of the door for media is a field here."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import ImageColor


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """Limits and permissions for pictures, clips and documents; the defaults suit a library on one's own machine.

    Limits on bytes hold for what comes into memory: bytes, data: URIs, what addresses send. Files are read in place.

    Raises:
        ValueError: a value out of its limits.
    """

    image_bytes: int = 64 << 20
    video_bytes: int = 1 << 30
    document_bytes: int = 256 << 20
    image_pixels: int = 120_000_000
    """A picture whose header announces more is refused before it is decoded (120 million are 360 MB as RGB)."""
    frame_pixels: int = 36_000_000
    """The same for the frames of a clip; 8K has 33 million."""
    page_pixels: int = 36_000_000
    """The same for a page as it is rendered; A0 has 32 million."""
    prompt_pixels: int = 1_000_000_000
    """Pixels of all pictures, frames and pages of one prompt together: they stay in memory until they are encoded, 3
    bytes each."""
    background: str | None = "white"
    """Colour behind the transparent pixels of images and clips, a name or ``#rrggbb``. None: their stored colours,
    often black, which is what transformers shows the model."""
    clip_seconds: float = 4 * 3600.0
    max_frames: int = 256
    """Most frames of one clip that a prompt may hold."""
    max_pages: int = 64
    """Most pages of one document that a prompt may hold."""
    cache_bytes: int = 512 << 20
    """Most bytes of frames and pages that are kept for the next question about the same clip or document; 0: none."""
    clip_decoder: str = "auto"
    """What decodes clips: ``cpu``, ``cuda:0`` (a GPU's video decoder; what that cannot read falls to the CPU), or
    ``auto``: the GPU that this process works on, where it does and the driver lets it."""
    decode_timeout: float = 300.0
    """Seconds that reading one clip or document may take."""
    connect_timeout: float = 10.0
    """Seconds until an address has to take a connection."""
    read_timeout: float = 10.0
    """Seconds without a byte after which an address is given up."""
    total_timeout: float = 120.0
    """Seconds after which an address is given up, however slowly it keeps sending."""
    max_redirects: int = 5
    local_folders: tuple[Path, ...] | None = None
    """Folders under which files may be read; None: anywhere, (): nowhere. Links are followed before this is decided."""
    private_addresses: bool = False
    """Whether addresses may lead to this machine, the local network, or any other place that is not public."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("max_redirects", "cache_bytes"):
                if value < 0:
                    raise ValueError(f"{field.name} is {value}; expected 0 or more")
            elif field.name == "clip_decoder":
                if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
                    raise ValueError(f"clip_decoder is {value!r}; expected auto, cpu, cuda or cuda:N")
            elif field.name == "background":
                if value is not None and not _is_color(value):
                    raise ValueError(f'background is {value!r}; expected a colour such as "white" or "#fff", or None')
            elif field.name not in ("local_folders", "private_addresses") and not value > 0:
                raise ValueError(f"{field.name} is {value}; expected more than 0")
        if isinstance(self.local_folders, str | Path):
            raise ValueError(f"local_folders is {str(self.local_folders)!r}; expected a tuple of folders")
        if self.local_folders is not None:
            object.__setattr__(self, "local_folders", tuple(Path(folder) for folder in self.local_folders))


def _is_color(value: object) -> bool:
    try:
        return len(ImageColor.getrgb(value)) == 3  # type: ignore[arg-type]  # anything but a str is an error below
    except (ValueError, AttributeError, TypeError):
        return False


class PixelBudget:
    """What the pictures, frames and pages of one prompt may take together; several threads may spend it."""

    def __init__(self, pixels: int):
        self._whole = self._left = pixels
        self._lock = threading.Lock()

    def spend(self, pixels: int) -> None:
        """Take pixels from what is left.

        Raises:
            ValueError: there are not so many left.
        """
        with self._lock:
            self._left -= pixels
            if self._left < 0:
                raise ValueError(
                    f"the pictures, frames and pages of one prompt have more than the {self._whole:,} pixels that are "
                    "allowed together; send fewer or smaller ones"
                )


def short(source: str) -> str:
    """An address or path for a message: quoted, and not longer than a line."""
    return repr(source if len(source) <= 100 else source[:80] + "...")
