"""One device's counters, handed from its worker to the node's agent: a small file that both map.

All numbers are float64. A version that is odd while the worker writes lets a reader see a whole step or none. The file
outlives its worker, so counters go on where they were when the next attempt begins.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from hethub.files import write_whole
from hethub.telemetry.metrics import ACTIVITY_OF_KIND, STEP_BUCKETS_SECONDS

__all__ = ["FIELDS", "LINK_FIELDS", "CountersFile", "create_counters", "size_of"]

_MAGIC = 7_403_001.0  # first number: the layout; another layout, another number
_HEAD = 2  # magic, version
_TRIES = 200

LINK_FIELDS = ("bytes", "transfer_seconds", "predicted_transfer_seconds")
"""Of every link that reaches the device, after FIELDS."""

FIELDS: tuple[str, ...] = (
    *(f"seconds.{kind}" for kind in ACTIVITY_OF_KIND),
    "compute_seconds",
    "predicted_compute_seconds",
    "flops",
    "energy_joules",  # the estimate
    "memory_used_bytes",  # NaN where nothing counts it
    "memory_peak_bytes",
    "heartbeat_unix_seconds",
    "steps",
    "step_seconds",
    *(f"step_bucket.{bound}" for bound in (*STEP_BUCKETS_SECONDS, "inf")),
)
"""Names of the numbers of every device, in their order."""


def size_of(links: int) -> int:
    """Numbers in the file of a device that `links` links reach."""
    return _HEAD + len(FIELDS) + links * len(LINK_FIELDS)


def create_counters(file: Path, links: int) -> None:
    """Make the file with every counter at 0. One that is there stays, but for its links where their number differs."""
    size = 8 * size_of(links)
    own = 8 * (_HEAD + len(FIELDS))
    before = file.read_bytes() if file.exists() else b""
    if len(before) == size:
        return
    memory = bytearray(size)
    memoryview(memory).cast("d")[0] = _MAGIC
    if len(before) >= own:
        memory[8 * _HEAD : own] = before[8 * _HEAD : own]
    write_whole(file, bytes(memory))


def _floats(numbers: memoryview[float]) -> list[float]:
    return cast(list[float], numbers[_HEAD:].tolist())


class CountersFile:
    """A device's counters, mapped. Raises OSError where there is no file, ValueError where it has another layout."""

    def __init__(self, file: Path, *, write: bool = False) -> None:
        descriptor = os.open(file, os.O_RDWR if write else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            self._memory = mmap.mmap(descriptor, 0, access=access)
        finally:
            os.close(descriptor)
        self._numbers: memoryview[float] = memoryview(self._memory).cast("d")
        if self._numbers[0] != _MAGIC:
            self.close()
            raise ValueError(f"{file}: written by another version of HetHub")
        if write and self._numbers[1] % 2:  # its last writer died in the act
            self._numbers[1] += 1
        self._whole: list[float] | None = None

    def read(self, pause: Callable[[], None] = lambda: None) -> list[float]:
        """The numbers after the head, of one moment: FIELDS, then LINK_FIELDS of each link.

        Where a writer died in the act, those read last, or what lies there. `pause` is called between tries.
        """
        numbers = self._numbers
        for _ in range(_TRIES):
            version = numbers[1]
            found = _floats(numbers)
            if version % 2 == 0 and numbers[1] == version:
                self._whole = found
                return found
            pause()
        return _floats(numbers) if self._whole is None else self._whole

    def write(self, numbers: Sequence[float]) -> None:
        """Replace the numbers after the head at once; `numbers` must be contiguous float64."""
        raw = memoryview(numbers).cast("B").cast("d")  # type: ignore[arg-type]
        self._numbers[1] += 1
        self._numbers[_HEAD:] = raw
        self._numbers[1] += 1

    def close(self) -> None:
        """Let go of the file."""
        self._numbers.release()
        self._memory.close()
