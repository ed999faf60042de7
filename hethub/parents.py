"""Processes that must not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["adopt_orphans", "end_orphans", "end_with"]

# Of Linux' prctl.
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def end_with(parent: int) -> None:
    """In a fork of process `parent`: ask the kernel, where it can, to kill this process when that ends. It need not
    notice, so this holds for a stopped one too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """From here on children of processes that end below this one become its own, where the kernel can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1)


def end_orphans() -> None:
    """Kill all children of this process, and theirs, which become its own."""
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _children() -> list[int]:
    try:
        return [int(number) for number in Path("/proc/thread-self/children").read_text().split()]
    except OSError:  # a system that does not tell
        return []
