"""How far predictions are from other engines' measured runs: time and peak memory.

Real steps of OPT-350M on GH200 nodes and on mixed RTX cards, under DeepSpeed's and Megatron-LM's pipelines, are
predicted from measured layer times, links and collectives by the code that predicts ours (`hethub.simulate`). Few
coefficients are fitted; the figures are leave-one-out: each run under coefficients fitted to all others. GH200 steps
are scored against the mean of two campaigns, which differ by up to 16 % themselves.

The cheapest cheats, and what makes them fail:
- times edited by hand: the importer drops rows that are marked as edited;
- fitting each run: there are fewer coefficients than a third of the runs, or `fit` refuses, and the run that is scored
  was not in its fit;
- leaving bad runs out: the number of runs that count is checked against the data's files, all of them are in `raw`,
  and all count in every figure but `undoubted_time_max_abs_error`, which leaves out the runs that the data doubts;
- workers whose quotas do not hold: our own runs give no figure then (`valid`, measured before and after them);
- the steps of our own runs that fit best: the median over all of all rounds counts, and all are in `raw`; rounds that
  are far apart, since others used the machine, give no figure;
- another program predicted than the one that ran, with an order that the true times would give: every action of our own
  runs must have its predicted twin (`own_runs._check`);
- another simulator for others' runs: predictions come from `hethub.simulate.simulate` on a program of actions.

Last our own runs: random plans on CPU workers under quotas (`bench/own_runs.py`), none of them fitted.

    .venv/bin/python benchmarks/predictor_accuracy.py --data FOLDER                  # half an hour
    .venv/bin/python benchmarks/predictor_accuracy.py --data FOLDER --skip own_runs  # one minute
    .venv/bin/python benchmarks/predictor_accuracy.py --only own_runs                # half an hour, writes nothing
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import print_figures, write_result
from hethub.cost.engine_prices import Coefficients
from hethub.cost.footprint import stage_footprint
from hethub.cost.profiles.artifact import import_artifact
from hethub.cost.profiles.profile import Profile
from hethub.simulate.engine_calibration import calibrate_memory, calibrate_time
from hethub.simulate.engine_run import predict_engine_run
from hethub.simulate.imported_runs import MeasuredRun, load_megatron_runs, load_runs
from hethub.simulate.sailor import SailorCosts, load_sailor_costs, sailor_peak_bytes, sailor_step_seconds

OWN_RUNS = "own_runs"
FAMILIES = ("gh200", "mixed", "turing")


def main() -> int:
    """Predict, score, write the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with measured_runs.json and its profiles")
    parser.add_argument("--skip", choices=[OWN_RUNS], help="leave a part out; the result file says so")
    parser.add_argument(
        "--only", choices=[OWN_RUNS], help="take this part alone, without --data; write nothing"
    )
    options = parser.parse_args()
    if options.only is not None:
        print_figures(_own_runs({}))
        return 0
    folder = options.data
    if folder is None:
        print("skipped: give --data FOLDER with the measured runs")
        return 0
    profile = import_artifact(folder)
    runs = load_runs(folder / "measured_runs.json")
    written = len(json.loads((folder / "measured_runs.json").read_text())["runs"])
    if len(runs) != written:
        print(f"NOT VALID {len(runs)} runs of {written} were read")
        return 1
    calibration = calibrate_time(runs, profile)
    fitted = calibration.fit
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {
        "coefficients": {
            name: {"value": value, "interval_95": [value - half, value + half]}
            for name, value, half in zip(fitted.names, fitted.values, fitted.half_widths, strict=True)
        },
        "runs": [],
    }
    by_family: dict[str, list[float]] = defaultdict(list)
    for run, error, left_out in zip(runs, fitted.errors, fitted.left_out_errors, strict=True):
        by_family[family(run)].append(left_out)
        raw["runs"].append(
            {
                "run": run.run.name,
                "measured_seconds": run.seconds,
                "error": left_out,
                "error_in_fit": error,
                "is_doubtful": run.is_doubtful,
            }
        )
    for name in FAMILIES:
        figures[f"{name}_time_mean_abs_error"] = mean_of(by_family[name])
        figures[f"{name}_time_max_abs_error"] = max(map(abs, by_family[name]))
    sure = [e for run, e in zip(runs, fitted.left_out_errors, strict=True) if not run.is_doubtful]
    figures["undoubted_time_max_abs_error"] = max(map(abs, sure))
    for name in ("gh200", "turing"):
        memory = calibrate_memory([run for run in runs if family(run) == name])
        figures[f"{name}_memory_mean_abs_error"] = mean_of(memory.left_out_errors)
        raw[f"{name}_memory"] = {
            "overhead_bytes": memory.overhead_bytes,
            "errors": list(memory.left_out_errors),
        }
    megatron = load_megatron_runs(folder / "measured_runs_megatron.csv")
    raw["megatron_time"] = time_errors(megatron, profile, calibration.coefficients)
    figures["megatron_time_mean_abs_error"] = mean_of([entry["error"] for entry in raw["megatron_time"]])
    stages = stage_errors(megatron)
    figures["stage_memory_mean_abs_error"] = mean_of([entry["error"] for entry in stages])
    raw["stage_memory"] = stages
    figures["sailor_mode_max_difference"] = sailor_difference(runs, load_sailor_costs(folder))
    if options.skip is None:
        figures |= _own_runs(raw)
    else:
        raw[OWN_RUNS] = {"skipped": "by --skip"}
    print_table(raw)
    print_figures(figures)
    kept = without_measurements(raw) | {OWN_RUNS: raw[OWN_RUNS]}
    print(f"wrote {write_result('predictor_accuracy', figures, kept, emulated=False)}")
    return 0


