"""What a run folder says of its run: does it go on, how far is it, how did it end and why. Only reads, without torch
or Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from hethub.checkpoints.store import CHECKPOINTS, Store
from hethub.errors import InputError
from hethub.launch.drift import NORMAL
from hethub.launch.history import HISTORY, Entry, history_file
from hethub.launch.journal import Event, read_journal
from hethub.launch.lease import Driver, driver_of
from hethub.launch.run_folder import MARK, SUMMARY

__all__ = ["RunState", "State", "goes_on", "list_runs", "read_run"]

State = Literal["starting", "running", "recovering", "finishing", "finished", "stopped", "failed", "lost"]
GOING_ON: frozenset[State] = frozenset(("starting", "running", "recovering", "finishing"))

_TAIL_BYTES = 1 << 14  # of a history, whose lines are short where they hold no digests


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as its folder tells. None: not known.

    `restarts` counts how often it began again, after a failure or resumed. `steps_done` counts what all devices of the
    newest attempt have recorded, `at_steps` are the lowest and the highest step that a device is in now.
    `drift` has measured over predicted seconds of each device or link that has moved away from its prediction.
    `ended_unix_seconds` of a lost run is when its driver last gave a sign of life. `exit_code` is what the command
    ended with, of a finished and a failed run.
    """

    folder: str
    state: State
    why: str
    hethub: str | None
    job_file: str | None
    cluster: str | None
    emulated: bool | None
    host: str | None
    process: int | None
    started_unix_seconds: float | None
    ended_unix_seconds: float | None
    steps: int | None
    steps_done: int
    at_steps: tuple[int, int] | None
    attempt: int
    restarts: int
    devices: tuple[str, ...]
    loss: float | None
    heldout_loss: float | None
    checkpoint_step: int | None
    drift: dict[str, float]
    exit_code: int | None

    @property
    def goes_on(self) -> bool:
        """Whether a driver is at work on it."""
        return self.state in GOING_ON

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def read_run(folder: Path) -> RunState:
    """The state of a run. Raises InputError where `folder` is not a run's."""
    mark = _mark(folder)
    events, _ = read_journal(folder)
    driver = driver_of(folder)
    finished = (folder / SUMMARY).is_file()
    state, why = _state(events, driver, finished=finished)
    began = next((event for event in reversed(events) if event.event == "began"), None)
    devices = () if began is None else began.devices
    done, loss = _progress(folder, began)
    return RunState(
        folder=str(folder),
        state=state,
        why=why,
        hethub=_text(mark.get("hethub")),
        job_file=_text(mark.get("job_file")),
        cluster=_text(mark.get("cluster")),
        emulated=mark["emulated"] if isinstance(mark.get("emulated"), bool) else None,
        host=None if driver is None else driver.host,
        process=None if driver is None else driver.process,
        started_unix_seconds=_number(mark.get("started_unix_seconds")),
        ended_unix_seconds=_ended(folder, state, events, driver),
        steps=int(mark["steps"]) if isinstance(mark.get("steps"), int) else None,
        steps_done=done,
        at_steps=_at_steps(folder / "beacon.bin") if state in ("running", "recovering") else None,
        attempt=0 if began is None else began.attempt,
        restarts=max(0, sum(event.event == "began" for event in events) - 1),
        devices=devices,
        loss=loss,
        heldout_loss=next((e.loss for e in reversed(events) if e.event == "evaluated"), None),
        checkpoint_step=max(
            (one.step for one in Store(folder / CHECKPOINTS).listed() if one.manifest is not None),
            default=None,
        ),
        drift=_drift(events),
        exit_code=_exit_code(state, events),
    )


def goes_on(folder: Path) -> bool:
    """Whether a driver is at work on a run: what is asked again and again, without all else that a state tells."""
    events, _ = read_journal(folder)
    state, _ = _state(events, driver_of(folder), finished=(folder / SUMMARY).is_file())
    return state in GOING_ON


def list_runs(root: Path) -> list[RunState]:
    """The runs in a folder or right below it, newest first; those that cannot be read are left out.

    Raises InputError where there is no such folder, or one that cannot be read.
    """
    try:
        inside = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{root}: no such folder. Give one that holds run folders.") from None
    except OSError as error:
        raise InputError(
            f"{root}: cannot be read ({error.strerror}). Give a folder that you may list."
        ) from error
    with ThreadPoolExecutor(8) as readers:  # a driver on another host is watched for seconds
        found = [run for run in readers.map(_run_in, (root, *inside)) if run is not None]
    return sorted(found, key=lambda run: run.started_unix_seconds or 0.0, reverse=True)


