"""Signals that ask a command to stop: Ctrl-C and SIGTERM.

Both raise KeyboardInterrupt, the one interruption that Ray's waiting calls pass on. It is raised wherever the program
happens to be, so now and then where Python drops it (in a callback from C, in a finalizer): a launch was seen to train
on after Ctrl-C. Whoever waits for long therefore asks `stop_if_asked` too.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["listen", "patient", "stop_if_asked", "terminated"]

_asked: list[int] = []
_patient: list[bool] = []


def listen() -> None:
    """Take both signals from here on."""
    _asked.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


@contextmanager
def patient() -> Iterator[None]:
    """Inside, one SIGTERM is only noted: whoever is here looks at `terminated` and ends in good time. Any further
    signal interrupts as usual."""
    _patient.append(True)
    try:
        yield
    finally:
        _patient.pop()


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt where a signal has come, however often."""
    if _urgent():
        raise KeyboardInterrupt


def terminated() -> bool:
    """Whether SIGTERM was among the signals."""
    return signal.SIGTERM in _asked


def _urgent() -> bool:
    return bool(_asked) and not (_patient and _asked == [signal.SIGTERM])


def _on_signal(number: int, _: object) -> None:
    _asked.append(number)
    if _urgent():
        raise KeyboardInterrupt
