"""`hethub simulate PLAN`: what a plan file will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["simulate"]


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan file, as `hethub plan` writes it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome/Perfetto trace of the step here.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A file that `hethub calibrate` wrote from our own runs.")
    ] = None,
) -> None:
    """Predict one step of a plan: its time, and how busy every device is.

    Example: hethub simulate plan.yaml --trace step.json
    """
    from hethub.cost.compute import ComputeModel
    from hethub.cost.graph import CostGraph
    from hethub.errors import InputError
    from hethub.program.check import require_valid
    from hethub.simulate.modelled import model
    from hethub.simulate.report import figures, stage_rows
    from hethub.specs.layout import lay_out
    from hethub.specs.plan import load_plan

    loaded, document = load_plan(plan)
    require_valid(loaded, document, str(plan))
    if calibration is not None:
        from hethub.simulate.validation import load_coefficients, slowed

        slow_down = load_coefficients(calibration).slow_down
        lacking = [name for name in loaded.cluster.device_types if name not in slow_down]
        if lacking:
            typer.echo(
                f"{calibration} has nothing on {', '.join(lacking)}: taken as their figures say", err=True
            )
        loaded = slowed(loaded, slow_down)
    compute = ComputeModel(CostGraph(loaded.cluster), loaded.workload)
    modelled = model(lay_out(loaded), compute)
    timeline = modelled.simulation.timeline
    if trace is not None and timeline is not None:
        from hethub.timeline.trace import write_chrome_trace

        try:
            write_chrome_trace(trace, [timeline], range(1))
        except OSError as error:
            raise InputError(
                f"{trace}: cannot be written ({error.strerror}). Give another --trace."
            ) from error
    if as_json:
        typer.echo(json.dumps(figures(loaded, modelled), indent=2))
        return
    from hethub.cli.split import print_split

    heading = f"{loaded.workload.model.name} on {loaded.cluster.name}: {plan}"
    print_split(heading, stage_rows(loaded, modelled), figures(loaded, modelled))
