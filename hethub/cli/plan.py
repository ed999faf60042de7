"""`hethub plan CLUSTER`: find the split, say what it will do, and write it down."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hethub.cli.measured import CalibrationOption, ProfilesOption, StrictOption
from hethub.cli.searching import shown_progress
from hethub.cli.uncollected import uncollected

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.planners.answer import Answer
    from hethub.specs.plan import Plan

__all__ = ["plan", "write_plan"]

_DEFAULT_OUTPUT = Path("plan.yaml")


def plan(
    cluster: Annotated[Path, typer.Argument(help="The cluster file, with its workload.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where to write the plan (default plan.yaml; with --json: nowhere)."
        ),
    ] = None,
    profiles: ProfilesOption = None,
    strict: StrictOption = False,
    calibration: CalibrationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also say what limits each device type, what more would bring, and why others lost.",
        ),
    ] = False,
    time_limit: Annotated[
        float, typer.Option(min=0.0, help="Seconds for the search; it ends with the best plan so far.")
    ] = math.inf,
) -> None:
    """Find the split of a model over a cluster that is best by the file's objective (speed, where it names none),
    within the file's constraints, and predict what it will do.

    Example: hethub plan cluster_specs/laptop.yaml --explain
    """
    with uncollected():
        _plan(cluster, output, (profiles, calibration, strict), (as_json, explain), time_limit)


def write_plan(found: Plan, target: Path) -> None:
    """Write a plan file. Raises InputError where that cannot be."""
    from hethub.files import writing
    from hethub.specs.plan import save_plan

    with writing(target, "Give another --output."):
        save_plan(found, target)


def _plan(
    cluster: Path,
    output: Path | None,
    measurements: tuple[Path | None, Path | None, bool],
    printed: tuple[bool, bool],
    time_limit: float,
) -> None:
    profiles, calibration, strict = measurements
    as_json, explain = printed
    from hethub.cli.measured import read_measured
    from hethub.errors import InputError
    from hethub.planners.answer import answer
    from hethub.specs.cluster import load_planning

    told = load_planning(cluster)
    target = output or (None if as_json else _DEFAULT_OUTPUT)
    if target is not None and not target.parent.is_dir():
        raise InputError(f"{target}: its folder does not exist. Create it, or give another --output.")
    measured = read_measured(told.cluster, told.workload, profiles, calibration, strict=strict)
    with shown_progress(sys.stderr) as progress:
        found = answer(
            told.cluster,
            told.workload,
            measured,
            constraints=told.constraints,
            objective=told.objective,
            time_limit_seconds=time_limit,
            progress=progress,
            may_fork=True,
        )
    if target is not None:
        write_plan(found.plan, target)
    why = None
    if explain:
        from hethub.cli.explain import explanation

        why = explanation(found, told, measured)
    if as_json:
        typer.echo(
            json.dumps(
                found.figures if why is None else found.figures | {"explanation": why.content}, indent=2
            )
        )
        return
    _print(found, target)
    _print_job(found, told.objective.tokens)
    for line in [] if why is None else why.lines():
        typer.echo(line)


def _print(found: Answer, target: Path | None) -> None:
    from hethub.cli.split import print_split
    from hethub.simulate.report import stage_rows

    rows = stage_rows(found.plan, found.modelled)
    heading = f"{found.plan.workload.model.name} on {found.plan.cluster.name}"
    print_split(heading, rows, found.figures)
    for line in _search_lines(found):
        typer.echo(line)
    if target is not None:
        typer.echo(f"wrote {target}", err=not sys.stdout.isatty())


def _print_job(found: Answer, tokens: float | None) -> None:
    """What the objective's tokens take."""
    if tokens is None:
        return
    from hethub.simulate.energy import job_of

    speed, joules, usd = (
        found.figures[key] for key in ("tokens_per_second", "joules_per_token", "usd_per_million_tokens")
    )
    job = job_of(tokens, speed, joules, usd)
    parts = [f"{job.hours:.4g} hours"]
    parts += [] if job.usd is None else [f"{job.usd:,.6g} USD"]
    parts += [] if job.kwh is None else [f"{job.kwh:,.6g} kWh"]
    typer.echo(f"job of {tokens:.4g} tokens\t{', '.join(parts)}")


def _search_lines(found: Answer) -> list[str]:
    """Why this plan: the size of the search, the gap proven, and why the runner-up lost."""
    search = found.figures["search"]
    effort = f"{search['considered']} splits considered in {search['seconds']:.2g} s"
    loose = f"; least is known of {search['loose']}" if search["loose"] else ""
    gap = f"no plan's step can be more than {search['proven_gap']:.1%} shorter ({search['proven_by']}{loose})"
    lines = [f"search\t{effort}; {gap}"]
    if search["runners_up"]:
        loser = search["runners_up"][0]
        lost = f"{loser['step_seconds']:.4g} s, since {loser['reason']}"
        lines.append(f"runner-up\t{loser['description']}: {lost}")
    return [line.replace("\t", ": ", 1) for line in lines] if sys.stdout.isatty() else lines
