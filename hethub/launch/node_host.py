"""A node's host: the Ray actor that holds a node's devices, and passes calls on to a worker process for each of them.

Workers are forked (`fork_server`), so one import of torch serves all, and who dies is known at once on any machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from hethub.errors import MachineError
from hethub.launch.environment import code_digest
from hethub.launch.fork_server import STACKS_SIGNAL, ForkServer
from hethub.launch.worker_process import HEADER, frame
from hethub.telemetry.folder import start_agent

__all__ = ["NodeHost", "accelerator_of"]


class NodeHost:
    """What runs inside the Ray actor. Workers are known by the names of their devices."""

    def __init__(self) -> None:
        self._forks = ForkServer()
        self._workers: dict[str, _Line] = {}
        self._agent: subprocess.Popen[bytes] | None = None

    async def code(self) -> str:
        """Digest of the program that runs here."""
        return code_digest()

    async def begin(self, name: str, device: int, log_file: str, variable: str, position: int) -> int:
        """Start the worker of a device; returns its process id.

        Of the accelerators that the environment's `variable` lists the worker sees the `position`-th alone. Raises
        MachineError where it lists too few.
        """
        await asyncio.to_thread(self._forks.wait)
        listed = os.environ.get(variable, "")
        environment = {variable: accelerator_of(variable, listed, position)} if variable else {}
        process, connection = self._forks.fork(device, Path(log_file), environment)
        self._workers[name] = await _Line.open(process, connection)
        return process

    async def call(self, name: str, method: str, arguments: bytes) -> bytes | None:
        """A worker's answer to a call; None where its process has ended."""
        line = self._workers.get(name)
        return None if line is None else await line.call(method, arguments)

    async def serve(self, folder: str, nodes: list[str], name: str, listen: str) -> None:
        """Start the agent that serves the counters of these nodes' workers; it ends with this process."""
        self._agent = start_agent(Path(folder), nodes, name, listen)

    async def dead(self) -> list[str]:
        """Those whose processes have ended."""
        return [name for name, line in self._workers.items() if line.ended]

    async def save_stacks(self) -> None:
        """Let all workers write into their logs where each of their threads is."""
        for line in self._workers.values():
            line.send(STACKS_SIGNAL)

    async def end(self, name: str) -> None:
        """Kill a worker."""
        line = self._workers.pop(name, None)
        if line is not None:
            line.kill()

    async def close(self) -> None:
        """Kill all workers and what they are forked from."""
        for name in list(self._workers):
            await self.end(name)
        if self._agent is not None:
            self._agent.terminate()
        await asyncio.to_thread(self._forks.close)


def accelerator_of(variable: str, listed: str, position: int) -> str:
    """The accelerator of the `position`-th worker out of those listed; where none are, they are counted from 0."""
    visible = [one for one in listed.split(",") if one]
    if not visible:
        return str(position)
    if position >= len(visible):
        raise MachineError(
            f"{variable}={listed} lists {len(visible)} of this node's accelerators, and one for each of at least "
            f"{position + 1} workers is needed. Start Ray there with all of them listed."
        )
    return visible[position]


@dataclass
class _Line:
    """Calls to one worker and its answers, matched by number."""

    process: int  # descriptor
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: bool = False
    _waiting: dict[int, asyncio.Future[bytes | None]] = field(default_factory=dict)
    _count: int = 0
    _task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, process: int, connection: socket.socket) -> _Line:
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:  # its end of the connection is closed then
            descriptor = -1
        line = cls(descriptor, *await asyncio.open_connection(sock=connection))
        line._task = asyncio.create_task(line._listen())
        return line

    async def call(self, method: str, arguments: bytes) -> bytes | None:
        if self.ended:
            return None
        self._count += 1
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._waiting[self._count] = answer
        self.writer.write(frame(self._count, method, arguments))
        return await answer

    async def _listen(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                number, name, size = HEADER.unpack(await self.reader.readexactly(HEADER.size))
                content = await self.reader.readexactly(name + size)
                self._waiting.pop(number).set_result(content)
        self.ended = True
        for answer in self._waiting.values():
            answer.set_result(None)
        self._waiting.clear()
        self.writer.close()

    def send(self, number: int) -> None:
        if self.process >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.process >= 0:
            os.close(self.process)
            self.process = -1
