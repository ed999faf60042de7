"""A warm process that has imported what a worker needs and forks one for each device that is asked for.

Importing torch takes a second or two of a core, so one process of a machine does it once, without threads and before
any device is touched; its forks begin to work within milliseconds, at the start as after a failure, and share its
memory. It ends when its owner does, and takes all workers with it, stopped ones too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from hethub.errors import MachineError
from hethub.launch.worker_process import serve
from hethub.parents import end_with

__all__ = ["STACKS_SIGNAL", "ForkServer"]

STACKS_SIGNAL = signal.SIGUSR1  # a worker writes the stacks of all its threads into its log

_READY = b"ready"
_REQUEST_BYTES = 1 << 16
_START_SECONDS = 120.0
_END_SECONDS = 5.0


class ForkServer:
    """The owner's end. The server starts at once; `fork` waits for it."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env={**_one_thread(), **os.environ},
            )
        self._ready = False
        self._waiting = threading.Lock()

    def wait(self) -> None:
        """Until it has imported everything; from any thread. Raises MachineError where it cannot."""
        with self._waiting:
            if self._ready:
                return
            self._socket.settimeout(_START_SECONDS)
            with contextlib.suppress(OSError):
                self._ready = self._socket.recv(len(_READY), socket.MSG_WAITALL) == _READY
        if not self._ready:
            raise MachineError("the process that workers are forked from did not start. Look into Ray's log.")

    def fork(self, device: int, log_file: Path, environment: Mapping[str, str]) -> tuple[int, socket.socket]:
        """A new worker process: its id, and the socket that takes its calls. Its output is appended to `log_file`.

        Raises MachineError where the server has ended.
        """
        self.wait()
        ours, theirs = socket.socketpair()
        request = {"device": device, "log_file": str(log_file), "environment": dict(environment)}
        try:
            with theirs:
                socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs.fileno()])
            process = int.from_bytes(self._socket.recv(8, socket.MSG_WAITALL), "little")
        except OSError as error:
            process, reason = 0, str(error)
        else:
            reason = "it has ended"
        if not process:
            ours.close()
            raise MachineError(f"the process that workers are forked from: {reason}. Run again.")
        return process, ours

    def close(self) -> None:
        """End it and all of its workers."""
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _one_thread() -> dict[str, str]:
    """Numeric libraries would start threads when they are imported, and a process with threads cannot be forked."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _main(descriptor: int) -> None:
    """The server: import, then fork for each request until the owner is gone."""
    owner = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all: the driver ends the run
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers leave nothing behind
    import hethub.launch.worker  # noqa: F401  # all that a worker needs

    gc.collect()
    gc.freeze()  # the collector would write to, and so copy, what forks share
    owner.sendall(_READY)
    while True:
        data, descriptors, _, _ = socket.recv_fds(owner, _REQUEST_BYTES, 1)
        if not data:
            os._exit(0)
        here = os.getpid()
        process = os.fork()
        if process == 0:
            owner.close()
            _become_worker(json.loads(data), descriptors[0], here)
        os.close(descriptors[0])
        owner.sendall(process.to_bytes(8, "little"))


def _become_worker(request: dict[str, object], descriptor: int, parent: int) -> None:
    end_with(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(str(request["log_file"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    environment = request["environment"]
    assert isinstance(environment, dict)
    os.environ.update(environment)
    device = int(str(request["device"]))
    sees = "".join(f", {name}={value}" for name, value in environment.items())
    print(f"device index {device}, process {os.getpid()}, host {socket.gethostname()}{sees}", flush=True)  # noqa: T201
    # Needs no lock that a hung thread may hold.
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    serve(socket.socket(fileno=descriptor), device)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
