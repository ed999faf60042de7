"""The job's store, on one address only; the connections of a process group, and a way to cut them.

Neither `destroy_process_group` nor `abort` of torch 2.13's gloo closes a connection while a receive is posted on it,
and a worker that fails has many. Its peers would wait for it until their time-out, minutes, although it has left. A
socket that is shut down tells them at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the driver imports torch beside other work
    from torch.distributed import TCPStore

__all__ = ["Connections", "open_store"]


def open_store(host: str) -> TCPStore:
    """The job's store, listening on `host` alone and a free port: torch's own listens on every interface, and whoever
    reaches a store can write into it. Raises OSError where that is no address of this machine."""
    from torch.distributed import TCPStore

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


class Connections:
    """Connections that this process opens between `Connections()` and `note`. Where the system does not list them
    (it needs Linux's /proc) there are none, and `cut` does nothing."""

    def __init__(self) -> None:
        self._before = _connected()
        self._ours: Mapping[int, str] = {}

    def note(self) -> None:
        """What is new by now is ours."""
        self._ours = {fd: name for fd, name in _connected().items() if self._before.get(fd) != name}

    def cut(self) -> None:
        """Shut down those that are still the same: whoever waits at either end fails."""
        for descriptor, name in self._ours.items():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}") == name:
                    with socket.socket(fileno=os.dup(descriptor)) as found:
                        found.shutdown(socket.SHUT_RDWR)
        self._ours = {}


def _connected() -> dict[int, str]:
    """File descriptor -> name of each connected TCP socket."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if name.startswith("socket:"):
                    with socket.socket(fileno=os.dup(int(entry.name))) as one:
                        if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername():
                            found[int(entry.name)] = name
    return found
