"""The driver's journal of a run: its attempts, what ended each, and what going on took.

One line of JSON an event in `attempts.jsonl`, appended and synced. The history tells what was trained; this tells why
it took so many attempts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from hethub.launch.history import mend, whole_lines
from hethub.specs.base import Spec

__all__ = ["JOURNAL", "Event", "Journal", "read_journal"]

JOURNAL = "attempts.jsonl"


class Event(Spec):
    """One line of the journal."""

    event: Literal["began", "failed", "recovered", "evaluated", "stopped", "ended", "gave_up", "moved"]
    attempt: int = Field(ge=1, description="Counted from 1 over all drivers of the run; never used twice.")
    at_unix_seconds: float = Field(0.0, ge=0, description="When it was written, by this host's clock.")
    step: int = Field(ge=0, description="began: the first step. failed: where it was. Else: steps done.")
    plan: str = Field("", description="began: digest of the plan.")
    devices: tuple[str, ...] = Field((), description="began: those in use.")
    cause: str = Field("", description="failed: worker, node, link, stall, memory, data or not-a-number.")
    device: str = Field("", description="failed: the one that failed first. moved: the one that did.")
    link: str = Field("", description="moved: the link, where it was one.")
    ratio: float | None = Field(
        None, description="moved: measured over predicted seconds; none: nobody waits."
    )
    action: str = Field("", description="failed: what it was at.")
    reason: str = Field("", description="failed, gave_up: why; one line. moved: in words.")
    lost: tuple[str, ...] = Field((), description="failed: devices that the next attempt does without.")
    goes_on: bool = Field(True, description="failed: whether another attempt follows.")
    loss: float | None = Field(None, description="evaluated: held-out loss.")
    seconds: dict[str, float] = Field({}, description="recovered: wall seconds by part.")
    exit_code: int | None = Field(None, description="gave_up: what the command ended with.")
    counts: dict[str, int] = Field(
        {}, description="ended, stopped: restarts, checkpoints, checkpoint failures."
    )


class Journal:
    """Appends to a run's journal."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        mend(self.path)

    def add(self, event: Event) -> None:
        """Append an event and sync it."""
        event = event.model_copy(update={"at_unix_seconds": time.time()})
        line = event.model_dump_json(exclude_defaults=True).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_journal(folder: Path) -> tuple[list[Event], list[str]]:
    """All events, and a line for each whole line that is none; a torn last line is none. [] where there is no file."""
    try:
        return whole_lines(folder / JOURNAL, Event, "event of a run")
    except OSError:
        return [], []
