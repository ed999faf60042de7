"""Where each worker is, for the one who asks after it died."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["Beacon"]


class Beacon:
    """Where each worker is: (step, action index) in a file that all processes map, so that a worker that dies
    without a word still says where it died."""

    def __init__(self, file: Path, count: int) -> None:
        self._at = np.memmap(file, dtype=np.int64, mode="r+", shape=(count, 2))

    @staticmethod
    def create(file: Path, count: int) -> None:
        """Make the file; (-1, -1) is "not started"."""
        np.full((count, 2), -1, dtype=np.int64).tofile(file)

    def clear(self) -> None:
        """Nobody has started."""
        self._at[:] = -1

    def set(self, device: int, step: int, action: int) -> None:
        """Called before each action."""
        self._at[device, 0] = step
        self._at[device, 1] = action

    def get(self, device: int) -> tuple[int, int]:
        """The last (step, action) of a device."""
        return int(self._at[device, 0]), int(self._at[device, 1])
