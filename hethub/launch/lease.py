"""A run's lease: who drives it. One driver at a time, on whatever host, and none that has been replaced goes on.

The file names its holder by a token and is touched as long as the holder lives. Others compare two looks at it, so no
two clocks are compared. A lock of the file system tells sooner, but only on one host.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hethub.errors import InputError

__all__ = ["LEASE", "Driver", "Lease", "LeaseWatch", "driver_of"]

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
            json.dumps(
                {
                    "token": self.token,
                    "host": socket.gethostname(),
                    "process": os.getpid(),
                    "taken_unix_seconds": time.time(),
                }
            ),
            encoding="utf-8",
        )
        os.replace(temporary, self.path)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether it is still ours: false once another driver has taken the run over, or the file is gone. One that
        cannot be read just now says neither, and counts as ours."""
        try:
            return _content(self.path).get("token") == self.token
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def release(self) -> None:
        """Let go."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            if not self.held():
                return
            with contextlib.suppress(OSError):  # a fault that passes: the next beat is soon enough
                os.utime(self.path)

    def _stale(self) -> bool:
        holder = _read(self.path)
        if not holder:
            return True
        if holder.get("host") == socket.gethostname() and not _alive(holder.get("process")):
            return True
        return _stands_still(self.path, self._end)


class LeaseWatch:
    """What a worker knows of its driver's lease: how long it has stood still by this process's own clock."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._seen = _touched(path)
        self._since = time.monotonic()

    def lost(self) -> bool:
        """Whether the driver is gone: its lease has stood still too long, or is another's. One that is not seen, be it
        released or out of reach for a moment, stands still: a driver that releases it ends its workers itself."""
        seen, token = _touched(self._path), _read(self._path).get("token")
        if token is not None and token != self._token:
            return time.monotonic() - self._since > 2 * BEAT_SECONDS
        if token == self._token and seen is not None and seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > LIMIT_SECONDS


@dataclass(frozen=True, slots=True)
class Driver:
    """Who holds a run's lease: a process on a host. `alive` says whether it still does its work; `seen_unix_seconds` is
    when it last said so, by the file system's clock, `since_unix_seconds` when it took the run, by its own."""

    host: str
    process: int | None
    alive: bool
    seen_unix_seconds: float
    since_unix_seconds: float


def driver_of(folder: Path) -> Driver | None:
    """The driver that a run folder names, None where there is none. Takes up to OBSERVE_SECONDS where it is on another
    host, since two clocks are not compared."""
    path = folder / LEASE
    holder, touched = _read(path), _touched(path)
    if not holder or touched is None:
        return None
    host, process, seen = str(holder.get("host")), holder.get("process"), touched / 1e9
    if host == socket.gethostname():
        # A process that is stopped, or another one under its number, touches nothing.
        alive = _alive(process) and time.time() - seen < LIMIT_SECONDS
    else:
        alive = not _stands_still(path, threading.Event())
    taken = holder.get("taken_unix_seconds")
    since = float(taken) if isinstance(taken, int | float) else 0.0
    return Driver(host, process if isinstance(process, int) else None, alive, seen, since)


def _stands_still(path: Path, end: threading.Event) -> bool:
    """Whether nobody touches a lease for OBSERVE_SECONDS."""
    before, until = _touched(path), time.monotonic() + OBSERVE_SECONDS
    while time.monotonic() < until:
        if _touched(path) != before:
            return False
        end.wait(BEAT_SECONDS / 4)
    return True


def _read(path: Path) -> dict[str, object]:
    """A lease's content; empty where there is none that can be read."""
    try:
        return _content(path)
    except OSError:
        return {}


def _content(path: Path) -> dict[str, object]:
    """The same. Raises OSError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _alive(process: object) -> bool:
    """Whether there is such a process on this host; a number that is none counts as alive, which only costs time. One
    that has ended and was not waited for yet is none."""
    if not isinstance(process, int):
        return True
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        return not select.select([descriptor], [], [], 0)[0]
    finally:
        os.close(descriptor)
