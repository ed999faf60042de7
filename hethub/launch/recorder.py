"""Collects one device's timeline records; a tuple per action while running, an array when asked."""

from __future__ import annotations

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
        self._rows: list[tuple[object, ...]] = []

    def add(self, step: int, device: int, number: int, action: Action, timing: Timing | None) -> None:
        """Record an action that ran."""
        if timing is None:
            return
        lane = peer = -1
        size = 0
        if action.message >= 0:
            transfer = self._program.transfer(action.message)
            lane, size = int(transfer.lane), transfer.bytes
            peer = transfer.destination if action.kind == Kind.SEND else transfer.source
        where = (action.stage, action.micro_batch, peer, action.message)
        sent = timing.start if action.kind == Kind.SEND else float("nan")
        self._rows.append(
            (step, device, number, int(action.kind), lane, *where, timing.start, timing.end, timing.busy_seconds,
             sent, timing.real_seconds, timing.overrun_seconds, size)
        )  # fmt: skip
        for start, end in timing.collectives:
            self._rows.append(
                (
                    step,
                    device,
                    number,
                    int(Kind.COLLECTIVE),
                    -1,
                    *where,
                    start,
                    end,
                    0.0,
                    float("nan"),
                    0.0,
                    0.0,
                    0,
                )
            )

    def take(self) -> npt.NDArray[np.void]:
        """The records so far, which are then forgotten here."""
        rows, self._rows = self._rows, []
        return np.array(rows, dtype=RECORD)
