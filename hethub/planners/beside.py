"""A task in a process of its own beside this one, where a core is free for it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["beside"]

T = TypeVar("T")


@contextmanager
def beside(task: Callable[[], T], *, allowed: bool) -> Iterator[Callable[[], T]]:
    """A function that returns what `task` does, which a fork of this process has begun meanwhile; leaving ends it.

    Where a fork is not `allowed`, has no core, or might find a lock that another thread has taken for ever, `task` runs
    here when it is asked for; so it does where the fork does not answer, so that an error of it is raised here.
    """
    if not allowed or not _has_room():
        yield task
        return
    parent = os.getpid()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _answer(task, write, parent)
    os.close(write)
    waiting = [child]

    def result() -> T:
        with open(read, "rb", closefd=False) as stream:
            content = stream.read()
        _, status = os.waitpid(waiting.pop(), 0)
        if status != 0:
            return task()
        found: T = pickle.loads(content)  # noqa: S301 - what our own fork wrote
        return found

    try:
        yield result
    finally:
        os.close(read)
        for left in waiting:
            os.kill(left, signal.SIGKILL)
            os.waitpid(left, 0)


def _has_room() -> bool:
    known = getattr(os, "sched_getaffinity", None)
    return known is not None and len(known(0)) > 1 and threading.active_count() == 1


def _answer(task: Callable[[], Any], write: int, parent: int) -> None:
    """The fork: write the answer and be gone, without a word, on Ctrl-C too, and without what this process does at its
    end."""
    status = 1
    try:
        # Loaded here, where start-up does not wait for it.
        from hethub.parents import end_with

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        end_with(parent)
        content = pickle.dumps(task())
        with open(write, "wb") as stream:
            stream.write(content)
        status = 0
    finally:
        os._exit(status)
