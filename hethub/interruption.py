"""Signals that ask a command to stop: Ctrl-C and SIGTERM.

Both raise KeyboardInterrupt, the one interruption that Ray's waiting calls pass on. It is raised wherever the program
happens to be, so now and then where Python drops it (in a callback from C, in a finalizer): a launch was seen to train
on after Ctrl-C. Whoever waits for long therefore asks `stop_if_asked` too.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["listen", "patient", "seconds_left", "stop_if_asked", "terminated"]

_asked: list[tuple[int, float]] = []  # signals, and when they came by the monotonic clock
_patience: list[float] = []  # seconds, of each `patient`
_raised: list[int] = []  # signals that were passed on


def listen() -> None:
    """Take both signals from here on."""
    _asked.clear()
    _raised.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Inside, one SIGTERM is only noted, for so many seconds: whoever is here looks at `terminated` and ends in good
    time. Any further signal interrupts as usual, and `stop_if_asked` once the time has passed; 0 is no patience."""
    _patience.append(seconds)
    try:
        yield
    finally:
        _patience.pop()


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt where a signal has come, however often."""
    if _urgent():
        raise KeyboardInterrupt


def terminated() -> bool:
    """Whether SIGTERM was among the signals."""
    return any(number == signal.SIGTERM for number, _ in _asked)


def seconds_left() -> float:
    """Of the patience here; endless before SIGTERM."""
    if not terminated():
        return math.inf
    came = min(at for number, at in _asked if number == signal.SIGTERM)
    return (_patience[-1] if _patience else 0.0) - (time.monotonic() - came)


def _urgent() -> bool:
    return bool(_asked) and ([number for number, _ in _asked] != [signal.SIGTERM] or seconds_left() <= 0)


def _on_signal(number: int, _: object) -> None:
    _asked.append((number, time.monotonic()))
    # Who cleans up after one is not cut off by another SIGTERM: `hethub stop --now` sends two.
    if _urgent() and not (_raised and number == signal.SIGTERM):
        _raised.append(number)
        raise KeyboardInterrupt