def _run_in(folder: Path) -> RunState | None:
    """The state of a run, None where there is none that can be read: no run, damaged, or another user's."""
    try:
        return read_run(folder)
    except (InputError, OSError):
        return None


def _mark(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise InputError(f"{folder}: is no folder of a run. Give one that `hethub launch` made.")


def _state(events: Sequence[Event], driver: Driver | None, *, finished: bool) -> tuple[State, str]:
    """What the run is doing, and why it ended where it did."""
    if finished:
        return "finished", ""
    last = events[-1] if events else None
    if driver is not None and driver.alive:
        own = last is not None and last.at_unix_seconds >= driver.since_unix_seconds
        return _doing(last if own else None)
    if driver is None and last is not None and last.event == "stopped":
        return "stopped", "asked to stop"
    if driver is None and last is not None and last.event in ("gave_up", "failed"):
        return "failed", _failure(last)
    where = "" if driver is None else f" (process {driver.process} on {driver.host})"
    return "lost", f"its driver{where} is gone without a word"


def _doing(last: Event | None) -> tuple[State, str]:
    """What a driver at work is at, by what it wrote last. It writes why it ends before it takes its workers down."""
    if last is None:
        return "starting", ""
    if last.event == "failed" and last.goes_on:
        return "recovering", f"attempt {last.attempt} failed: {_failure(last)}"
    if last.event in ("failed", "gave_up"):
        return "finishing", _failure(last)
    if last.event == "stopped":
        return "finishing", "asked to stop"
    return ("finishing" if last.event == "ended" else "running"), ""


def _failure(event: Event) -> str:
    place = ", ".join(part for part in (event.device, event.action) if part)
    return f"{place}: {event.reason}" if place else event.reason


def _ended(folder: Path, state: State, events: Sequence[Event], driver: Driver | None) -> float | None:
    if state == "finished":
        return (folder / SUMMARY).stat().st_mtime
    if state in GOING_ON:
        return None
    if driver is not None:
        return driver.seen_unix_seconds
    return events[-1].at_unix_seconds if events else None


def _exit_code(state: State, events: Sequence[Event]) -> int | None:
    if state == "finished":
        return 0
    return events[-1].exit_code if state == "failed" and events else None


def _drift(events: Sequence[Event]) -> dict[str, float]:
    """As told last in the newest attempt, those left out that are back to normal or hold nobody up any more."""
    found: dict[str, float | None] = {}
    for event in events:
        if event.event == "began":
            found = {}
        elif event.event == "moved":
            found[event.device or event.link] = event.ratio
    return {
        name: ratio
        for name, ratio in found.items()
        if ratio is not None and not 1 / NORMAL <= ratio <= NORMAL
    }


def _progress(folder: Path, began: Event | None) -> tuple[int, float | None]:
    """Steps that all devices of the newest attempt have recorded, and the loss of the last of them."""
    if began is None:
        return 0, None
    done: list[int] = []
    losses: dict[int, float] = {}
    for device in began.devices:
        entry = _last_entry(history_file(folder / HISTORY, device))
        fresh = entry is not None and entry.attempt == began.attempt
        done.append(entry.step + 1 if entry is not None and fresh else began.step)
        if entry is not None and fresh:
            losses[entry.step + 1] = float.fromhex(entry.loss)
    least = min(done, default=began.step)
    loss = losses.get(least)
    return least, loss if loss is not None and np.isfinite(loss) else None


def _last_entry(file: Path) -> Entry | None:
    """The last whole line of a history, without reading what comes before."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            taken = min(_TAIL_BYTES, size)
            while True:
                stream.seek(size - taken)
                lines = stream.read(taken).split(b"\n")[:-1]
                if len(lines) > 1 or taken == size:
                    return Entry.model_validate_json(lines[-1]) if lines else None
                taken = min(2 * taken, size)
    except (OSError, ValidationError):
        return None


def _at_steps(beacon: Path) -> tuple[int, int] | None:
    """The lowest and the highest step that a device is in."""
    try:
        steps = np.fromfile(beacon, dtype=np.int64).reshape(-1, 2)[:, 0]
    except (OSError, ValueError):
        return None
    steps = steps[steps >= 0]
    return (int(steps.min()), int(steps.max())) if len(steps) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
