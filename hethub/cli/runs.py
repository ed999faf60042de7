"""`hethub runs`, `hethub status RUN` and `hethub stop RUN`: what runs, how far it is, how it ended, and ending it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from hethub.errors import InputError, RunError, printable

if TYPE_CHECKING:  # numpy and pydantic are loaded when the command runs
    from hethub.launch.run_state import RunState

__all__ = ["Run", "printable_cells", "run_lines", "runs", "status", "stop"]

Run = Annotated[Path, typer.Argument(help="Folder of a run, as `hethub launch` writes it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]

_LOOK_SECONDS = 0.1


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder whose subfolders are runs.")] = Path("runs"),
    as_json: _Json = False,
) -> None:
    """List the runs in a folder, newest first: what goes on, at which step, and how the others ended.

    Example: hethub runs
    """
    from hethub.launch.run_state import list_runs

    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps({"runs": [run.as_dict() for run in found]}, indent=2))
    elif sys.stdout.isatty():
        _print_table(found, folder)
    else:
        typer.echo("\t".join(_HEADINGS))
        for run in found:
            typer.echo("\t".join(map(printable, _row(run))))


def status(run: Run, as_json: _Json = False) -> None:
    """Tell a run's state: since when, on what, at which step, and how and why it ended.

    Example: hethub status runs/demo
    """
    from hethub.launch.run_state import read_run

    found = read_run(run)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    for line in run_lines(found):
        typer.echo(line)


def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="End at once, without a checkpoint.")] = False,
    wait_seconds: Annotated[float, typer.Option(min=0.0, help="How long to wait for the end.")] = 120.0,
    as_json: _Json = False,
) -> None:
    """Stop a run: with a checkpoint where the job makes them and its notice suffices, else by a clean end.

    Sends SIGTERM to the driver, so it works on the driver's host, and waits until the run has ended.

    Example: hethub stop runs/demo
    """
    from hethub.launch.run_state import read_run

    before = read_run(run)
    if not before.goes_on:
        _tell_end(before, "it had ended", as_json=as_json)
        return
    if before.host != socket.gethostname() or before.process is None:
        raise InputError(f"{run}: its driver runs on {before.host}. Stop it there.")
    try:
        for _ in range(2 if now else 1):
            os.kill(before.process, signal.SIGTERM)
            time.sleep(_LOOK_SECONDS)  # two signals at once may be one
    except ProcessLookupError:
        pass  # it has ended by itself just now
    except PermissionError:
        raise InputError(
            f"{run}: its driver, process {before.process}, is {_owner(run)}'s. Stop it as that user."
        ) from None
    end = time.monotonic() + wait_seconds
    while _there(before.process):  # it lets go of the folder a moment before its workers are gone
        if time.monotonic() > end:
            raise RunError(
                f"{run}: process {before.process} has not ended within {wait_seconds:g} s. Wait longer, or use --now."
            )
        time.sleep(_LOOK_SECONDS)
    after = read_run(run)
    _tell_end(after, _how_it_stopped(before, after), as_json=as_json)


def _owner(run: Path) -> str:
    """Who started a run's driver, which wrote its lease."""
    from hethub.launch.lease import LEASE

    try:
        return f"user {(run / LEASE).owner()}"
    except (OSError, KeyError):  # it has ended just now, or is of a user whom this host does not know
        return "another user"


