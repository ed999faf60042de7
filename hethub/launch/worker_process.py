"""A worker's process: takes calls from its node's host, one frame each, and answers each when it is done.

A frame is a header of three numbers (the call's, the method's length, the arguments' length), the method's name, and
the arguments or the answer, pickled. Only the two ends of a private socket pair ever see one.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from hethub.checkpoints.restarts import Cause
from hethub.errors import InputError

if TYPE_CHECKING:  # torch is loaded when a worker is
    from hethub.launch.worker import Worker

__all__ = ["HEADER", "Failure", "frame", "pack", "serve", "unpack"]

HEADER = struct.Struct("<QIQ")  # number of the call, bytes of the method's name, bytes of the rest
_AT_ONCE = 2  # training, and a question beside it


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a worker stopped. `secondary` marks the consequence of another worker's failure."""

    device: int
    action: str
    reason: str
    secondary: bool
    cause: Cause = Cause.WORKER


def pack(value: Any) -> bytes:
    """Arguments or an answer as bytes, for `unpack` at the other end."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def unpack(data: bytes | memoryview) -> Any:
    """What `pack` took. Only for what came through a channel of this program's own."""
    return pickle.loads(data)  # noqa: S301 - from our own process


def frame(number: int, method: str, content: bytes) -> bytes:
    """One call or answer as it goes through the socket."""
    name = method.encode()
    return HEADER.pack(number, len(name), len(content)) + name + content


def serve(connection: socket.socket, device: int) -> None:
    """Answer calls until the other end is gone. Then the process ends: nobody is left to work for."""
    desk = _Desk(connection, device)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="call") as pool, connection.makefile("rb") as stream:
        while (call := _read(stream)) is not None:
            pool.submit(desk.take, *call)
        os._exit(0)


def _read(stream: BinaryIO) -> tuple[int, str, bytes] | None:
    """The next frame's number, method and content; None at the end."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    number, name, size = HEADER.unpack(head)
    method, content = stream.read(name), stream.read(size)
    return (number, method.decode(), content) if len(content) == size else None


class _Desk:
    """Does what is asked of a Worker; anything raised becomes a Failure."""

    def __init__(self, connection: socket.socket, device: int) -> None:
        self._connection = connection
        self._device = device
        self._worker: Worker | None = None
        self._results: list[tuple[int, float, float]] = []
        self._sending = threading.Lock()

    def take(self, number: int, method: str, content: bytes) -> None:
        """Do one call and send its answer."""
        try:
            answer = pack(self._do(method, unpack(content)))
        except BaseException as error:
            traceback.print_exc()
            answer = pack(self._failure(method, error))
        with self._sending:
            self._connection.sendall(frame(number, "", answer))

    def _do(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "results":
            return self._results[arguments[0] :]
        if method == "join":
            from hethub.launch.worker import Worker

            if self._worker is not None:  # of the attempt before
                self._worker.close()
            self._device = arguments[0].device
            self._worker = Worker(*arguments)
            return None
        worker = self._worker
        assert worker is not None, f"{method} before join"
        if method == "train":
            self._results = []
            first, last = arguments
            worker.train(first, last, report=self._report)
            return worker.now()
        return getattr(worker, method)(*arguments)

    def _report(self, step: int, result: Any) -> None:
        self._results.append((step, result.loss, result.norm))

    def _failure(self, method: str, error: BaseException) -> Failure:
        from hethub.launch.executor import ActionError

        cause = error.__cause__ if isinstance(error, ActionError) else error
        action = error.action if isinstance(error, ActionError) else method
        reason = error.reason if isinstance(error, ActionError) else f"{type(error).__name__}: {error}"
        if self._worker is not None:
            if cause is not None:
                reason = self._worker.memory_words(cause) or reason
            self._worker.cut()
        return Failure(self._device, action, reason.splitlines()[0], *_sorted(cause))


def _sorted(error: BaseException | None) -> tuple[bool, Cause]:
    """Whether a worker's error is the consequence of another's, and what kind it is."""
    from hethub.launch.communicator import PeerLostError
    from hethub.launch.parameters import NotFiniteError
    from hethub.launch.tally import DeviceMemoryError, is_out_of_memory

    if isinstance(error, PeerLostError):
        return True, Cause.LINK
    if isinstance(error, NotFiniteError):
        return error.suspicion < 2, Cause.NOT_A_NUMBER
    if error is not None and (isinstance(error, DeviceMemoryError) or is_out_of_memory(error)):
        return False, Cause.MEMORY
    return False, Cause.DATA if isinstance(error, InputError) else Cause.WORKER
