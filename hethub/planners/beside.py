"""Tasks in a process of its own beside this one, where a core is free for it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["beside"]

T = TypeVar("T")
_MOST = 256  # tasks that a byte tells apart


@contextmanager
def beside(tasks: Sequence[Callable[[], T]], *, allowed: bool) -> Iterator[Callable[[], list[T]]]:
    """A function that returns what each of the tasks does, of which a fork of this process does one by one meanwhile;
    asked for, this one does those that the fork has not begun. Leaving ends the fork.

    Where a fork is not `allowed`, has no core, or might find a lock that another thread has taken for ever, all is done
    here; so it is where the fork does not answer, so that an error of a task is raised here.
    """
    if not allowed or not _has_room() or len(tasks) > _MOST:
        yield lambda: [task() for task in tasks]
        return
    parent, turns = os.getpid(), _turns(len(tasks))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _answer(tasks, turns, write, parent)
    os.close(write)
    waiting = [child]

    def results() -> list[T]:
        found = _done(tasks, turns)
        with open(read, "rb", closefd=False) as stream:
            content = stream.read()
        _, status = os.waitpid(waiting.pop(), 0)
        if status == 0:
            found |= pickle.loads(content)  # noqa: S301 - what our own fork wrote
        return [found[number] if number in found else task() for number, task in enumerate(tasks)]

    try:
        yield results
    finally:
        os.close(read)
        os.close(turns)
        for left in waiting:
            os.kill(left, signal.SIGKILL)
            os.waitpid(left, 0)


def _turns(count: int) -> int:
    """A pipe from which two processes take the numbers of their tasks, each number once."""
    read, write = os.pipe()
    os.write(write, bytes(range(count)))
    os.close(write)
    return read


def _done(tasks: Sequence[Callable[[], T]], turns: int) -> dict[int, T]:
    """What the tasks do whose turn comes here."""
    return {number: tasks[number]() for (number,) in iter(lambda: os.read(turns, 1), b"")}


def _has_room() -> bool:
    known = getattr(os, "sched_getaffinity", None)
    return known is not None and len(known(0)) > 1 and threading.active_count() == 1


def _answer(tasks: Sequence[Callable[[], Any]], turns: int, write: int, parent: int) -> None:
    """The fork: do tasks, write what they did and be gone, without a word, on Ctrl-C too, and without what this process
    does at its end."""
    status = 1
    try:
        # Loaded here, where start-up does not wait for it.
        from hethub.parents import end_with

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        end_with(parent)
        content = pickle.dumps(_done(tasks, turns))
        with open(write, "wb") as stream:
            stream.write(content)
        status = 0
    finally:
        os._exit(status)
