"""`hethub plan CLUSTER`: find the split, say what it will do, and write it down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hethub.cli.measured import CalibrationOption, ProfilesOption, StrictOption
from hethub.cli.uncollected import uncollected

if TYPE_CHECKING:  # numpy and networkx are loaded when the command runs, not when `hethub --help` lists it
    from hethub.planners.answer import Answer

__all__ = ["plan"]

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
) -> None:
    """Find the split of a model over a cluster that trains fastest, and predict what it will do.

    Example: hethub plan cluster_specs/laptop.yaml
    """
    with uncollected():
        _plan(cluster, output, profiles, calibration, strict, as_json)


def _plan(
    cluster: Path,
    output: Path | None,
    profiles: Path | None,
    calibration: Path | None,
    strict: bool,
    as_json: bool,
) -> None:
    from hethub.cli.measured import read_measured
    from hethub.errors import InputError
    from hethub.planners.answer import answer
    from hethub.specs.cluster import load_problem
    from hethub.specs.plan import save_plan

    loaded, workload = load_problem(cluster)
    target = output or (None if as_json else _DEFAULT_OUTPUT)
    if target is not None and not target.parent.is_dir():
        raise InputError(f"{target}: its folder does not exist. Create it, or give another --output.")
    measured = read_measured(loaded, workload, profiles, calibration, strict=strict)
    found = answer(loaded, workload, measured)
    if target is not None:
        try:
            save_plan(found.plan, target)
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written ({error.strerror}). Give another --output."
            ) from error
    if as_json:
        typer.echo(json.dumps(found.figures, indent=2))
    else:
        _print(found, target)


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


def _search_lines(found: Answer) -> list[str]:
    """Why this plan: the size of the search, the gap proven, and why the runner-up lost."""
    search = found.figures["search"]
    effort = f"{search['considered']} splits considered in {search['seconds']:.2g} s"
    gap = f"no plan's step can be more than {search['proven_gap']:.1%} shorter (physical bound)"
    lines = [f"search\t{effort}; {gap}"]
    if search["runners_up"]:
        loser = search["runners_up"][0]
        lost = f"{loser['step_seconds']:.4g} s, since {loser['reason']}"
        lines.append(f"runner-up\t{loser['description']}: {lost}")
    return [line.replace("\t", ": ", 1) for line in lines] if sys.stdout.isatty() else lines
