"""`hethub launch JOB`: train."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hethub.cli.detach import detach
from hethub.errors import InputError, MachineError, printable
from hethub.launch.launcher import start_driver

if TYPE_CHECKING:
    from hethub.launch.driver import Finished

__all__ = ["launch"]

_PACKAGES = ("torch", "ray", "safetensors", "plotly")


def launch(
    context: typer.Context,
    job: Annotated[
        Path | None,
        typer.Argument(help="The job file; with --resume the one that the run began with, if left out."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the unfinished run in this folder, from its newest intact checkpoint."),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster file to use instead of the job's; the plan is searched anew.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file to use instead of the job's.")] = None,
    detached: Annotated[
        bool,
        typer.Option(
            "--detach", help="Return when training has begun; the run goes on without the terminal."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a job: plan it (or read its plan), run it on Ray, write the run folder.

    Starts a local Ray unless the job names the address of one.

    Example: hethub launch cluster_specs/laptop-job.yaml
    """
    from dataclasses import replace

    from hethub.specs.job import load_job

    loaded = load_job(_job_file(job, resume), cluster_file=_absolute(cluster), plan_file=_absolute(plan))
    if resume is not None:
        loaded = replace(loaded, output=resume.absolute())
    _require_packages(_PACKAGES if loaded.telemetry_listen is None else (*_PACKAGES, "prometheus_client"))
    goes_on = resume is not None
    opened: list[Callable[[Path], None]] = []
    if detached:
        opened.append(detach(loaded.output, resume=goes_on, as_json=as_json).opened)
    if context.obj:  # the process is the command's own
        place = start_driver(loaded.on_failure, loaded.output, _tell, opened, resume=goes_on)
        goes_on = place.resume
        opened.append(place.opened)
    from hethub.launch.driver import launch as run

    # Ray prints on stdout that a worker died, which the run has told by then; `--json` promises one object there.
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        finished = run(loaded, _tell, resume=goes_on, opened=opened)
    if as_json:
        typer.echo(json.dumps(finished.summary, indent=2))
    else:
        for line in _report(finished):
            typer.echo(line)
    sys.stdout.flush()


def _tell(line: str) -> None:
    typer.echo(printable(line), err=True)


def _job_file(job: Path | None, resume: Path | None) -> Path:
    """The job file that is given, or the one that a run was launched with."""
    if job is not None:
        return job
    if resume is None:
        raise InputError("launch: no job file is given. Give one, or --resume with the folder of a run.")
    try:
        return Path(json.loads((resume / "run.json").read_text(encoding="utf-8"))["job_file"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{resume}: is no folder of a run. Give one that `hethub launch` made.") from None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _require_packages(wanted: Sequence[str]) -> None:
    """Training's packages are extras. Looked for, not imported: that takes seconds, and bad input is told first."""
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise MachineError(f"not installed: {', '.join(missing)}. Run: pip install 'hethub[launch,plots]'")


def _report(finished: Finished) -> list[str]:
    s = finished.summary
    mark = " (emulated, modelled time)" if s["emulated"] else ""
    return [
        f"loss {_figure(s['loss_first'], '.4f')} -> {_figure(s['loss_last'], '.4f')} in {s['steps']} steps",
        *_held_out(s),
        f"speed {s['tokens_per_second']:,.0f} tokens/s{mark}, {s['share_of_prediction']:.1%} of its prediction",
        *_bounds(s),
        *_emulation(s),
        *_recovery(s),
        *_comparison(finished),
        f"run folder {finished.folder}: summary.json, timeline.html, trace.json, model.safetensors, logs/",
    ]


def _figure(number: float | None, form: str) -> str:
    """A figure that the summary may lack: a skipped step's loss is no number."""
    return "none" if number is None else format(number, form)


def _held_out(s: dict[str, Any]) -> list[str]:
    if s["heldout_loss"] is None:
        return []
    return [
        f"held-out loss {s['heldout_loss']:.4f} nats per token; a unigram model has {s['unigram_loss']:.4f}"
    ]


def _bounds(s: dict[str, Any]) -> list[str]:
    lines = [f"share of the physical bound {s['share_of_physical_bound']:.1%}"]
    if s["share_of_homogeneous_bound"] is not None:
        lines.insert(
            0,
            f"share of the homogeneous bound (measured over predicted) {s['share_of_homogeneous_bound']:.1%}",
        )
    return lines


def _emulation(s: dict[str, Any]) -> list[str]:
    lines = [f"unaccounted time {s['unaccounted_ratio']:.2%} of a step"]
    if s["emulated"]:
        valid = "" if s["overrun_ratio"] <= 0.01 else ": more than 1 %, THIS RUN IS INVALID; raise time_scale"
        lines.append(
            f"wall clock {s['wall_tokens_per_second']:,.0f} tokens/s at time_scale {s['time_scale']:.3g}; "
            f"real math at most {s['real_math_ratio']:.1%} of a device's padded time; "
            f"overruns {s['overrun_ratio']:.2%} of actions{valid}"
        )
    return lines


def _recovery(s: dict[str, Any]) -> list[str]:
    kept = s["checkpoints"]
    lines = []
    if s["restarts"]:
        lines.append(f"restarts {s['restarts']}; why and how long: attempts.jsonl")
    if kept["made"] or kept["failed"]:
        failed = f", {kept['failed']} could not be written" if kept["failed"] else ""
        stall = kept["longest_stall_seconds"] or 0.0
        lines.append(
            f"checkpoints {kept['made']}{failed}; training stood still for at most {stall:.3f} s each"
        )
    return lines


def _comparison(finished: Finished) -> list[str]:
    even, s = finished.even, finished.summary
    if even is None:
        return []
    ratio = s["tokens_per_second"] / even["tokens_per_second"]
    differ = _figure(finished.losses_differ, ".1e")
    return [
        f"best even split, same devices: {even['tokens_per_second']:,.0f} tokens/s; uneven is {ratio:.2f} x as fast",
        f"losses of the two over {even['steps']} steps differ by at most {differ} (relative)",
    ]
