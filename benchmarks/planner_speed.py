"""How long the planner searches: 8, 768, 10,000 and 100,000 devices, and how that grows with devices and with kinds.

Seconds are from specs parsed to plan chosen, finalists simulated (`search.seconds`); bounds and baselines that `hethub
plan` prints beside the plan are not counted. Every size runs in processes of its own, the first search of each counts,
and the figure is the median of REPEATS. 100,000 devices are the 10,000 with ten times the nodes and the batch.

The cheapest cheats, and what makes them fail:
- the first plan that fits, without a search: the proven gap must be below GAP (`problems`);
- a bound that is no bound, so that the gap looks small: the physical bound must not be above the plan's step, and the
  independent checker must accept the plan (on 100,000 devices too);
- a plan of a few devices: those in use must have WORKING of the speed of all;
- fewer finalists simulated on the machine that measures: the number simulated stands in `raw` and must be at least 1.

    .venv/bin/python benchmarks/planner_speed.py          # a few minutes; writes the result file
    .venv/bin/python benchmarks/planner_speed.py --small  # 8 and 768 devices only, writes nothing
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.results import ROOT, print_figures, write_result
from hethub.cli.uncollected import uncollected
from hethub.cost.bounds import physical_bound, physical_step_seconds
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.specs.cluster import load_planning
from hethub.specs.layout import lay_out
from hethub.specs.resolved import Cluster

SPECS = Path(__file__).parent / "specs"
SIX = SPECS / "six-types-10000.yaml"
# file, times as many nodes and rows, device types (None: all)
SIZES: dict[str, tuple[Path, int, int | None]] = {
    "devices_8": (ROOT / "cluster_specs" / "laptop.yaml", 1, None),
    "devices_768": (ROOT / "cluster_specs" / "hethub-768.yaml", 1, None),
    "devices_10000": (SIX, 1, None),
    "devices_100000": (SIX, 10, None),
}
KINDS = (1, 2, 3, 4, 5, 6)  # of the 10,000
REPEATS = 5
GAP = 0.10
WORKING = 0.85  # of the speed of all devices by the physical bound's shares; what is idle besides is told by the gap
SMALL = ("devices_8", "devices_768")


def main() -> int:
    """Measure every size, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the small clusters only; write nothing")
    parser.add_argument("--search", nargs=3, metavar=("FILE", "TIMES", "KINDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        path, times, kinds = options.search
        print(json.dumps(measure(Path(path), int(times), int(kinds) or None)))
        return 0
    raw: dict[str, Any] = {}
    for name in SMALL if options.small else SIZES:
        path, times, kinds = SIZES[name]
        repeats = 1 if name == "devices_100000" else REPEATS
        raw[name] = [in_a_process(path, times, kinds) for _ in range(repeats)]
    figures = {
        f"{name}_seconds": statistics.median(run["seconds"] for run in runs) for name, runs in raw.items()
    }
    if not options.small:
        figures["devices_10000_peak_gib"] = max(run["peak_bytes"] for run in raw["devices_10000"]) / 2**30
        raw["kinds"] = {str(kinds): in_a_process(SIX, 1, kinds) for kinds in KINDS}
    print_figures(figures)
    wrong = [
        f"{name}: {text}"
        for name, runs in raw.items()
        if name in SIZES
        for run in runs
        for text in problems(run)
    ]
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and not options.small:
        print(f"wrote {write_result('planner_speed', figures, raw, emulated=False)}")
    return 1 if wrong else 0


def in_a_process(path: Path, times: int, kinds: int | None) -> dict[str, Any]:
    """One search in a process of its own."""
    command = [sys.executable, __file__, "--search", str(path), str(times), str(kinds or 0)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{path.stem} x {times}, {kinds or 'all'} kinds: {found['seconds']:.3g} s, gap {found['gap']:.2%}")
    return found


def measure(path: Path, times: int, kinds: int | None) -> dict[str, Any]:
    """Search once; what was found, and what it took."""
    told = load_planning(path)
    cluster, workload = told.cluster, told.workload
    if times > 1:
        cluster = _times(cluster, times)
        workload = replace(workload, global_batch=workload.global_batch * times)
    begin = time.perf_counter()
    problem = Problem.of(cluster, workload, constraints=told.constraints)
    if kinds is not None:
        problem = replace(problem, types=frozenset(list(cluster.device_types)[:kinds]))
    with uncollected():  # as the command does
        choice = FirstPlanner().choose(problem)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert choice is not None
    used = lay_out(choice.plan).used
    counts, devices = cluster.counts(), problem.compute.graph.devices
    shares = physical_bound(problem.compute).shares
    wanted = sum(count for name, count in counts.items() if problem.types is None or name in problem.types)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "gap": choice.proven_gap,
        "considered": choice.considered,
        "simulated": choice.simulated,
        "step_seconds": choice.closed_form_seconds,
        "physical_seconds": physical_step_seconds(problem.compute),
        "devices": wanted,
        "used": len(used),
        "working": sum(shares[devices[d].type.name] / counts[devices[d].type.name] for d in used),
        "invalid": [problem.text for problem in check_plan(choice.plan)],
    }


def _times(cluster: Cluster, times: int) -> Cluster:
    groups = tuple(replace(group, nodes=group.nodes * times) for group in cluster.node_groups)
    return replace(cluster, name=f"{cluster.name}-x{times}", node_groups=groups)


def problems(run: dict[str, Any]) -> list[str]:
    """What makes a run worth nothing."""
    found = list(run["invalid"])
    if run["gap"] > GAP:
        found.append(f"the proven gap is {run['gap']:.1%}")
    if run["physical_seconds"] > run["step_seconds"]:
        found.append("the step is below the physical bound")
    if run["working"] < WORKING:
        used, devices = run["used"], run["devices"]
        found.append(f"{used} of {devices} devices with {run['working']:.1%} of the speed are used")
    if run["simulated"] < 1:
        found.append("no finalist was simulated")
    return found


if __name__ == "__main__":
    sys.exit(main())
