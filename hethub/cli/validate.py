"""`hethub validate RUNS`: predicted against measured, run by run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hethub.simulate.validation import RunCheck

__all__ = ["validate"]


def validate(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of our runs, or of imported ones (measured_runs.json).")
    ],
    calibration: Annotated[Path | None, typer.Option(help="A file that `hethub calibrate` wrote.")] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="Folder with layers.csv and transfers.csv to predict by.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a scatter plot here.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a run whose layers the profile lacks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare predicted with measured step times and peak memory.

    Example: hethub validate runs/first runs/second --html scatter.html
    """
    from hethub.cli.run_sources import load_sources
    from hethub.cost.engine_prices import Coefficients
    from hethub.simulate.validation import check_imported_run, check_own_run, load_calibration

    sources = load_sources(runs, profiles)
    chosen = None if calibration is None else load_calibration(calibration).coefficients
    given = None if profiles is None else sources.profile
    checks = [check_own_run(run, chosen, given) for run in sources.own]
    if sources.imported:
        assert sources.profile is not None  # imported with the runs
        checks += [
            check_imported_run(run, sources.profile, chosen or Coefficients(), strict=strict)
            for run in sources.imported
        ]
    answer = _answer(checks)
    typer.echo(json.dumps(answer, indent=2) if as_json else _text(answer))
    for text in sorted({text for check in checks for text in check.substitutes}):
        typer.echo(text, err=True)
    if html is not None:
        from hethub.timeline.scatter import write_scatter

        write_scatter(html, [(c.name, c.measured_seconds, c.predicted_seconds) for c in checks])
        typer.echo(f"wrote {html}", err=True)


def _answer(checks: Sequence[RunCheck]) -> dict[str, Any]:
    """Emulated runs apart: their error is the runtime's overhead, not the predictor's."""
    answer: dict[str, Any] = {}
    for key, emulated in (("real", False), ("emulated", True)):
        chosen = [check for check in checks if check.emulated == emulated]
        memory = [abs(e) for c in chosen if (e := c.memory_error) is not None]
        times = [abs(check.time_error) for check in chosen]
        answer[key] = {
            "time_mean_abs_error": sum(times) / len(times) if times else None,
            "time_max_abs_error": max(times, default=None),
            "memory_mean_abs_error": sum(memory) / len(memory) if memory else None,
            "memory_max_abs_error": max(memory, default=None),
            "runs": [_as_object(check) for check in chosen],
        }
    return answer


def _as_object(check: RunCheck) -> dict[str, Any]:
    return {
        "run": check.name,
        "predicted_seconds": check.predicted_seconds,
        "measured_seconds": check.measured_seconds,
        "time_error": check.time_error,
        "predicted_bytes": check.predicted_bytes,
        "measured_bytes": check.measured_bytes,
        "memory_error": check.memory_error,
        "worst_term": check.worst_term,
        "substitutes": list(check.substitutes),
        "terms_measured_less_predicted_seconds": dict(check.terms),
    }


def _text(answer: dict[str, Any]) -> str:
    lines = ["run\tkind\tpredicted_seconds\tmeasured_seconds\ttime_error\tmemory_error\tworst_term"]
    for kind, part in answer.items():
        for run in part["runs"]:
            memory = "" if run["memory_error"] is None else f"{run['memory_error']:.4f}"
            lines.append(
                f"{run['run']}\t{kind}\t{run['predicted_seconds']:.6g}\t{run['measured_seconds']:.6g}\t"
                f"{run['time_error']:.4f}\t{memory}\t{run['worst_term'] or ''}"
            )
    for kind, part in answer.items():
        for name, value in part.items():
            if name != "runs" and value is not None:
                lines.append(f"# {kind} {name}\t{value:.4f}")
    return "\n".join(lines)
