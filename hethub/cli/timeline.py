"""`hethub timeline RUN`: where every device's time went, predicted beside measured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.simulate.comparison import Comparison
    from hethub.timeline.summary import DeviceSummary, TypeSummary

    _Summary = DeviceSummary | TypeSummary

__all__ = ["timeline"]

# Share and its heading, narrow enough for a table in 80 columns.
_SHARES = (
    ("busy_ratio", "busy"),
    ("recompute_ratio", "re-\ncompute"),
    ("exposed_communication_ratio", "exposed\ncomm."),
    ("bubble_ratio", "bubble"),
    ("idle_ratio", "idle"),
    ("unaccounted_ratio", "un-\naccounted"),
)


def timeline(
    run: Annotated[Path, typer.Argument(help="Folder of a run, as `hethub launch` writes it.")],
    step: Annotated[int | None, typer.Option(help="Show this step alone, not all after the warm-up.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the Gantt chart of one step here.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome/Perfetto trace here.")] = None,
    waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Show what took the time of all devices together, by cause.")
    ] = False,
) -> None:
    """Show where every device's time went, predicted beside measured.

    Example: hethub timeline runs/demo --html timeline.html
    """
    from hethub.simulate.comparison import compare_run

    comparison = compare_run(run, step)
    _write_pictures(comparison, run, html, trace)
    if as_json:
        typer.echo(json.dumps(_as_object(comparison, run), indent=2))
    elif waterfall and sys.stdout.isatty():
        _print_waterfall(comparison, run)
    elif waterfall:
        typer.echo(_waterfall_text(comparison))
    elif sys.stdout.isatty():
        _print_table(comparison, run)
    else:
        typer.echo(_as_text(comparison))
    if not as_json:
        for path in (html, trace):
            if path is not None:
                typer.echo(f"wrote {path}", err=True)


def _write_pictures(comparison: Comparison, run: Path, html: Path | None, trace: Path | None) -> None:
    from hethub.files import writing

    if html is not None:
        from hethub.timeline.gantt import write_gantt

        with writing(html, "Give another --html."):
            write_gantt(html, comparison.predicted, comparison.measured, comparison.typical_step, run.name)
    if trace is not None:
        from hethub.timeline.trace import write_chrome_trace

        steps = range(comparison.first, comparison.last + 1)
        with writing(trace, "Give another --trace."):
            write_chrome_trace(trace, [comparison.predicted, comparison.measured], steps)


# --- ways to print ----------------------------------------------------------------------------------------


def _as_object(comparison: Comparison, run: Path) -> dict[str, Any]:
    from hethub.timeline.summary import by_type

    def side(step_seconds: float, devices: list[DeviceSummary]) -> dict[str, Any]:
        types = [asdict(summary) for summary in by_type(devices)]
        listed = [asdict(summary) for summary in devices]
        return {"step_seconds": step_seconds, "devices": listed, "device_types": types}

    return {
        "run": str(run),
        "emulated": comparison.emulated,
        "time_scale": comparison.measured.info.time_scale,
        "first_step": comparison.first,
        "last_step": comparison.last,
        "predicted": side(comparison.predicted_step_seconds, comparison.predicted_devices),
        "measured": side(comparison.measured_step_seconds, comparison.measured_devices),
        "waterfall": {
            "predicted": comparison.predicted_waterfall.as_dict(),
            "measured": comparison.measured_waterfall.as_dict(),
        },
    }


def _facts(comparison: Comparison) -> list[str]:
    """Return what is true of the whole run, a line each, after `#`."""
    kind = "emulated" if comparison.emulated else "real"
    return [
        f"# {kind}\ttime_scale\t{comparison.measured.info.time_scale:g}",
        f"# steps\t{comparison.first}\t{comparison.last}",
        f"# predicted_step_seconds\t{comparison.predicted_step_seconds:.6g}",
        f"# measured_step_seconds\t{comparison.measured_step_seconds:.6g}",
    ]


def _as_text(comparison: Comparison) -> str:
    """Return tab-separated lines: facts after `#`, a header, one line a device."""
    lines = _facts(comparison)
    header = ["device", "device_type"]
    header += [f"{origin}_{share}" for share, _ in _SHARES for origin in ("predicted", "measured")]
    lines.append("\t".join(header))
    for predicted, measured in _pairs(comparison):
        shares = [f"{getattr(one, share):.4f}" for share, _ in _SHARES for one in (predicted, measured)]
        lines.append("\t".join([measured.device, measured.device_type, *shares]))
    return "\n".join(lines)


def _waterfall_text(comparison: Comparison) -> str:
    """Return tab-separated lines: facts after `#`, a header, one line a cause."""
    lines = [*_facts(comparison), "cause\tpredicted\tmeasured\tmeaning"]
    for cause, (predicted, measured, meaning) in _causes(comparison).items():
        lines.append(f"{cause}\t{predicted:.4f}\t{measured:.4f}\t{meaning}")
    return "\n".join(lines)


def _causes(comparison: Comparison) -> dict[str, tuple[float, float, str]]:
    """Return the predicted and the measured share and the meaning of every cause."""
    from hethub.timeline.waterfall import CAUSES

    before, after = comparison.predicted_waterfall.total, comparison.measured_waterfall.total
    return {cause: (before[cause], after[cause], meaning) for cause, meaning in CAUSES.items()}


def _print_waterfall(comparison: Comparison, run: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("cause")
    for origin in ("predicted", "measured"):
        table.add_column(origin, justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for cause, (predicted, measured, meaning) in _causes(comparison).items():
        if max(predicted, measured) >= 5e-5:  # what would show as 0.00 in both columns
            table.add_row(cause, f"{100 * predicted:.2f}", f"{100 * measured:.2f}", Text(meaning))
    console = Console()
    console.print(Text(_heading(comparison, run)))
    console.print(table)
    console.print("Shares in % of what all devices together could have done, weighed by their speed.")


def _pairs(comparison: Comparison) -> list[tuple[DeviceSummary, DeviceSummary]]:
    """Return (predicted, measured) of every device."""
    return list(zip(comparison.predicted_devices, comparison.measured_devices, strict=True))


def _print_table(comparison: Comparison, run: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hethub.timeline.summary import by_type

    pairs = _pairs(comparison)
    recomputes = any(one.recompute_ratio > 0 for pair in pairs for one in pair)
    labels = {share: label for share, label in _SHARES if recomputes or share != "recompute_ratio"}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("device", overflow="fold")
    table.add_column("type", overflow="fold")
    for label in labels.values():
        table.add_column(label, justify="right", no_wrap=True)
    for before, after in pairs:
        table.add_row(Text(after.device), Text(after.device_type), *_cells(list(labels), before, after))
    table.add_section()
    types = zip(by_type(comparison.predicted_devices), by_type(comparison.measured_devices), strict=True)
    for expected, found in types:
        cells = _cells(list(labels), expected, found)
        table.add_row(f"mean of {found.devices}", Text(found.device_type), *cells)
    console = Console()
    console.print(Text(_heading(comparison, run)))
    console.print(table)
    console.print(
        "Shares of the step in %, predicted/measured. exposed comm.: communication that compute waits for."
    )


def _cells(shares: list[str], predicted: _Summary, measured: _Summary) -> list[str]:
    return [f"{100 * getattr(predicted, share):.1f}/{100 * getattr(measured, share):.1f}" for share in shares]


def _heading(comparison: Comparison, run: Path) -> str:
    """Return the run, its steps, both step times and, of an emulated run, how well it was emulated."""
    predicted, measured = comparison.predicted_step_seconds, comparison.measured_step_seconds
    first, last = comparison.first, comparison.last
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    mark = " (emulated: modelled time)" if comparison.emulated else ""
    off = 100 * (measured / predicted - 1)
    text = f"{run.name}, {steps}{mark}\n"
    text += f"step time: {predicted:.4g} s predicted, {measured:.4g} s measured (median), {off:+.1f} %"
    if comparison.emulated:
        devices = comparison.measured_devices
        overruns = sum(one.overrun_ratio for one in devices) / len(devices)
        real = max(one.real_ratio for one in devices)
        text += f"\ntime scale {comparison.measured.info.time_scale:g}, "
        text += f"overruns {100 * overruns:.2f} % of compute actions, "
        text += f"real math at most {100 * real:.1f} % of a device's compute time"
    return text
