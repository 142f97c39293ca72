"""The register of hostile media: each maker gives the bytes of one file, the same for the same seed."""

from __future__ import annotations

import importlib
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

KINDS = ("image", "video", "document")
Make = Callable[..., bytes]


class Medium(NamedTuple):
    """One kind of hostile file."""

    name: str
    """``maker`` or ``maker-variant``."""
    kind: str
    """What it is sent as, one of :data:`KINDS`."""
    make: Make
    arguments: tuple[object, ...]
    refused: bool
    """Nothing of it may be shown: the answer has to be an error. Others may be read, in whole or in part."""
    heavy: bool
    """Of many megabytes, or of many seconds of work before a deadline ends it."""

    def bytes(self, seed: int = 0) -> bytes:
        """The file; most differ with the seed."""
        return self.make(random.Random(f"{self.name} {seed}"), *self.arguments)


_CATALOG: dict[str, Medium] = {}


def _spelled(argument: object) -> str:
    if isinstance(argument, bytes):
        return argument.decode() if argument.isalnum() else argument.hex()
    return str(argument)


def register(
    kind: str, *variants: object, refused: bool = False, heavy: bool = False, also: tuple[str, ...] = ()
) -> Callable[[Make], Make]:
    """Decorate a maker.

    Args:
        kind: what it is sent as.
        variants: arguments beyond the random numbers, a tuple or a single one for each kind of file; none: one kind.
        refused: as in :class:`Medium`.
        heavy: as in :class:`Medium`.
        also: further kinds that it is sent as.
    """

    def decorate(make: Make) -> Make:
        for one in (kind, *also):
            for variant in variants or ((),):
                arguments = variant if isinstance(variant, tuple) else (variant,)
                tail = "-".join(map(_spelled, arguments))
                name = "/".join((one, f"{make.__name__}-{tail}" if tail else make.__name__))
                assert name not in _CATALOG, name
                _CATALOG[name] = Medium(name, one, make, arguments, refused, heavy)
        return make

    return decorate


def catalog() -> dict[str, Medium]:
    """All hostile media by name."""
    for module in ("pictures", "rasters", "clips", "containers", "documents", "drawings"):
        importlib.import_module(f"tests.hostile.bad_{module}")  # each fills the register
    return dict(_CATALOG)


def kept(medium: Medium, seed: int, folder: Path) -> bytes:
    """The file, made once for all that share a folder."""
    path = folder / f"{medium.name.replace('/', '-')}-{seed}"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(medium.bytes(seed))
        part.replace(path)
    return path.read_bytes()


# What several makers are built from


@lru_cache
def _block(size: int) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15)
    return deflate.compress(bytes(size)) + deflate.flush(zlib.Z_FULL_FLUSH)


def zeros(size: int) -> bytes:
    """A zlib stream of so many zeros, a thousandth of their size, made without compressing them all."""
    whole, rest = divmod(size, 1 << 20)
    checksum = (size % 65521) << 16 | 1
    return b"\x78\x9c" + _block(1 << 20) * whole + _block(rest) + b"\x03\x00" + struct.pack(">I", checksum)


def repeated(block: bytes, times: int) -> bytes:
    """A zlib stream of a block again and again, small and quickly made, with a checksum that is wrong."""
    pieces = max(1, min(times, (1 << 20) // max(len(block), 1)))
    deflate = zlib.compressobj(9, wbits=-15)
    coded = deflate.compress(block * pieces) + deflate.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\x9c" + coded * (times // pieces) + b"\x03\x00" + bytes(4)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with some bits turned, bytes lost or doubled, or its end cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        at = chance.randrange(len(changed))
        match chance.randrange(7):
            case 0 | 1:
                changed[at] ^= 1 << chance.randrange(8)
            case 2:
                changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 3:
                changed[at : at + 4] = chance.choice((b"\xff" * 4, b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
            case 4:
                del changed[at : at + chance.choice((1, 2, 16, 256))]
            case 5:
                changed[at:at] = changed[max(0, at - chance.choice((1, 8, 64))) : at]
            case _:
                changed[at : at + 16] = chance.randbytes(16)
        if not changed:
            return b"\0"
    if not chance.randrange(4):
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed) or b"\0"


def plan(count: int, media: Iterator[Medium] | list[Medium]) -> list[tuple[Medium, int]]:
    """``count`` pairs of a medium and a seed: every medium once, then all again with the next seed, heavy ones once."""
    media = list(media)
    found: list[tuple[Medium, int]] = []
    seed = 0
    while len(found) < count:
        found += [(medium, seed) for medium in media if not (seed and medium.heavy)]
        seed += 1
    return found[:count]
