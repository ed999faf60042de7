"""Waiting for other processes."""

import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["alive", "until"]


def until(met: Callable[[], bool], seconds: float, what: str) -> None:
    """Look again and again until a condition of other processes is met; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state != "Z"
