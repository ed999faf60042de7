"""A split and its figures, printed: a table in a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from hethub.simulate.report import StageRow

__all__ = ["print_split"]

_COLUMNS = ("pipeline", "stage", "devices", "layers", "micro-batches", "memory", "seconds", "busy")
_GIB = 1 << 30
_MIB = 1 << 20


def print_split(heading: str, rows: Sequence[StageRow], figures: dict[str, Any]) -> None:
    """Print the split as a table and the figures below it."""
    cells = [_cells(row) for row in rows]
    facts = _facts(figures)
    if not sys.stdout.isatty():
        typer.echo(f"# {heading}")
        typer.echo("\t".join(_COLUMNS))
        for line in [*cells, *facts]:
            typer.echo("\t".join(line))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(heading), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("seconds", "busy", "memory") else "left")
    pipeline = None
    for line in cells:
        if pipeline not in (None, line[0]):
            table.add_section()
        table.add_row(*map(Text, line if line[0] != pipeline else ("", *line[1:])))
        pipeline = line[0]
    console = Console()
    console.print(table)
    for name, value in facts:
        console.print(Text.assemble((f"{name}: ", "bold"), value))


def _cells(row: StageRow) -> tuple[str, ...]:
    last = row.pipeline + row.repeat - 1
    pipeline = str(row.pipeline) if row.repeat == 1 else f"{row.pipeline}-{last}"
    recompute = "" if row.recompute == "none" else f", recompute {row.recompute}"
    return (
        pipeline,
        str(row.stage),
        " + ".join(_replica(row, *replica) for replica in row.replicas),
        f"{row.layers[0]}-{row.layers[1] - 1}{recompute}",
        f"{row.micro_batches} x {row.micro_batch_rows} rows",
        f"{_size(row.memory_bytes)} of {_size(row.usable_bytes)}",
        f"{row.seconds:.3g}",
        f"{row.busy_ratio:.0%}",
    )


def _replica(row: StageRow, count: int, device_type: str, degree: int, rows: int) -> str:
    """Such as `2 x fast TP4 (3 rows)`; rows only where replicas share a micro-batch."""
    text = device_type if count == 1 else f"{count} x {device_type}"
    if degree > 1:
        text += f" TP{degree}"
    return text if rows == row.micro_batch_rows else f"{text} ({rows} rows)"


def _facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Step time, speed, bounds, baseline and cost, in words."""
    mark = " (emulated devices, modelled time)" if figures["emulated"] else ""
    speed = figures["tokens_per_second"]
    facts = [
        ("step", f"{figures['step_seconds']:.4g} s predicted{mark}{_interval(figures)}"),
        ("speed", f"{speed:,.0f} tokens/s predicted{mark}"),
        _homogeneous(figures),
        ("physical bound", _physical(figures)),
    ]
    even = figures["baselines"]["even_tokens_per_second"]
    if even is None:
        facts.append(
            ("best even split", f"unknown: {figures['missing']['baselines.even_tokens_per_second']}")
        )
    else:
        facts.append(
            (
                "best even split",
                f"{even:,.0f} tokens/s on the same devices; this plan is {speed / even:.2f} x as fast",
            )
        )
    facts += [_idle(figures), *_money(figures)]
    return [fact for fact in facts if fact[1]]


def _interval(figures: dict[str, Any]) -> str:
    found = figures["step_seconds_interval_95"]
    return "" if found is None else f", {found[0]:.4g} to {found[1]:.4g} s with 95 %"


def _homogeneous(figures: dict[str, Any]) -> tuple[str, str]:
    bound, share = figures["bounds"]["homogeneous_tokens_per_second"], figures["share"]
    name = "homogeneous bound"
    if bound is None:
        return name, f"unknown: {figures['missing']['bounds.homogeneous_tokens_per_second']}"
    text = f"{bound:,.0f} tokens/s, every device type by itself, added up"
    if share["homogeneous_bound"] is not None:
        text += f"; {share['homogeneous_bound']:.1%} of it is reached"
    if share["not_a_bound"]:
        text += f" (not a bound: {', '.join(share['not_a_bound'])} cannot hold the model alone and count 0)"
    return name, text


def _physical(figures: dict[str, Any]) -> str:
    bound = figures["bounds"]["physical_tokens_per_second"]
    return f"{bound:,.0f} tokens/s, of which {figures['share']['physical_bound']:.1%} is reached"


def _idle(figures: dict[str, Any]) -> tuple[str, str]:
    """Devices that the plan leaves out."""
    out = [
        f"{entry['count'] - entry['used']} of {entry['count']} {entry['name']}"
        for entry in figures["device_types"]
        if entry["used"] < entry["count"]
    ]
    return "left out", ", ".join(out)


def _money(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Energy and money, where they are known."""
    joules, usd = figures["joules_per_token"], figures["usd_per_million_tokens"]
    return [
        (
            "energy",
            ""
            if joules is None
            else f"{joules:.4g} J per token, at full power where a type's idle power is not given",
        ),
        ("cost", "" if usd is None else f"{usd:.4g} USD per million tokens"),
    ]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.1f} MiB"
