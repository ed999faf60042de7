"""`hethub compare CLUSTER`: our plan beside what other planners would do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hethub.cli.measured import CalibrationOption, ProfilesOption, StrictOption

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.planners.baselines.comparison import Result
    from hethub.specs.constraints import Objective

__all__ = ["compare"]

_GOALS = {
    "usd_per_million_tokens": "USD/Mtoken",
    "joules_per_token": "J/token",
}  # a column of the objective's own
_COLUMNS = ("planner", "tokens/s", "of ours", "step", "search", "what it does")


def compare(
    cluster: Annotated[Path, typer.Argument(help="The cluster file, with its workload.")],
    profiles: ProfilesOption = None,
    strict: StrictOption = False,
    calibration: CalibrationOption = None,
    time_limit: Annotated[
        float, typer.Option(min=0.0, help="Seconds for each planner's search; it ends with its best so far.")
    ] = math.inf,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a bar for each planner here.")] = None,
) -> None:
    """Plan with our planner, the search ideas of Sailor and Metis, and simple rules; one simulator judges all.

    All keep the file's constraints. Ours plans for the file's objective, the others for speed, since they know no
    other; every plan is held against the objective and its limits.

    Example: hethub compare cluster_specs/laptop.yaml --html compare.html
    """
    from hethub.cli.measured import read_measured
    from hethub.errors import InputError
    from hethub.planners.baselines.comparison import compare as compare_planners
    from hethub.planners.interface import Problem
    from hethub.specs.cluster import load_planning
    from hethub.timeline.bars import write_bars

    told = load_planning(cluster)
    if html is not None and not html.parent.is_dir():
        raise InputError(f"{html}: its folder does not exist. Create it, or give another --html.")
    measured = read_measured(told.cluster, told.workload, profiles, calibration, strict=strict)
    problem = Problem.of(
        told.cluster, told.workload, measured, constraints=told.constraints, seconds=time_limit
    )
    results = compare_planners(problem, told.objective)
    title = f"{told.workload.model.name} on {told.cluster.name}"
    if html is not None:
        write_bars(html, title, [(result.name, result.tokens_per_second) for result in results])
    if as_json:
        typer.echo(json.dumps({"planners": [_as_object(result) for result in results]}, indent=2))
    else:
        _print(title, results, told.objective)
    if html is not None:
        typer.echo(f"wrote {html}", err=as_json or not sys.stdout.isatty())


def _as_object(result: Result) -> dict[str, Any]:
    from hethub.specs.plan import plan_to_spec

    found = result.found
    return {
        "name": result.name,
        "note": result.note,
        "step_seconds": None if found is None else found.step_seconds,
        "tokens_per_second": None if found is None else result.tokens_per_second,
        "usd_per_million_tokens": None if result.figures is None else result.figures.usd_per_million_tokens,
        "joules_per_token": None if result.figures is None else result.figures.joules_per_token,
        "missed_limits": {
            name: {"limit": limit, "figure": figure} for name, (limit, figure) in result.missed.items()
        },
        "search_seconds": result.search_seconds,
        "failure": result.failure,
        "pipelines": None if found is None else plan_to_spec(found.plan)["pipelines"],
    }


def _print(title: str, results: list[Result], objective: Objective) -> None:
    ours = results[0].tokens_per_second
    goal = _GOALS.get(objective.best)
    rows = [_row(result, ours, objective) for result in results]
    columns = _COLUMNS if goal is None else (*_COLUMNS[:-1], goal, _COLUMNS[-1])
    if not sys.stdout.isatty():
        typer.echo(f"# {title}")
        for row in (columns, *rows):
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _row(result: Result, ours: float, objective: Objective) -> tuple[str, ...]:
    search = f"{result.search_seconds:.2g} s"
    goal = () if objective.best not in _GOALS else ("-",)
    if result.found is None or result.figures is None:
        return (result.name, "-", "-", "-", search, *goal, result.failure or "")
    missed = [
        f"misses {name}: {figure:,.4g} of {limit:,.4g}" for name, (limit, figure) in result.missed.items()
    ]
    return (
        result.name,
        f"{result.tokens_per_second:,.0f}",
        f"{result.tokens_per_second / ours:.1%}",
        f"{result.found.step_seconds:.4g} s",
        search,
        *(f"{result.figures.of(objective):.4g}" for _ in goal),
        "; ".join([result.note, *missed]),
    )
