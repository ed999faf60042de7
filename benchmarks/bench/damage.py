"""Ways to damage a checkpoint's folder, by seed: what disks, crashes and mistaken hands do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["DAMAGES", "Damage"]

Damage = Callable[[Path, random.Random], None]
"""Changes something in the folder of a checkpoint; beside it lies one of another step."""


def _some_file(folder: Path, seed: random.Random) -> Path:
    return seed.choice(sorted(folder.iterdir()))


def flip(folder: Path, seed: random.Random) -> None:
    """One bit."""
    file = _some_file(folder, seed)
    content = bytearray(file.read_bytes())
    content[seed.randrange(len(content))] ^= 1 << seed.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, seed: random.Random) -> None:
    """A file ends early."""
    file = _some_file(folder, seed)
    file.write_bytes(file.read_bytes()[: seed.randrange(file.stat().st_size)])


def zero(folder: Path, seed: random.Random) -> None:
    """What a file system does with blocks that it never wrote."""
    file = _some_file(folder, seed)
    content = bytearray(file.read_bytes())
    at = seed.randrange(len(content))
    stop = min(len(content), at + 4096)
    if any(content[at:stop]):
        content[at:stop] = bytes(stop - at)
    else:
        content[at] = 1
    file.write_bytes(content)


def lengthen(folder: Path, seed: random.Random) -> None:
    """A file goes on."""
    with _some_file(folder, seed).open("ab") as stream:
        stream.write(bytes(seed.randrange(1, 100)))


def delete(folder: Path, seed: random.Random) -> None:
    """A file is gone."""
    _some_file(folder, seed).unlink()


def another_generation(folder: Path, seed: random.Random) -> None:
    """A file of another step, as where a folder is written again in place."""
    file = _some_file(folder, seed)
    other = next(path for path in sorted(folder.parent.glob("step-*")) if path != folder)
    shutil.copy(other / file.name, file)


def exchange(folder: Path, seed: random.Random) -> None:
    """Two devices' files."""
    one, other = seed.sample(sorted(folder.glob("*.state")), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES: tuple[Damage, ...] = (flip, truncate, zero, lengthen, delete, another_generation, exchange)
