"""How fast step times are predicted: the closed form over many splits, the simulator over whole programs.

*Closed form*: SPLITS random splits into STAGES stages of MICRO_BATCHES micro-batches; a stage evaluation is one stage
of one split, the median of REPEATS. *Simulator*: a step of every device of the cluster, timeline recorded, from the
compiled program to the records: turning lists into columns, the events, the records. Each size runs in a process of its
own; the seconds are the first simulation's there, loading of the compiled loop included, cycles not collected (as in
`hethub plan` and `simulate`). Compiling that loop, once
after every change of its source, and compiling the program are stated apart, in `raw`. The peak is the process's, with
the program; what it was before the simulation stands in `raw`.

The cheapest cheats, and what makes them fail:
- alike devices simulated once: every action of every device must have its record (`problems`);
- programs of few actions: every device must do MICRO_BATCHES forwards and backwards, and exchange gradients;
- an answer that is quick and wrong: the interpreted loop must give the same seconds (768 devices), and the closed form
  must be within CLOSED_FORM_ERROR of following every task of some of the splits that were timed (`worst_error`);
- a light process that had its work done elsewhere: the peak is read in the process that simulated.

    .venv/bin/python benchmarks/predictor_speed.py          # about four minutes; writes the result file
    .venv/bin/python benchmarks/predictor_speed.py --small  # 768 devices only, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import ROOT, print_figures, write_result
from hethub.cli.uncollected import uncollected
from hethub.cost.closed_form import Splits, fixed_order, step_seconds
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.program.actions import Program, What
from hethub.program.compile import compile_program
from hethub.simulate.engine import Simulation, simulate
from hethub.specs.cluster import load_cluster
from hethub.specs.layout import lay_out
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.timeline.record import Kind

SPECS = Path(__file__).parent / "specs"
# file, pipelines, stages of each kind in one pipeline (each a node of eight devices)
SIZES = {
    "devices_768": (ROOT / "cluster_specs" / "hethub-768.yaml", 8, {"amd": 2, "a800": 10}),
    "devices_10000": (SPECS / "ten-thousand.yaml", 10, {"fast": 100, "slow": 25}),
}
MICRO_BATCHES = 64
SPLITS, STAGES, REPEATS, CHECKED = 8192, 8, 9, 64
CLOSED_FORM_ERROR = 0.02
SMALL = "devices_768"
INTERPRETED = 1_000_000  # actions beyond which lists of the interpreted loop would take many GiB


def main() -> int:
    """Measure every part, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the smaller cluster only; write nothing")
    parser.add_argument("--simulate", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        print(json.dumps(measure(options.simulate)))
        return 0
    raw: dict[str, Any] = {"closed_form": closed_form(), "compile": first_compile()}
    for name in [SMALL] if options.small else SIZES:
        raw[name] = in_a_process(name)
    figures = {
        "stage_evaluations_per_second": statistics.median(raw["closed_form"]["stage_evaluations_per_second"]),
        "actions_per_second": raw[SMALL]["actions"] / raw[SMALL]["seconds"],
        **{f"{name}_seconds": raw[name]["seconds"] for name in SIZES if name in raw},
    }
    wrong = [f"{name}: {text}" for name in SIZES if name in raw for text in raw[name].pop("problems")]
    if raw["closed_form"]["worst_error"] > CLOSED_FORM_ERROR:
        wrong.append(f"closed form: off by {raw['closed_form']['worst_error']:.3f}")
    if not options.small:
        figures["devices_10000_peak_gib"] = raw["devices_10000"]["peak_bytes"] / 2**30
    print_figures(figures)
    print_figures({"  compiling the loop, seconds": raw["compile"]["seconds"]})
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and not options.small:
        print(f"wrote {write_result('predictor_speed', figures, raw, emulated=False)}")
    return 1 if wrong else 0


# --- the closed form --------------------------------------------------------------------------------------------


def closed_form() -> dict[str, Any]:
    """Stage evaluations per second, every repetition over other splits."""
    speeds, errors = [], []
    in_flight = list(range(STAGES, 0, -1))
    for repeat in range(REPEATS + 1):
        splits = random_splits(repeat)
        begin = time.perf_counter()
        found = step_seconds(splits, in_flight, MICRO_BATCHES)
        seconds = time.perf_counter() - begin
        speeds.append(SPLITS * STAGES / seconds)
        errors.append(worst_error(splits, in_flight, found))
    return {
        "stage_evaluations_per_second": speeds[1:],
        "splits": SPLITS,
        "stages": STAGES,
        "worst_error": max(errors),
    }


def worst_error(splits: Splits, in_flight: list[int], found: Any) -> float:
    """The largest relative error over CHECKED splits, each followed task by task to the end."""
    order = fixed_order(in_flight, MICRO_BATCHES)
    worst = 0.0
    for row in range(0, SPLITS, SPLITS // CHECKED):
        work = (splits.forward[row].tolist(), splits.backward[row].tolist())
        transfer, latency = splits.transfer[row].tolist(), splits.latency[row].tolist()
        free, link_free = [0.0] * STAGES, [[0.0] * STAGES, [0.0] * STAGES]
        there: dict[tuple[bool, int, int], float] = {}
        for backward, stage, micro_batch in order:
            begin = max(free[stage], there.pop((backward, stage, micro_batch), 0.0))
            free[stage] = begin + work[backward][stage]
            target, boundary = (stage - 1, stage - 1) if backward else (stage + 1, stage)
            if 0 <= target < STAGES:
                sent = max(free[stage], link_free[backward][boundary]) + transfer[boundary]
                link_free[backward][boundary] = sent
                there[backward, target, micro_batch] = sent + latency[boundary]
        summed = max(end + reduce for end, reduce in zip(free, splits.reduce[row], strict=True))
        worst = max(worst, abs(found[row] / (summed + splits.update[row].max()) - 1.0))
    return float(worst)


def random_splits(seed: int) -> Splits:
    """Unequal stages; links that take a tenth of a stage's forward."""
    random = np.random.default_rng(seed)

    def times(width: int, mean: float) -> Any:
        return mean * np.exp(random.normal(0.0, 0.4, (SPLITS, width)))

    return Splits(
        forward=times(STAGES, 1.0),
        backward=times(STAGES, 2.0),
        transfer=times(STAGES - 1, 0.1),
        latency=times(STAGES - 1, 0.01),
        reduce=times(STAGES, 1.0),
        update=times(STAGES, 0.2),
    )


# --- the simulator ----------------------------------------------------------------------------------------------


def first_compile() -> dict[str, float]:
    """Seconds that compiling the event loop takes where nothing of it is kept on disk."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "hethub.simulate.compiled"],
            check=True,
            cwd=ROOT,
            env={**os.environ, "NUMBA_CACHE_DIR": folder},
        )
        seconds = time.perf_counter() - begin
    # What the measured processes load; compiled here once, so that none of them compiles.
    subprocess.run([sys.executable, "-m", "hethub.simulate.compiled"], check=True, cwd=ROOT)
    return {"seconds": seconds}


def in_a_process(name: str) -> dict[str, Any]:
    """`measure` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--simulate", name], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(name: str) -> dict[str, Any]:
    """Compile a plan of this size and simulate it, as the commands do; what is wrong with program or answer."""
    plan = the_plan(*SIZES[name])
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    begin = time.perf_counter()
    program = compile_program(lay_out(plan), compute)
    compiled = time.perf_counter() - begin
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    with uncollected():
        simulation = simulate(program, compute, sub_events=False, loop="compiled")
    seconds = time.perf_counter() - begin
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "actions": sum(len(actions) for actions in program.devices),
        "messages": len(program.messages),
        "step_seconds": simulation.step_seconds,
        "program_compile_seconds": compiled,
        "peak_bytes": peak_bytes,
        "program_peak_bytes": before,
        "problems": problems(program, simulation, compute),
    }


def problems(program: Program, simulation: Simulation, compute: ComputeModel) -> list[str]:
    """What makes it no simulation of every device's whole step."""
    assert simulation.timeline is not None
    records = simulation.timeline.records
    found = []
    done = sum(not program.carried(action) for actions in program.devices for action in actions)
    if len(records) != done:
        found.append(f"{len(records)} records of {done} actions")
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        chosen = records[records["kind"] == kind]
        places = np.unique(chosen["device"].astype(np.int64) * MICRO_BATCHES + chosen["micro_batch"])
        if len(places) != MICRO_BATCHES * len(program.devices):
            found.append(f"not every device does every {kind.name.lower()}")
    gradients = (t for t in program.transfers if t.what in (What.REDUCE, What.REDUCE_SCATTER))
    if len({end for t in gradients for end in t.members or (t.source, t.destination)}) != len(
        program.devices
    ):
        found.append("not every device sends or takes gradients")
    if done < INTERPRETED:
        again = simulate(program, compute, record=False, loop="interpreted").step_seconds
        if again != simulation.step_seconds:
            found.append(f"interpreted {again} s, compiled {simulation.step_seconds} s")
    return found


def the_plan(path: Path, pipelines: int, nodes: dict[str, int]) -> Plan:
    """Alike pipelines whose stages are whole nodes, layers dealt out evenly."""
    cluster, workload = load_cluster(path)
    assert workload is not None
    model = workload.model
    each = 8
    groups = [(name, number) for name, count in nodes.items() for number in range(count)]
    cuts = np.linspace(0, model.layers + 2, len(groups) + 1).round().astype(int).tolist()
    stages = []
    for place, ((name, number), layers) in enumerate(zip(groups, pairwise(cuts), strict=True)):
        taken = ", ".join(f"{name}/{number + nodes[name] * p}/0-{each - 1}" for p in range(pipelines))
        ends = layers[0] == 0 or layers[1] == model.layers + 2
        rank = Rank(
            devices=taken,
            count=each,
            heads=model.heads // each,
            ffn=model.ffn_size // each,
            vocab=model.vocab_size // each if ends else 0,
        )
        held = min(MICRO_BATCHES, len(groups) - place)
        stages.append(Stage(layers=layers, in_flight=held, replicas=[Replica(rows=1, ranks=[rank])]))
    pipeline = Pipeline(repeat=pipelines, micro_batches=MICRO_BATCHES, micro_batch_rows=1, stages=stages)
    return Plan(name=cluster.name, pipelines=[pipeline], cluster=cluster, workload=workload)


if __name__ == "__main__":
    sys.exit(main())
