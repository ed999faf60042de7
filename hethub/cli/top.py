"""`hethub top RUN`: a run as it goes, in the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hethub.cli.runs import Run, printable_cells, run_lines
from hethub.errors import InputError, printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

    from hethub.telemetry.scrape import Look
    from hethub.telemetry.view import DeviceView, RunView

__all__ = ["top"]

# Activity -> colour of its part of a bar, and the letter where there are no colours.
_PARTS = {
    "busy": ("green", "#"),
    "recompute": ("magenta", "r"),
    "exposed_communication": ("red", "x"),
    "bubble": ("bright_black", "."),
    "idle": ("white", " "),
    "unaccounted": ("yellow", "?"),
    "checkpoint": ("cyan", "c"),
    "evaluation": ("blue", "e"),
    "stalled": ("red", "!"),
}
_HEAD_LINES = 9  # of the view, around the rows of devices
_OFF = 1.25  # times its predicted compute: shown as a warning


def top(
    run: Run,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between looks.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print one JSON object.")] = False,
) -> None:
    """Watch a run: step, loss, speed against prediction and bounds, and where every device's time goes. Ctrl-C leaves.

    Reads the endpoints that the run names, so it works for nodes elsewhere. Without a terminal it looks twice, and
    prints what was done between the looks.

    Example: hethub top runs/demo
    """
    from hethub.launch.run_state import read_run
    from hethub.telemetry.view import view_of

    if not read_run(run).goes_on:
        _ended(run, as_json=as_json)
        return
    before = _look(run)
    if as_json or not sys.stdout.isatty():
        after = _next_look(run, every)
        if after is None:
            _ended(run, as_json=as_json)
            return
        view = view_of(before, after, _alerts(run))
        typer.echo(json.dumps(view.as_dict(), indent=2) if as_json else "\n".join(_plain(view)))
        return
    try:
        _live(run, before, every)
    except KeyboardInterrupt:
        return
    _ended(run, as_json=False)


def _look(run: Path) -> Look:
    from hethub.telemetry.folder import TARGETS, TELEMETRY
    from hethub.telemetry.scrape import look_at, targets_of

    return look_at(targets_of(run / TELEMETRY / TARGETS), time.monotonic())


def _next_look(run: Path, every: float) -> Look | None:
    """The look after `every` seconds, or the first one after that: a run that writes its last files has taken its
    endpoints back. None where it has ended."""
    from hethub.launch.run_state import goes_on

    while True:
        time.sleep(every)
        try:
            return _look(run)
        except InputError:
            if not goes_on(run):
                return None


def _alerts(run: Path) -> tuple[str, ...]:
    """What the driver has told of drift and failures."""
    from hethub.launch.run_state import read_run

    state = read_run(run)
    words = tuple(f"{name} takes {ratio:.2f} x its predicted time" for name, ratio in state.drift.items())
    return (*words, *((state.why,) if state.why else ()))


def _ended(run: Path, *, as_json: bool) -> None:
    from hethub.launch.run_state import read_run

    found = read_run(run)
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(run_lines(found)))


# --- plain ------------------------------------------------------------------------------------------------


def _plain(view: RunView) -> list[str]:
    """Tab-separated: facts of the run after `#`, a header, a line a device."""
    lines = [f"# {name}\t{value}" for name, value in _facts(view)]
    lines += [f"# alert\t{alert}" for alert in view.alerts]
    lines.append("\t".join(["device", "device_type", "stage", *_PARTS, "compute_over_predicted"]))
    for device in view.devices:
        shares = [f"{device.shares[part]:.4f}" if device.shares else "" for part in _PARTS]
        pace = "" if device.pace is None else f"{device.pace:.3f}"
        lines.append("\t".join([device.name, device.device_type, device.stage, *shares, pace]))
    return [printable_cells(line) for line in lines]


def _facts(view: RunView) -> list[tuple[str, str]]:
    """Figures of the run that are known, in words."""
    of = "" if view.steps is None else f" of {view.steps}"
    mark = " (emulated, modelled time)" if view.emulated else ""
    known: list[tuple[str, Any, str]] = [
        ("run", view.run, f"{view.run}, {view.state}"),
        ("step", view.step, f"{view.step}{of}"),
        ("loss", view.loss, f"{view.loss or 0.0:.4f}"),
        ("held-out loss", view.heldout_loss, f"{view.heldout_loss or 0.0:.4f}"),
        ("tokens/s", view.tokens_per_second, f"{view.tokens_per_second or 0.0:,.0f}{mark}"),
        ("of prediction", view.share_of_prediction, f"{view.share_of_prediction or 0.0:.1%}"),
        (
            "of homogeneous bound",
            view.share_of_homogeneous_bound,
            f"{view.share_of_homogeneous_bound or 0.0:.1%}",
        ),
        ("of physical bound", view.share_of_physical_bound, f"{view.share_of_physical_bound or 0.0:.1%}"),
        ("MFU", view.mfu, f"{view.mfu or 0.0:.1%}"),
        ("goodput", view.goodput, f"{view.goodput or 0.0:.1%}"),
        ("time left", view.seconds_left, f"{view.seconds_left or 0.0:,.0f} s"),
    ]
    return [(name, words) for name, value, words in known if value is not None]


# --- live -------------------------------------------------------------------------------------------------


def _live(run: Path, before: Look, every: float) -> None:
    """Show the run until it ends."""
    from rich.console import Console
    from rich.live import Live

    from hethub.launch.run_state import goes_on
    from hethub.telemetry.view import view_of

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while goes_on(run):
            after = _next_look(run, every)
            if after is None:
                return
            live.update(_screen(view_of(before, after, _alerts(run)), console), refresh=True)
            if after.samples.one("hethub_steps_total") != before.samples.one("hethub_steps_total"):
                before = after  # a step may take longer than the time between two looks


def _screen(view: RunView, console: Console) -> Group:
    from rich.console import Group
    from rich.text import Text

    facts = Text("   ").join(
        Text.assemble((name, "dim"), " ", printable(words)) for name, words in _facts(view)
    )
    parts = Text("   ").join(
        Text.assemble((mark if console.no_color else "\u2588", colour), " ", name.replace("_", " "))
        for name, (colour, mark) in _PARTS.items()
    )
    alerts = [
        Text(printable(f"! {alert}"), "bold red", overflow="ellipsis", no_wrap=True) for alert in view.alerts
    ]
    room = max(1, console.height - _HEAD_LINES - len(alerts))
    chosen = _least_busy(view.devices, room)
    rows = [_row(device, console) for device in chosen]
    hidden = len(view.devices) - len(chosen)
    more = [Text(f"and {hidden} devices that are busier", "dim")] if hidden else []
    return Group(facts, Text(), *alerts, *rows, *more, Text(), parts)


def _least_busy(devices: tuple[DeviceView, ...], room: int) -> list[DeviceView]:
    """All devices, or those least busy where there is no room for all, in the order of their names."""
    least = sorted(devices, key=lambda device: device.shares.get("busy", 0.0))[:room]
    return [device for device in devices if device in least]


def _row(device: DeviceView, console: Console) -> Text:
    """A device in a line: name, type, stage, bar, busy, pace, memory."""
    from rich.text import Text

    wide = console.width >= 100
    long = 14 if wide else 10
    name = f"{printable(device.name):<{long}.{long}} {printable(device.device_type):<10.10} "
    tail = f" {100 * device.shares.get('busy', 0.0):5.1f} %" if device.shares else "       "
    pace = "" if device.pace is None else f" {device.pace:4.2f}x"
    memory = ""
    if wide and device.memory_bytes is not None and device.memory_limit_bytes:
        memory = f" mem {device.memory_bytes / device.memory_limit_bytes:4.0%}"
    heat = "" if not wide or device.watts is None else f" {device.watts:4.0f} W"
    heat += "" if not wide or device.celsius is None else f" {device.celsius:3.0f} C"
    room = max(8, console.width - len(name) - len(tail) - len(pace) - len(memory) - len(heat) - 1)
    late = "bold red" if device.pace is not None and device.pace > _OFF else ""
    return Text.assemble(name, _bar(device, room, console), tail, (pace, late), memory, heat, no_wrap=True)


def _bar(device: DeviceView, width: int, console: Console) -> Text:
    """The shares as a bar of exactly `width` characters."""
    from rich.text import Text

    bar, done, cells = Text(), 0.0, 0
    for part, (colour, mark) in _PARTS.items():
        done += device.shares.get(part, 0.0)
        end = min(width, round(done * width))
        bar.append((mark if console.no_color else "\u2588") * (end - cells), colour)
        cells = max(cells, end)
    bar.append(" " * (width - cells))
    return bar
