"""`hethub launch --detach`: the launch goes on in a process of its own session, which outlives the terminal.

The process is a fork, made before anything heavy is imported. It writes into a temporary file until the run folder is
there, then into that folder's logs; drivers that come after the first do so at once. The one that was started waits
until training has begun or the launch has ended, so whatever is wrong at the start still reaches the user, with its
exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import typer

from hethub.cli.logs import DRIVER_LOG
from hethub.cli.runs import printable_cells

__all__ = ["Detached", "detach"]

_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Detached:
    """In the process that goes on: where it writes so far."""

    log: Path

    def opened(self, folder: Path) -> None:
        """Write into the run folder's logs from here on, beginning with what was written before unless an earlier
        driver of this launch has moved that."""
        target = folder / "logs" / DRIVER_LOG
        sys.stdout.flush()
        sys.stderr.flush()
        if self.log.exists():
            with self.log.open("rb") as before, target.open("ab") as after:
                after.write(before.read())
        _write_to(target)
        self.log.unlink(missing_ok=True)


def detach(output: Path, *, resume: bool, as_json: bool) -> Detached:
    """Fork. Returns in the new process only; the old one ends itself when the run in `output` has begun to train
    (exit code 0) or the new one has ended (with its exit code)."""
    descriptor, name = tempfile.mkstemp(prefix="hethub-launch-", suffix=".log")
    os.close(descriptor)
    log, target, began_after = Path(name), output / "logs" / DRIVER_LOG, time.time()
    before = target.stat().st_size if resume and target.exists() else 0
    child = os.fork()
    if child:
        sys.exit(_wait(child, _Start(log, target, before), output, began_after, as_json=as_json))
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _write_to(log)
    return Detached(log)


def _write_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@dataclass(slots=True)
class _Start:
    """What the launch writes while it starts: into `log`, then from byte `before` on into `target`."""

    log: Path
    target: Path
    before: int
    shown: int = 0

    def show(self) -> None:
        """Pass on what is new."""
        path, at = (self.log, 0) if self.log.exists() else (self.target, self.before)
        try:
            with path.open("rb") as stream:
                stream.seek(at + self.shown)
                read = stream.read()
        except OSError:
            return
        self.shown += len(read)
        sys.stderr.write(read.decode("utf-8", errors="replace"))
        sys.stderr.flush()


def _wait(child: int, start: _Start, output: Path, began_after: float, *, as_json: bool) -> int:
    """Pass on what the launch says of its start. It has the terminal's signals no more, so Ctrl-C is passed on too."""
    try:
        while True:
            ended, outcome = os.waitpid(child, os.WNOHANG)
            begun = _began(output, began_after)
            start.show()
            code = os.waitstatus_to_exitcode(outcome) if ended else 0
            if code:
                return code
            if ended or begun:
                _tell(output, child, as_json=as_json)
                return 0
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        start.log.unlink(missing_ok=True)


def _tell(output: Path, process: int, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"run": str(output), "process": process}))
        return
    name = shlex.quote(str(output))
    for line in (
        f"run\t{output}",
        f"launcher\tprocess {process}",
        f"follow it\thethub logs {name} --follow",
        f"its state\thethub status {name}",
    ):
        typer.echo(printable_cells(line))


def _began(output: Path, after: float) -> bool:
    """Whether an attempt of a driver that was started `after` has begun."""
    from hethub.launch.journal import read_journal

    events, _ = read_journal(output)
    return any(event.event == "began" and event.at_unix_seconds >= after for event in events)
