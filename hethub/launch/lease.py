"""A run's lease: who drives it. One driver at a time, on whatever host, and none that has been replaced goes on.

The file names its holder by a token and is touched as long as the holder lives. Others compare two looks at it, so no
two clocks are compared. A lock of the file system tells sooner, but only on one host.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from hethub.errors import InputError

__all__ = ["LEASE", "Lease", "LeaseWatch"]

LEASE = "lease.json"  # of the run folder
BEAT_SECONDS = 1.0
OBSERVE_SECONDS = 4.0  # how long a lease must stand still until it is another's
LIMIT_SECONDS = 20.0  # a worker whose lease has stood still for so long ends itself


class Lease:
    """A lease on a run folder, held from `take` to `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEASE
        self.token = secrets.token_hex(16)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease and keep it. Raises InputError while another driver, on any host, holds it."""
        if not self._stale():
            holder = _read(self.path)
            raise InputError(
                f"{self.path.parent}: another driver runs it: process {holder.get('process')} on {holder.get('host')}. "
                "Stop that one, or wait for its end."
            )
        temporary = self.path.with_name(f"{LEASE}.{self.token}")
        temporary.write_text(
            json.dumps({"token": self.token, "host": socket.gethostname(), "process": os.getpid()}),
            encoding="utf-8",
        )
        os.replace(temporary, self.path)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether it is still ours: false once another driver has taken the run over."""
        return _read(self.path).get("token") == self.token

    def release(self) -> None:
        """Let go."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.held():
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            if not self.held():
                return
            os.utime(self.path)

    def _stale(self) -> bool:
        holder = _read(self.path)
        if not holder:
            return True
        if holder.get("host") == socket.gethostname() and not _alive(holder.get("process")):
            return True
        before, end = _touched(self.path), time.monotonic() + OBSERVE_SECONDS
        while time.monotonic() < end:
            if _touched(self.path) != before:
                return False
            self._end.wait(BEAT_SECONDS / 4)
        return True


class LeaseWatch:
    """What a worker knows of its driver's lease: how long it has stood still by this process's own clock."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._seen = _touched(path)
        self._since = time.monotonic()

    def lost(self) -> bool:
        """Whether the driver is gone: its lease has stood still too long, or is another's."""
        seen = _touched(self._path)
        if seen is None or _read(self._path).get("token") != self._token:
            return (
                time.monotonic() - self._since > 2 * BEAT_SECONDS
            )  # a released lease: the driver ends the workers
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > LIMIT_SECONDS


def _read(path: Path) -> dict[str, object]:
    """A lease's content; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _alive(process: object) -> bool:
    """Whether there is such a process on this host; a number that is none counts as alive, which only costs time."""
    if not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
