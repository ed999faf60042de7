"""Processes that each hold one object and answer calls of its methods; between calls they are blocked, not spinning."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Answer", "Crew", "WorkerError"]

_END_SECONDS = 10.0
_GLOO_LOOP = "gloo_tcp_loop"  # as torch 2.13 names the thread


class WorkerError(Exception):
    """A process answered with an error, ended, or does not answer; the text holds its traceback where it has one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method returned, and when it did on the machine's monotonic clock."""

    value: Any
    at_seconds: float


class Crew:
    """A process for each of `makers`, picklable callables that make its object; made all at once, since the objects may
    wait for each other. Use as a context, so that the processes end whatever happens.

    One math thread a process: the comparisons are of engines, and the machine's cores are shared out by hand.
    """

    def __init__(self, makers: Sequence[Callable[[], object]], *, timeout_seconds: float = 300.0) -> None:
        """Raises WorkerError when an object cannot be made."""
        os.environ["OMP_NUM_THREADS"] = "1"
        self.timeout_seconds = timeout_seconds
        self._started_seconds = time.monotonic()
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        for maker in makers:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(maker, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)
        try:
            self.finish()
        except WorkerError:
            self.close()
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, method: str, *arguments: Any) -> None:
        """Call a method of every object without waiting for the answers."""
        self._started_seconds = time.monotonic()
        for connection in self._connections:
            connection.send((method, arguments))

    def start_one(self, number: int, method: str, *arguments: Any) -> None:
        """Call a method of one object; `finish` wants every object called."""
        self._connections[number].send((method, arguments))

    def finish(self) -> list[Answer]:
        """The answers to `start`. Raises WorkerError with the traceback of the first that fails."""
        answers: dict[int, Answer] = {}
        left = dict(enumerate(self._connections))
        while left:
            ready = wait(list(left.values()), timeout=self.timeout_seconds)
            if not ready:
                raise WorkerError(f"processes {sorted(left)} do not answer within {self.timeout_seconds:g} s")
            for number, connection in list(left.items()):
                if connection in ready:
                    answers[number] = _answer_of(connection, number)
                    del left[number]
        return [answers[number] for number in range(len(self._connections))]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What the method returns in each process. Raises WorkerError."""
        self.start(method, *arguments)
        return [answer.value for answer in self.finish()]

    def timed(self, answers: Sequence[Answer]) -> float:
        """Wall seconds from `start` to the last of its answers."""
        return max(answer.at_seconds for answer in answers) - self._started_seconds

    def cpu_seconds(self) -> float:
        """CPU time that all threads of all processes have taken so far (in ticks of 10 ms; Linux)."""
        return sum(self.cpu_seconds_each())

    def cpu_seconds_each(self) -> list[float]:
        """The same by process."""
        return [_cpu_seconds(Path(f"/proc/{process.pid}/stat")) for process in self.processes]

    def waiting_cpu_seconds(self) -> float:
        """The same without the loop of torch's gloo, which looks around a hundred times a second where nothing is to be
        done: 0.3 % of a core in every process, on both sides of a comparison."""
        threads = [stat for p in self.processes for stat in Path(f"/proc/{p.pid}/task").glob("*/stat")]
        loops = [stat for stat in threads if f"({_GLOO_LOOP})" in stat.read_text()]
        return self.cpu_seconds() - sum(map(_cpu_seconds, loops))

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()  # a blocked process sees the end of its pipe and leaves
        for process in self.processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _cpu_seconds(stat: Path) -> float:
    """Fields 14 and 15 of proc(5)'s stat, of a process or a thread, counted after the name, which may hold anything."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _answer_of(connection: Connection, number: int) -> Answer:
    try:
        fine, value, at_seconds = connection.recv()
    except EOFError:
        raise WorkerError(f"process {number} has ended") from None
    if not fine:
        raise WorkerError(value)
    return Answer(value, at_seconds)


def _serve(maker: Callable[[], object], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    try:
        made = maker()
        connection.send((True, None, time.monotonic()))
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                break
            value = getattr(made, method)(*arguments)
            connection.send((True, value, time.monotonic()))
    except Exception:
        connection.send((False, traceback.format_exc(), time.monotonic()))
    # Without a goodbye: groups of peers that have ended, or of a failed step, would wait for each other.
    os._exit(0)
