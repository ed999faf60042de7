"""Collects one device's timeline records: what ran and its timing while running, arrays when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hethub.launch.devices import Timing
from hethub.program.actions import Action, Program
from hethub.timeline.record import RECORD, Kind

__all__ = ["Recorder"]

Records = npt.NDArray[np.void]

_RECENT_STEPS = 6


class Recorder:
    """Records of one device under one program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: Records | None = None  # what is known of each of the device's actions beforehand
        self._done: list[tuple[int, int, Timing, float]] = []
        self._parts: list[Records] = []

    def add(
        self, step: int, device: int, number: int, action: Action, timing: Timing, sent: float = math.nan
    ) -> None:
        """Record an action. Its timing may become known later, before the records are taken. `sent` is when the message
        that it received was sent, where that is known."""
        if self._known is None:
            self._known = self._actions(device)
        self._done.append((step, number, timing, sent))

    @property
    def last_end(self) -> float:
        """When the last action ended, once its timing is known."""
        return self._done[-1][2].end

    def fresh(self) -> Records:
        """The records since this was asked last, between two steps; they stay for `take`."""
        part = self._records(self._done)
        self._parts.append(part)
        self._done = []
        return part

    def _records(self, done: Sequence[tuple[int, int, Timing, float]]) -> Records:
        if not done or self._known is None:
            return np.empty(0, dtype=RECORD)
        steps, numbers, timings, sent = zip(*done, strict=True)
        rows = self._known[list(numbers)]
        rows["step"] = steps
        rows["start"] = [timing.start for timing in timings]
        rows["end"] = [timing.end for timing in timings]
        rows["busy"] = [timing.busy_seconds for timing in timings]
        rows["real"] = [timing.real_seconds for timing in timings]
        rows["overrun"] = [timing.overrun_seconds for timing in timings]
        rows["sent"] = np.where(rows["kind"] == Kind.SEND, rows["start"], sent)
        return np.concatenate((rows, _collectives(rows, timings)))

    def recent(self, step: int) -> Records:
        """The records of `step` and a few before it, all done; they stay here. May be asked while others come."""
        wanted = range(step - _RECENT_STEPS + 1, step + 1)
        done = [
            entry for entry in list(self._done) if entry[0] in wanted
        ]  # first: they may move on meanwhile
        here = {entry[0] for entry in done}
        chosen = [self._records(done)]
        for part in reversed(list(self._parts)):
            if len(part) and part["step"].max() < wanted[0]:
                break
            chosen.append(part[np.isin(part["step"], [s for s in wanted if s not in here])])
        return np.concatenate(chosen[::-1])

    def take(self) -> Records:
        """The records so far, which are then forgotten here."""
        self.fresh()
        parts, self._parts = self._parts, []
        return np.concatenate(parts) if parts else np.empty(0, dtype=RECORD)

    def _actions(self, device: int) -> Records:
        """A record without times of every action of the device's list."""
        actions = self._program.devices[device]
        rows = np.zeros(len(actions), dtype=RECORD)
        rows["device"] = device
        rows["action"] = np.arange(len(actions))
        for column in ("lane", "peer"):
            rows[column] = -1
        for row, action in zip(rows, actions, strict=True):
            row["kind"], row["stage"] = int(action.kind), action.stage
            row["micro_batch"], row["message"] = action.micro_batch, action.message
            if action.message >= 0:
                transfer = self._program.transfer(action.message)
                row["lane"], row["bytes"] = int(transfer.lane), transfer.bytes
                row["peer"] = transfer.destination if action.kind == Kind.SEND else transfer.source
        return rows


def _collectives(rows: Records, timings: Sequence[Timing]) -> Records:
    """The sub-events of compute actions."""
    events = [(index, *event) for index, timing in enumerate(timings) for event in timing.collectives]
    if not events:
        return np.empty(0, dtype=RECORD)
    indices, starts, ends = zip(*events, strict=True)
    found = rows[list(indices)]
    found["kind"], found["lane"] = int(Kind.COLLECTIVE), -1
    found["start"], found["end"] = starts, ends
    found["busy"] = found["real"] = found["overrun"] = 0.0
    found["sent"], found["bytes"] = math.nan, 0
    return found
