"""`hethub compare CLUSTER`: our plan beside what other planners would do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # numpy and networkx are loaded when the command runs, not when `hethub --help` lists it
    from hethub.planners.baselines.comparison import Result

__all__ = ["compare"]

_COLUMNS = ("planner", "tokens/s", "of ours", "step", "search", "what it does")


def compare(
    cluster: Annotated[Path, typer.Argument(help="The cluster file, with its workload.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a bar for each planner here.")] = None,
) -> None:
    """Plan with our planner, the search ideas of Sailor and Metis, and simple rules; one simulator judges all.

    All plan for throughput; the file's constraints and objective are left aside, as the others know none.

    Example: hethub compare cluster_specs/laptop.yaml --html compare.html
    """
    from hethub.errors import InputError
    from hethub.planners.baselines.comparison import compare as compare_planners
    from hethub.planners.interface import Problem
    from hethub.specs.cluster import load_problem
    from hethub.timeline.bars import write_bars

    loaded, workload = load_problem(cluster)
    if html is not None and not html.parent.is_dir():
        raise InputError(f"{html}: its folder does not exist. Create it, or give another --html.")
    results = compare_planners(Problem.of(loaded, workload))
    title = f"{workload.model.name} on {loaded.name}"
    if html is not None:
        write_bars(html, title, [(result.name, result.tokens_per_second) for result in results])
    if as_json:
        typer.echo(json.dumps({"planners": [_as_object(result) for result in results]}, indent=2))
    else:
        _print(title, results)
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
        "search_seconds": result.search_seconds,
        "failure": result.failure,
        "pipelines": None if found is None else plan_to_spec(found.plan)["pipelines"],
    }


def _print(title: str, results: list[Result]) -> None:
    ours = results[0].tokens_per_second
    rows = [_row(result, ours) for result in results]
    if not sys.stdout.isatty():
        typer.echo(f"# {title}")
        for row in (_COLUMNS, *rows):
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in (_COLUMNS[0], _COLUMNS[-1]) else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _row(result: Result, ours: float) -> tuple[str, ...]:
    search = f"{result.search_seconds:.2g} s"
    if result.found is None:
        return (result.name, "-", "-", "-", search, result.failure or "")
    return (
        result.name,
        f"{result.tokens_per_second:,.0f}",
        f"{result.tokens_per_second / ours:.1%}",
        f"{result.found.step_seconds:.4g} s",
        search,
        result.note,
    )
