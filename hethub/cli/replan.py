"""`hethub replan RUN`: a new plan for the devices and links as the run measured them, and what it would gain."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hethub.cli.plan import write_plan
from hethub.cli.runs import Run, printable_cells

if TYPE_CHECKING:
    from hethub.planners.replan import Replanned
    from hethub.specs.constraints import Constraints, Objective

__all__ = ["replan"]

_STEPS = 10
_TOLD = 0.05  # further from its prediction a device or link is named
_WORTH = 0.01  # of gain: a smaller one is within what predictions err


def replan(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the plan (default: replan.yaml in the run)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Calibrate from so many of the last steps.")] = _STEPS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Calibrate devices and links from the run's last steps, plan anew, and say what the new plan would gain. While the
    run goes on too: its driver writes its last steps down every few seconds.

    Example: hethub replan runs/demo
    """
    from hethub.launch.run_state import read_run
    from hethub.planners.replan import pace_of_run
    from hethub.planners.replan import replan as plan_anew
    from hethub.simulate.comparison import compare_run
    from hethub.specs.plan import load_plan

    compared = compare_run(run)
    plan, _ = load_plan(run / "plan.yaml")
    target = output or run / "replan.yaml"
    last = range(max(compared.first, compared.last - steps + 1), compared.last + 1)
    pace, chosen = pace_of_run(plan, compared.predicted, compared.measured, last)
    state = read_run(run)
    constraints, objective = _wishes(run, state.job_file)
    found = plan_anew(plan, pace, constraints=constraints, objective=objective)
    content = _content(found, _measured_seconds(compared.measured, chosen), chosen)
    written = found.gain >= _WORTH
    if written:
        write_plan(found.plan, target)
    content["plan"] = str(target) if written else None
    content["goes_on"] = state.goes_on
    typer.echo(
        json.dumps(content, indent=2) if as_json else "\n".join(map(printable_cells, _lines(content, run)))
    )


def _measured_seconds(measured: Any, chosen: list[int]) -> float:
    import numpy as np

    from hethub.timeline.summary import step_numbers, step_seconds

    numbers = step_numbers(measured)
    return float(np.median(step_seconds(measured)[np.isin(numbers, chosen)]))


def _wishes(run: Path, file: str | None) -> tuple[Constraints, Objective]:
    """What the job's cluster file fixes and wants; nothing where the job file is no longer there or has changed."""
    from hethub.errors import InputError
    from hethub.specs.constraints import FASTEST, FREE
    from hethub.specs.job import load_job

    try:
        job = None if file is None else load_job(Path(file))
    except InputError:
        job = None
    if job is None:
        typer.echo(
            f"{run}: its job file cannot be read ({file}); planned without constraints and objective",
            err=True,
        )
        return FREE, FASTEST
    return job.constraints, job.objective


def _content(found: Replanned, measured_seconds: float, steps: list[int]) -> dict[str, Any]:
    pace = found.pace
    return {
        "steps": [steps[0], steps[-1]],
        "devices": {name: ratio for name, ratio in pace.devices.items() if abs(ratio - 1.0) > _TOLD},
        "links": {name: pace.links[name] for name in pace.bandwidth},
        "bandwidth_shares": dict(pace.bandwidth),
        "measured_step_seconds": measured_seconds,
        "calibrated_step_seconds": found.old_step_seconds,
        "new_step_seconds": found.new_step_seconds,
        "gain": found.gain,
    }


def _lines(content: dict[str, Any], run: Path) -> list[str]:
    first, last = content["steps"]
    lines = [f"calibrated from\tsteps {first} to {last}"]
    for name, ratio in content["devices"].items():
        lines.append(f"device\t{name}: compute takes {ratio:.2f} x as long as predicted")
    for name, ratio in content["links"].items():
        left = f"{content['bandwidth_shares'][name]:.0%} of its bandwidth is left"
        lines.append(f"link\t{name}: messages take {ratio:.2f} x as long as predicted; {left}")
    if not content["devices"] and not content["links"]:
        lines.append("devices, links\tas predicted")
    lines.append(
        f"this plan\t{content['calibrated_step_seconds']:.4g} s a step as calibrated, "
        f"{content['measured_step_seconds']:.4g} s measured"
    )
    if content["plan"] is None:
        lines.append("new plan\tnone: no plan was found that is 1 % faster")
        return lines
    lines += [
        f"new plan\t{content['new_step_seconds']:.4g} s a step: {content['gain']:.1%} more tokens per second",
        f"wrote\t{content['plan']}",
        f"what changes\thethub diff {quote(str(run / 'plan.yaml'))} {quote(content['plan'])}",
        f"go on with it\thethub launch --resume {quote(str(run))} --plan {quote(content['plan'])}",
    ]
    if content["goes_on"]:
        lines.insert(-1, f"stop the run first\thethub stop {quote(str(run))}")
    return lines
