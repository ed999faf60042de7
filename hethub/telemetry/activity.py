"""What one device did with its time, step by step: the timeline's accounting, while the run goes on.

A device adds up the time from its own end of the step before to its own end of this one, so no moment is lost or
counted twice, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hethub.telemetry.metrics import ACTIVITY_OF_KIND
from hethub.timeline.record import COMPUTE_KINDS, RECORD, USEFUL_KINDS, Kind
from hethub.timeline.summary import (
    BUBBLE,
    BUSY,
    EXPOSED,
    IDLE,
    RECOMPUTE,
    StepClock,
    action_seconds,
    gap_seconds,
    is_kind,
    sorted_actions,
)

__all__ = ["KINDS", "Activity", "own_compute_seconds"]

Floats = npt.NDArray[np.float64]
Records = npt.NDArray[np.void]

KINDS = tuple(ACTIVITY_OF_KIND)
"""The kinds of activity, in the order of every array of seconds by kind."""

_AT = {kind: number for number, kind in enumerate(KINDS)}
_BUSY_AT = {kind: _AT[kind.name.lower()] for kind in sorted(USEFUL_KINDS)}
_EXPOSED_AT = (
    (COMPUTE_KINDS, _AT["collective"]),
    ({Kind.SEND}, _AT["send"]),
    ({Kind.RECEIVE}, _AT["receive"]),
)


class Activity:
    """Adds up one device's seconds by kind. Times are the clock's that its records are in, from `since` on."""

    def __init__(self, since: float = 0.0) -> None:
        self.until = since
        self._last: Records = np.empty(0, dtype=RECORD)  # the action that ended last

    def add(
        self, records: Records, ends_before: Mapping[int, float], checkpoint_seconds: float = 0.0
    ) -> Floats:
        """Seconds by kind from `until` to the end of the steps whose `records` these are (sub-events may be among them;
        receives say when their message was sent, or NaN). shape: (KINDS,)

        `ends_before` tells of each of these steps, in their order, when the step before it ended everywhere;
        `checkpoint_seconds` of standing still for a checkpoint lie somewhere between steps.
        """
        actions = sorted_actions(np.concatenate((self._last, records)))
        actions["device"] = 0
        end = float(actions["end"].max())
        clock = StepClock(np.array(list(ends_before)) - 1, np.array(list(ends_before.values())), self.until)
        window = (self.until, end)
        shares = action_seconds(actions, clock, window)
        idle, unaccounted = gap_seconds(actions, clock, window, 1)

        seconds = np.zeros(len(KINDS))
        by_kind = np.bincount(actions["kind"], weights=shares[BUSY], minlength=len(Kind))
        for kind, at in _BUSY_AT.items():
            seconds[at] = by_kind[kind]
        seconds[_AT["recompute"]] = shares[RECOMPUTE].sum()
        for kinds, at in _EXPOSED_AT:
            seconds[at] = shares[EXPOSED, is_kind(actions, kinds)].sum()
        seconds[_AT["bubble"]] = shares[BUBBLE].sum()
        seconds[_AT["idle"]] = shares[IDLE].sum() + idle[0]
        seconds[_AT["unaccounted"]] = unaccounted[0]
        _move(seconds, checkpoint_seconds, ("unaccounted", "idle"), "checkpoint")
        self.until = end
        self._last = actions[np.argmax(actions["end"])][np.newaxis].copy()
        return seconds


def _move(seconds: Floats, size: float, sources: tuple[str, ...], target: str) -> None:
    """Give `size` seconds of the sources, in their order, to the target: less where they have less."""
    for source in sources:
        part = min(size, seconds[_AT[source]])
        seconds[_AT[source]] -= part
        seconds[_AT[target]] += part
        size -= part


def own_compute_seconds(seconds: Floats) -> float:
    """The device's own compute among its seconds by kind: busy and recompute."""
    return float(seconds[[*_BUSY_AT.values(), _AT["recompute"]]].sum())