def _there(process: int) -> bool:
    """Whether there is a process that we may signal: another user's has taken the number over."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _how_it_stopped(before: RunState, after: RunState) -> str:
    if after.state != "stopped":
        return f"it came to its own end first: {after.state}" + (f", {after.why}" if after.why else "")
    if after.checkpoint_step is None:
        return f"stopped after {after.steps_done} steps; there is no checkpoint to go on from"
    fresh = after.checkpoint_step != before.checkpoint_step and after.checkpoint_step >= after.steps_done
    saved = "with a checkpoint" if fresh else "without a new checkpoint; the newest is that of"
    where = f" after step {after.checkpoint_step}"
    return f"stopped {saved}{where}. Go on with: hethub launch --resume {quote(after.folder)}"


def _tell_end(found: RunState, words: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"did": words, **found.as_dict()}, indent=2))
        return
    typer.echo(printable(f"{found.folder}: {words}"))
    if found.state != "stopped":
        for line in run_lines(found):
            typer.echo(line)


def run_lines(run: RunState) -> list[str]:
    """A run in lines of `key<tab>value`, fit for a terminal."""
    lines = [f"run\t{run.folder}", f"state\t{run.state}" + (f": {run.why}" if run.why else "")]
    if run.exit_code is not None:
        lines.append(f"exit code\t{run.exit_code}")
    of = "?" if run.steps is None else run.steps
    at = ""
    if run.at_steps is not None:
        low, high = run.at_steps
        at = f"; devices are in step {low}" + (f" to {high}" if high > low else "")
    lines.append(f"steps\t{run.steps_done} of {of}{at}")
    if run.loss is not None:
        lines.append(f"loss\t{run.loss:.4f}")
    if run.heldout_loss is not None:
        lines.append(f"held-out loss\t{run.heldout_loss:.4f}")
    lines.append(f"started\t{_moment(run.started_unix_seconds)}, {_span(run)}")
    if run.ended_unix_seconds is not None:
        word = "last seen" if run.state == "lost" else "ended"
        lines.append(f"{word}\t{_moment(run.ended_unix_seconds)}")
    if run.process is not None:
        lines.append(f"driver\tprocess {run.process} on {run.host}")
    mark = " (emulated)" if run.emulated else ""
    lines.append(f"devices\t{len(run.devices)} of {run.cluster or '?'}{mark}: {_some(run.devices)}")
    if run.attempt > 1 or run.restarts:
        lines.append(f"attempt\t{run.attempt}; began again {run.restarts} times (attempts.jsonl)")
    for name, ratio in run.drift.items():
        lines.append(
            f"drift\t{name} takes {ratio:.2f} x its predicted time; hethub replan {quote(run.folder)}"
        )
    if run.checkpoint_step is not None:
        lines.append(f"checkpoint\tafter step {run.checkpoint_step}")
    if run.job_file is not None:
        lines.append(f"job\t{run.job_file}")
    if run.state in ("lost", "stopped", "failed") and run.checkpoint_step is not None:
        lines.append(f"go on with\thethub launch --resume {quote(run.folder)}")
    return [printable_cells(line) for line in lines]


def printable_cells(line: str) -> str:
    """A line of tab-separated cells, whose names, reasons and labels are others' text."""
    return "\t".join(map(printable, line.split("\t")))


_HEADINGS = ("run", "state", "steps", "loss", "devices", "cluster", "started", "took", "why")


def _row(run: RunState) -> list[str]:
    return [
        Path(run.folder).name,
        run.state,
        f"{run.steps_done}/{'?' if run.steps is None else run.steps}",
        "" if run.loss is None else f"{run.loss:.4f}",
        str(len(run.devices)),
        (run.cluster or "?") + (" (emulated)" if run.emulated else ""),
        _moment(run.started_unix_seconds),
        _span(run),
        run.why,
    ]


def _print_table(found: list[RunState], folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        typer.echo(printable(f"{folder} holds no runs"))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for run in found:
        table.add_row(*(Text(printable(cell)) for cell in _row(run)))
    Console().print(table)


def _moment(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return "?"
    return datetime.fromtimestamp(unix_seconds).astimezone().isoformat(sep=" ", timespec="seconds")


def _span(run: RunState) -> str:
    """How long it has gone on, or took."""
    if run.started_unix_seconds is None:
        return "?"
    seconds = (run.ended_unix_seconds or time.time()) - run.started_unix_seconds
    minutes, rest = divmod(max(0.0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:.0f} h {minutes:.0f} min"
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none yet"
