"""Signals that ask a command to stop: Ctrl-C and SIGTERM.

Both raise KeyboardInterrupt, the one interruption that Ray's waiting calls pass on. It is raised wherever the program
happens to be, so now and then where Python drops it (in a callback from C, in a finalizer): a launch was seen to train
on after Ctrl-C. Whoever waits for long therefore asks `stop_if_asked` too.
"""

from __future__ import annotations

import signal

__all__ = ["listen", "stop_if_asked", "terminated"]

_asked: list[int] = []


def listen() -> None:
    """Take both signals from here on."""
    _asked.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt where a signal has come, however often."""
    if _asked:
        raise KeyboardInterrupt


def terminated() -> bool:
    """Whether SIGTERM was among the signals."""
    return signal.SIGTERM in _asked


def _on_signal(number: int, _: object) -> None:
    _asked.append(number)
    raise KeyboardInterrupt