def _own_runs(raw: dict[str, Any]) -> dict[str, float]:
    """Our own runs under CPU quotas; adds to `raw`. No figures where quotas cannot be set or do not hold."""
    from bench.own_runs import own_runs  # torch, which the other parts need not wait for

    figures, raw[OWN_RUNS] = own_runs()
    if "skipped" in raw[OWN_RUNS]:
        print(f"{OWN_RUNS}: skipped, {raw[OWN_RUNS]['skipped']}")
    elif not raw[OWN_RUNS]["valid"]:
        found = raw[OWN_RUNS]
        print(
            f"{OWN_RUNS}: no figure, a worker's CPU time is off its quota, or rounds are too far apart "
            f"({found['wander']:.3f}): {found['quotas']}"
        )
        return {}
    return figures


def family(run: MeasuredRun) -> str:
    """The set that a run belongs to: the first word of its name."""
    return run.run.name.split("-")[0]


def mean_of(errors: Sequence[float]) -> float:
    """Mean absolute error."""
    return sum(map(abs, errors)) / len(errors)


def stage_errors(runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """Error of the allocator's peak of each stage; nothing is fitted."""
    return [
        {
            "run": run.run.name,
            "stage": number,
            "measured_bytes": stage.allocated_bytes,
            "error": stage_footprint(run.run, number).allocated_bytes / stage.allocated_bytes - 1,
        }
        for run in runs
        for number, stage in enumerate(run.stages)
    ]


def sailor_difference(runs: Sequence[MeasuredRun], costs: SailorCosts) -> float:
    """The largest relative difference, of time or memory, between our Sailor mode and its own answers."""
    differences = []
    for run in runs:
        theirs = run.published["sailor"]
        differences.append(sailor_step_seconds(run.run, costs) / theirs["iteration_s"] - 1)
        differences.append(sailor_peak_bytes(run.run, costs) / 2**20 / theirs["peak_memory_mib"] - 1)
    return max(abs(float(difference)) for difference in differences)


def time_errors(
    runs: Sequence[MeasuredRun], profile: Profile, coefficients: Coefficients
) -> list[dict[str, Any]]:
    """Error of each run's step under coefficients that were fitted to another engine's runs."""
    return [
        {
            "run": run.run.name,
            "measured_seconds": run.seconds,
            "error": predict_engine_run(run.run, profile, coefficients).step_seconds / run.seconds - 1,
        }
        for run in runs
    ]


def without_measurements(value: Any) -> Any:
    """The same without others' measured figures, which stay in their own files."""
    if isinstance(value, dict):
        return {k: without_measurements(v) for k, v in value.items() if not k.startswith("measured_")}
    return [without_measurements(v) for v in value] if isinstance(value, list) else value


def print_table(raw: dict[str, Any]) -> None:
    """A line for each run and coefficient."""
    for entry in (*raw["runs"], *raw["megatron_time"]):
        print(f"{entry['run']:34} {entry['measured_seconds']:10.4f} s {100 * entry['error']:7.1f} %")
    for name, entry in raw["coefficients"].items():
        low, high = entry["interval_95"]
        print(f"{name:34} {entry['value']:10.4g}   [{low:.4g}, {high:.4g}]")


if __name__ == "__main__":
    raise SystemExit(main())
