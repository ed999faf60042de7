"""`hethub simulate PLAN`: what a plan file will do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.cost.profiles.profile import Profile
    from hethub.simulate.engine import Simulation
    from hethub.specs.plan import Plan

__all__ = ["simulate"]


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan file, as `hethub plan` writes it.")],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            help="A change, several allowed: link:CLASS=2x, device:GROUP/NODE/DEVICE=0.8x, type:NAME=0.5x."
        ),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Also say what training over so many tokens takes.")
    ] = None,
    waterfall: Annotated[
        bool, typer.Option("--waterfall", help="Show what takes the time of all devices together, by cause.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome/Perfetto trace of the step here.")
    ] = None,
    profiles: Annotated[
        Path | None,
        typer.Option(help="Folder with layers.csv and transfers.csv: layers take what was measured there."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a plan with layers that the profiles lack.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="A file that `hethub calibrate` wrote from our own runs.")
    ] = None,
) -> None:
    """Predict one step of a plan: its time, and how busy every device is.

    Example: hethub simulate plan.yaml --what-if device:a/0/3=0.8x --trace step.json
    """
    from hethub.cli.waterfall import predicted_waterfall, waterfall_lines
    from hethub.cost.compute import ComputeModel
    from hethub.program.check import require_valid
    from hethub.simulate.energy import job_of
    from hethub.simulate.modelled import model
    from hethub.simulate.report import figures as figures_of
    from hethub.simulate.report import stage_rows
    from hethub.simulate.what_if import changed_graph, parse_change
    from hethub.specs.layout import lay_out
    from hethub.specs.plan import load_plan

    changes = [parse_change(text) for text in what_if or ()]
    loaded, document = load_plan(plan)
    require_valid(loaded, document, str(plan))
    if calibration is not None:
        loaded = _calibrated(loaded, calibration)
    if changes:  # bounds and baseline in the file are of the cluster as it is
        loaded = loaded.model_copy(update={"bounds": None})
    profile = None if profiles is None else _profile(profiles, loaded, strict=strict)
    compute = ComputeModel(changed_graph(loaded.cluster, changes), loaded.workload, profile)
    modelled = model(lay_out(loaded), compute)
    figures = figures_of(loaded, modelled)
    _write_trace(trace, modelled.simulation)
    lost = predicted_waterfall(modelled)
    speed, joules, usd = (
        figures[key] for key in ("tokens_per_second", "joules_per_token", "usd_per_million_tokens")
    )
    job = None if tokens is None else asdict(job_of(tokens, speed, joules, usd))
    if as_json:
        added: dict[str, Any] = {"waterfall": lost.total, "what_if": what_if or [], "job": job}
        typer.echo(json.dumps(figures | added, indent=2))
        return
    from hethub.cli.split import print_split

    heading = f"{loaded.workload.model.name} on {loaded.cluster.name}: {plan}"
    if changes:
        heading += f", if {' and '.join(what_if or ())}"
    print_split(heading, stage_rows(loaded, modelled), figures)
    if job is not None:
        typer.echo(f"job\t{_job_text(job)}")
    if waterfall:
        typer.echo("\n".join(f"{cause}\t{text}" for cause, text in waterfall_lines(lost)))


def _profile(folder: Path, plan: Plan, *, strict: bool) -> Profile:
    """The profile of a folder; tells which layers of which types it lacks, or refuses with `strict`."""
    from hethub.cost.profiles.profile import LayerKey, load_profile
    from hethub.errors import InputError

    profile, workload = load_profile(folder), plan.workload
    lacking = [
        f"{kind} on {name}"
        for name in plan.cluster.device_types
        for kind in ("embedding", "decoder", "head")
        if not profile.rows(
            LayerKey(workload.model.name, name, kind, 1, workload.sequence_length, workload.precision)
        )
    ]
    if lacking:
        words = f"{folder} has no {', '.join(lacking)} of {workload.model.name}"
        if strict:
            raise InputError(f"{words}. Measure it with `hethub profile measure`, or leave out --strict.")
        typer.echo(f"{words}: a roofline stands in", err=True)
    return profile


def _calibrated(plan: Plan, path: Path) -> Plan:
    """The plan on devices as slow as a calibration found them; says which types it knows nothing of."""
    from hethub.simulate.validation import load_coefficients, slowed

    slow_down = load_coefficients(path).slow_down
    lacking = [name for name in plan.cluster.device_types if name not in slow_down]
    if lacking:
        typer.echo(f"{path} has nothing on {', '.join(lacking)}: taken as their figures say", err=True)
    return slowed(plan, slow_down)


def _write_trace(path: Path | None, simulation: Simulation) -> None:
    from hethub.errors import InputError
    from hethub.timeline.trace import write_chrome_trace

    if path is None or simulation.timeline is None:
        return
    try:
        write_chrome_trace(path, [simulation.timeline], range(1))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). Give another --trace.") from error


def _job_text(job: dict[str, Any]) -> str:
    parts = [f"{job['tokens']:.4g} tokens", f"{job['hours']:.4g} hours"]
    parts.append("energy unknown" if job["kwh"] is None else f"{job['kwh']:.4g} kWh")
    parts.append("cost unknown" if job["usd"] is None else f"{job['usd']:.4g} USD")
    return ", ".join(parts)
