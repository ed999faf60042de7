"""Collects one device's timeline records: what ran and its timing while running, an array when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hethub.launch.devices import Timing
from hethub.program.actions import Action, Program
from hethub.timeline.record import RECORD, Kind

__all__ = ["Recorder"]


class Recorder:
    """Records of one device under one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._done: list[tuple[int, int, int, Action, Timing]] = []

    def add(self, step: int, device: int, number: int, action: Action, timing: Timing) -> None:
        """Record an action. Its timing may become known later, before the records are taken."""
        self._done.append((step, device, number, action, timing))

    def take(self) -> npt.NDArray[np.void]:
        """The records so far, which are then forgotten here."""
        done, self._done = self._done, []
        return np.array([row for entry in done for row in self._rows(*entry)], dtype=RECORD)

    def recent(self, step: int) -> npt.NDArray[np.void]:
        """The records of `step` and the one before it, both done; they stay here. May be asked while others come."""
        chosen = []
        for entry in reversed(self._done):
            if entry[0] < step - 1:
                break
            if entry[0] <= step:
                chosen.append(entry)
        return np.array([row for entry in reversed(chosen) for row in self._rows(*entry)], dtype=RECORD)

    def _rows(
        self, step: int, device: int, number: int, action: Action, timing: Timing
    ) -> Iterator[tuple[object, ...]]:
        lane = peer = -1
        size = 0
        if action.message >= 0:
            transfer = self._program.transfer(action.message)
            lane, size = int(transfer.lane), transfer.bytes
            peer = transfer.destination if action.kind == Kind.SEND else transfer.source
        where = (action.stage, action.micro_batch, peer, action.message)
        sent = timing.start if action.kind == Kind.SEND else math.nan
        yield (
            step, device, number, int(action.kind), lane, *where, timing.start, timing.end, timing.busy_seconds,
            sent, timing.real_seconds, timing.overrun_seconds, size,
        )  # fmt: skip
        for start, end in timing.collectives:
            yield (
                step, device, number, int(Kind.COLLECTIVE), -1, *where, start, end, 0.0,
                math.nan, 0.0, 0.0, 0,
            )  # fmt: skip
