"""Clocks. All times in the runtime are modelled seconds since the run's epoch."""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import dataclass

__all__ = ["Clock", "wake_punctually"]

_PR_SET_TIMERSLACK = 29  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's monotonic clock, counted from `epoch_seconds` in units of `time_scale` wall seconds.

    A real run has a time scale of 1. Processes of one machine share the monotonic clock.
    """

    epoch_seconds: float
    time_scale: float = 1.0

    def now(self) -> float:
        """Modelled seconds since the epoch."""
        return (time.monotonic() - self.epoch_seconds) / self.time_scale

    def wait_until(self, moment: float) -> None:
        """Return when `now()` is at least `moment`."""
        while True:
            left = (moment - self.now()) * self.time_scale
            if left <= 0:
                return
            time.sleep(left)


def wake_punctually() -> None:
    """Let this thread's sleeps end when they should: Linux may end them 50 us late, to wake up less often, and an
    emulated device sleeps once an action. Elsewhere, and where it is not allowed, nothing changes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
