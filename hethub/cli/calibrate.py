"""`hethub calibrate RUNS`: fit the few coefficients of predictions to measured runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hethub.simulate.engine_calibration import MemoryFit
    from hethub.simulate.least_squares import Fit

__all__ = ["calibrate"]


def calibrate(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of our runs, or of imported ones (measured_runs.json).")
    ],
    output: Annotated[Path, typer.Option(help="Where to write the coefficients.")] = Path("calibration.json"),
    profiles: Annotated[
        Path | None, typer.Option(help="Folder with layers.csv and transfers.csv to predict by.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is written instead of a table.")
    ] = False,
) -> None:
    """Fit how far devices fall short of their figures, with intervals and leave-one-out errors.

    Example: hethub calibrate runs/first runs/second runs/third --output calibration.json
    """
    from hethub.cli.run_sources import load_sources
    from hethub.errors import InputError
    from hethub.files import write_json, writing
    from hethub.simulate.engine_calibration import calibrate_overhead, calibrate_time
    from hethub.simulate.own_calibration import calibrate_own_runs

    sources = load_sources(runs, profiles)
    if sources.own and sources.imported:
        raise InputError(
            "our own runs and imported ones have coefficients of their own. Calibrate them apart."
        )
    if sources.own:
        found, memory = calibrate_own_runs(sources.own, sources.profile), {}
        names = [run.name for run in sources.own]
    else:
        assert sources.profile is not None  # imported with the runs
        found = calibrate_time(sources.imported, sources.profile).fit
        memory = calibrate_overhead(sources.imported)
        names = [run.run.name for run in sources.imported]
    content = _content(found, memory, names, profiled=sources.profile is not None)
    with writing(output, "Give another --output."):
        write_json(output, content)
    typer.echo(json.dumps(content, indent=2) if as_json else _text(content))
    if not as_json:
        typer.echo(f"wrote {output}", err=True)


def _content(found: Fit, memory: dict[str, MemoryFit], names: list[str], *, profiled: bool) -> dict[str, Any]:
    from hethub.simulate.least_squares import ratio_interval

    coefficients: dict[str, Any] = {
        name: {"value": value, "interval_95": [value - half, value + half]}
        for name, value, half in zip(found.names, found.values, found.half_widths, strict=True)
    }
    for device_type, fitted in memory.items():
        coefficients[f"overhead_bytes.{device_type}"] = {"value": fitted.overhead_bytes, "interval_95": None}
    errors = [abs(e) for e in found.left_out_errors]
    return {
        "version": 1,
        "coefficients": coefficients,
        "profiled": profiled,
        "ratio_interval_95": list(ratio_interval(found.left_out_errors)),
        "left_out_mean_abs_error": sum(errors) / len(errors),
        "left_out_max_abs_error": max(errors),
        "runs": [
            {"run": name, "error": error, "left_out_error": left_out}
            for name, error, left_out in zip(names, found.errors, found.left_out_errors, strict=True)
        ],
    }


def _text(content: dict[str, Any]) -> str:
    lines = ["coefficient\tvalue\tlow\thigh"]
    for name, entry in content["coefficients"].items():
        low, high = entry["interval_95"] or ("", "")
        bounds = "\t".join(format(v, ".4g") if v != "" else "" for v in (low, high))
        lines.append(f"{name}\t{entry['value']:.4g}\t{bounds}")
    lines.append("run\terror\tleft_out_error")
    lines += [f"{e['run']}\t{e['error']:.4f}\t{e['left_out_error']:.4f}" for e in content["runs"]]
    low, high = content["ratio_interval_95"]
    lines.append(f"# a further run's measured over predicted, 95 %\t{low:.4f} to {high:.4f}")
    lines.append(f"# left_out_mean_abs_error\t{content['left_out_mean_abs_error']:.4f}")
    lines.append(f"# left_out_max_abs_error\t{content['left_out_max_abs_error']:.4f}")
    return "\n".join(lines)
