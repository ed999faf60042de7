"""The launcher: the process that a user starts. It forks the driver before anything heavy is imported; it outlives it.

Ray ends a driver whose head is gone without an exception, and a driver may crash or be killed: the launcher says so,
and where the job's policy goes on after failures it starts another one, which goes on from the newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hethub.checkpoints.restarts import Cause, decide
from hethub.errors import HeadLostError
from hethub.parents import adopt_orphans, end_orphans, end_with
from hethub.specs.job import FailurePolicy

__all__ = ["DriverPlace", "start_driver"]

_OPENED = b"o"
_FAILED = 1  # exit code


@dataclass(frozen=True, slots=True)
class DriverPlace:
    """In the driver's process: whether it goes on with the run of one before it, and what it tells the launcher."""

    resume: bool
    pipe: int

    def opened(self, folder: Path) -> None:
        """The run folder is ours: from here on another driver can go on."""
        os.write(self.pipe, _OPENED)


def start_driver(
    policy: FailurePolicy,
    folder: Path,
    say: Callable[[str], None],
    opened: Sequence[Callable[[Path], None]],
    *,
    resume: bool,
) -> DriverPlace:
    """Fork the driver. Returns in its process only, once in each; the launcher's ends with the last one's exit code.

    SIGINT and SIGTERM that reach the launcher are passed on. Nothing that a driver has started outlives it. All of
    `opened` are called with the folder in the launcher too, once a driver that had opened it is gone.
    """
    started_at: list[float] = []
    adopt_orphans()
    while True:
        reader, writer = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        driver = os.fork()
        if not driver:
            os.close(reader)
            os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, from the launcher
            end_with(parent)
            return DriverPlace(resume, writer)
        os.close(writer)
        code = _wait(driver)
        end_orphans()  # of a driver that was killed, what it had started of Ray
        with os.fdopen(reader, "rb") as stream:
            told = stream.read()
        if code >= 0 and code != HeadLostError.exit_code:
            sys.exit(code)
        why = f"was killed by {signal.Signals(-code).name}" if code < 0 else "has lost the Ray head"
        if not told:
            say(f"hethub: the driver (process {driver}) {why} before the run began. Launch it again.")
            sys.exit(_FAILED)
        for tell in opened:  # of a detached launch: write where the driver wrote, before a word is said
            tell(folder)
        now = time.monotonic()
        decision = decide(Cause.DRIVER, policy, started_at, now)
        say(f"hethub: the driver (process {driver}) {why}.")
        if not decision.restart:
            say(f"hethub: not restarted: {decision.why}. To go on: hethub launch --resume {folder}")
            sys.exit(_FAILED)
        say("going on with another driver")
        started_at.append(now)
        resume = True


def _wait(driver: int) -> int:
    """The driver's exit code, or minus the signal that killed it."""

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(driver, number)  # not waited for yet, so the number is still its own

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
