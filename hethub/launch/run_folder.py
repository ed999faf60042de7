"""The run folder: one running job at a time, its own finished folder replaced, anyone else's left alone."""

from __future__ import annotations

import fcntl
import re
import shutil
from pathlib import Path
from typing import Any, TextIO

from hethub.checkpoints.store import CHECKPOINTS
from hethub.errors import InputError
from hethub.files import write_json
from hethub.launch.lease import LEASE, Lease

__all__ = ["MARK", "SUMMARY", "RunFolder"]

MARK = "run.json"  # written first: says that this folder is a run of ours
_LOCK = "run.lock"
SUMMARY = "summary.json"  # written last: says that the run is whole
# What a driver that is killed before the mark is written may leave.
_BEFORE_MARK = re.compile(
    rf"{re.escape(_LOCK)}|{re.escape(LEASE)}(\.[0-9a-f]{{32}})?|{re.escape(MARK)}\.\d+\.tmp"
)


class RunFolder:
    """An exclusively held output folder.

    Opening refuses a folder that holds anything but a HetHub run, and one whose run is going on; a finished or failed
    run is emptied. Raises InputError, with nothing written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None
        self.lease = Lease(path)

    def check(self) -> None:
        """Refuse what `open` would, without touching anything."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path}: output is a file. Name a folder that does not exist yet.")
        strangers = (entry for entry in self.path.iterdir() if not _BEFORE_MARK.fullmatch(entry.name))
        if any(strangers) and not (self.path / MARK).is_file():
            raise InputError(
                f"{self.path}: output is in use (it holds files that no run wrote). Name another folder."
            )
        if (self.path / _LOCK).exists():
            with (self.path / _LOCK).open("a") as stream:
                if not _try_lock(stream):
                    raise InputError(
                        f"{self.path}: output is in use by a running job. Name another folder or stop it."
                    )

    def check_resumable(self) -> None:
        """Refuse what `reopen` would, without touching anything."""
        if not (self.path / MARK).is_file():
            raise InputError(f"{self.path}: is no folder of a run. Give one that `hethub launch` made.")
        if (self.path / SUMMARY).exists():
            raise InputError(
                f"{self.path}: this run has come to its end. Launch its job again for another one."
            )
        self.check()

    def reopen(self) -> None:
        """Take the folder of an unfinished run as it is. Raises InputError while another driver runs it."""
        self.check_resumable()
        self._take()
        (self.path / "logs").mkdir(exist_ok=True)  # a launch may have been killed before it made them

    def open(self, mark: dict[str, Any]) -> None:
        """Take the folder, write `mark` as run.json, and empty what an earlier run left.

        In this order, checkpoints first: a folder that was emptied by half is still that of a run, which is not whole
        and does not go on from a step whose history is gone.
        """
        self.check()
        self._take()
        (self.path / SUMMARY).unlink(missing_ok=True)
        write_json(self.path / MARK, mark)
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name != CHECKPOINTS):
            if entry.name in (MARK, _LOCK, LEASE):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self.path / "logs").mkdir()

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a")
        except OSError as error:
            raise InputError(
                f"{self.path}: output cannot be made ({error.strerror}). Name another folder."
            ) from error
        if not _try_lock(lock):
            lock.close()
            raise InputError(
                f"{self.path}: output is in use by a running job. Name another folder or stop it."
            )
        self._lock = lock  # from here on `close` lets go of it
        try:
            self.lease.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the folder, where it is ours; its files stay."""
        if self._lock is not None:
            self.lease.release()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            (self.path / _LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _try_lock(stream: TextIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
