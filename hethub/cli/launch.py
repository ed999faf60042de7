"""`hethub launch JOB`: train."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hethub.launch.driver import Finished

__all__ = ["launch"]

_PACKAGES = ("torch", "ray", "safetensors", "plotly")


def launch(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Train a job: plan it (or read its plan), run it on Ray, write the run folder.

    Starts a local Ray unless the job names the address of one.

    Example: hethub launch cluster_specs/laptop-job.yaml
    """
    from hethub.specs.job import load_job

    loaded = load_job(job)
    _require_packages()
    from hethub.launch.driver import launch as run

    finished = run(loaded, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(finished.summary, indent=2))
    else:
        for line in _report(finished):
            typer.echo(line)
    sys.stdout.flush()


def _require_packages() -> None:
    """Training's packages are extras. Looked for, not imported: that takes seconds, and bad input is told first."""
    from hethub.errors import MachineError

    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MachineError(f"not installed: {', '.join(missing)}. Run: pip install 'hethub[launch,plots]'")


def _report(finished: Finished) -> list[str]:
    s = finished.summary
    mark = " (emulated, modelled time)" if s["emulated"] else ""
    return [
        f"loss {s['loss_first']:.4f} -> {s['loss_last']:.4f} in {s['steps']} steps",
        *_held_out(s),
        f"speed {s['tokens_per_second']:,.0f} tokens/s{mark}, {s['share_of_prediction']:.1%} of its prediction",
        *_bounds(s),
        *_emulation(s),
        *_comparison(finished),
        f"run folder {finished.folder}: summary.json, timeline.html, trace.json, model.safetensors, logs/",
    ]


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


def _comparison(finished: Finished) -> list[str]:
    even, s = finished.even, finished.summary
    if even is None:
        return []
    ratio = s["tokens_per_second"] / even["tokens_per_second"]
    return [
        f"best even split, same devices: {even['tokens_per_second']:,.0f} tokens/s; uneven is {ratio:.2f} x as fast",
        f"losses of the two over {even['steps']} steps differ by at most {finished.losses_differ:.1e} (relative)",
    ]
