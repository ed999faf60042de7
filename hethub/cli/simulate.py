"""`hethub simulate PLAN`: what a plan file will do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hethub.cli.measured import CalibrationOption, ProfilesOption, StrictOption
from hethub.cli.uncollected import uncollected

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.cost.measured import Measured
    from hethub.simulate.engine import Simulation
    from hethub.simulate.what_if import Addition
    from hethub.specs.plan import Plan

__all__ = ["simulate"]


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan file, as `hethub plan` writes it.")],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="A change, several allowed: link:CLASS=2x, device:GROUP/NODE/DEVICE=0.8x, type:NAME=0.5x, "
            "type:NAME=+4 (more devices, planned anew)."
        ),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Also say what training over so many tokens takes.")
    ] = None,
    waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Show what takes the time of all devices together, by cause.")
    ] = False,
    faults: Annotated[
        Path | None,
        typer.Option(
            help="A job file: also say what its faults, checkpoints and policy make of the training."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome/Perfetto trace of the step here.")
    ] = None,
    profiles: ProfilesOption = None,
    strict: StrictOption = False,
    calibration: CalibrationOption = None,
) -> None:
    """Predict one step of a plan: its time, and how busy every device is.

    Example: hethub simulate plan.yaml --what-if device:a/0/3=0.8x --trace step.json
    """
    with uncollected():
        _simulate(
            plan, what_if or [], tokens, waterfall, faults, as_json, trace, profiles, strict, calibration
        )


def _simulate(
    path: Path,
    what_if: list[str],
    tokens: float | None,
    waterfall: bool,
    faults: Path | None,
    as_json: bool,
    trace: Path | None,
    profiles: Path | None,
    strict: bool,
    calibration: Path | None,
) -> None:
    from hethub.cli.measured import read_measured
    from hethub.cli.outages import outage_facts, outage_figures, predict_outages
    from hethub.cli.waterfall import predicted_waterfall, waterfall_lines
    from hethub.program.check import require_valid
    from hethub.simulate.energy import job_of
    from hethub.simulate.modelled import model
    from hethub.simulate.report import figures as figures_of
    from hethub.simulate.report import stage_rows
    from hethub.simulate.what_if import Addition, Change, changed_graph, parse_change
    from hethub.specs.layout import lay_out
    from hethub.specs.plan import load_plan

    wanted = [parse_change(text) for text in what_if]
    changes = [change for change in wanted if isinstance(change, Change)]
    additions = [change for change in wanted if isinstance(change, Addition)]
    loaded, document = load_plan(path)
    require_valid(loaded, document, str(path))
    measured = read_measured(loaded.cluster, loaded.workload, profiles, calibration, strict=strict)
    if wanted:  # bounds and baseline in the file are of the cluster as it is
        loaded = loaded.model_copy(update={"bounds": None})
    if additions:
        loaded = _planned_anew(loaded, additions, measured)
    compute = measured.compute(changed_graph(loaded.cluster, changes), loaded.workload)
    modelled = model(lay_out(loaded), compute, steady=True)
    figures = figures_of(loaded, modelled, measured.ratio_interval)
    _write_trace(trace, modelled.simulation)
    lost = predicted_waterfall(modelled)
    outages = None if faults is None else predict_outages(faults, path, measured)
    speed, joules, usd = (
        figures[key] for key in ("tokens_per_second", "joules_per_token", "usd_per_million_tokens")
    )
    job = None if tokens is None else asdict(job_of(tokens, speed, joules, usd))
    if as_json:
        added: dict[str, Any] = {"waterfall": lost.total, "what_if": what_if, "job": job}
        added["faults"] = None if outages is None else outage_figures(outages)
        typer.echo(json.dumps(figures | added, indent=2))
        return
    from hethub.cli.split import print_split

    heading = f"{loaded.workload.model.name} on {loaded.cluster.name}: {path}"
    if wanted:
        heading += f", if {' and '.join(what_if)}" + (" (planned anew)" if additions else "")
    print_split(heading, stage_rows(loaded, modelled), figures)
    if job is not None:
        typer.echo(f"job\t{_job_text(job)}")
    if outages is not None:
        typer.echo("\n".join(outage_facts(outages)))
    if waterfall:
        typer.echo("\n".join(f"{cause}\t{text}" for cause, text in waterfall_lines(lost)))


def _planned_anew(plan: Plan, additions: Sequence[Addition], measured: Measured) -> Plan:
    """The planner's plan for the cluster with further devices."""
    from hethub.planners.first import FirstPlanner
    from hethub.planners.interface import Problem
    from hethub.simulate.what_if import enlarged

    cluster = enlarged(plan.cluster, additions)
    return FirstPlanner().plan(Problem.of(cluster, plan.workload, measured)).plan


def _write_trace(path: Path | None, simulation: Simulation) -> None:
    from hethub.files import writing
    from hethub.timeline.trace import write_chrome_trace

    if path is None or simulation.timeline is None:
        return
    with writing(path, "Give another --trace."):
        write_chrome_trace(path, [simulation.timeline], range(1))


def _job_text(job: dict[str, Any]) -> str:
    parts = [f"{job['tokens']:.4g} tokens", f"{job['hours']:.4g} hours"]
    parts.append("energy unknown" if job["kwh"] is None else f"{job['kwh']:.4g} kWh")
    parts.append("cost unknown" if job["usd"] is None else f"{job['usd']:.4g} USD")
    return ", ".join(parts)
