"""`hethub report RUN [RUN]`: one HTML file about a run, or about two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hethub.errors import InputError

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folder of a run, or of two to compare.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write it (default: report.html in the run)."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Show this step in the charts, not the one of median time.")
    ] = None,
) -> None:
    """Write a report that opens offline: figures, split, one step predicted above measured, lost time, memory, loss,
    messages, energy, failures and versions. Of a run that goes on or failed, what there is.

    Example: hethub report runs/demo
    """
    from hethub.files import writing
    from hethub.report.data import load_run_data
    from hethub.report.page import write_report

    if len(runs) > 2:
        raise InputError(f"report: {len(runs)} runs are given. Give one, or two to compare.")
    target = output or runs[0] / "report.html"
    data = [load_run_data(run, step) for run in runs]
    with writing(target, "Give another --output."):
        write_report(target, data)
    typer.echo(f"wrote {target}")
