"""The emulated links' free-at times: one locked table that all processes of a run share."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from hethub.cost.graph import Path as LinkPath
from hethub.cost.graph import reserve

__all__ = ["LinkTable"]


class LinkTable:
    """A file of float64 cells, one per directed capacity of the cost graph (modelled seconds).

    The sender of a message reserves its path under the file's lock and learns the arrival time.
    """

    def __init__(self, file: Path, cells: int) -> None:
        self._descriptor = os.open(file, os.O_RDWR)
        self._memory = mmap.mmap(self._descriptor, cells * 8)
        self._cells = np.frombuffer(self._memory, dtype=np.float64)

    @staticmethod
    def create(file: Path, cells: int) -> None:
        """Make the table with every link free; the owner of the run's folder deletes it."""
        file.write_bytes(bytes(8 * cells))

    @staticmethod
    def clear(file: Path) -> None:
        """Make every link free at once, while nobody sends."""
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))

    def reserve(self, path: LinkPath, size_bytes: float, now: float) -> float:
        """Take the path from `now` on; returns the arrival time."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            return reserve(self._cells, path, size_bytes, now)
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file."""
        del self._cells
        self._memory.close()
        os.close(self._descriptor)
