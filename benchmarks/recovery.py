"""What failures and checkpoints cost: eight emulated devices of three types, steps of about a second, real processes.

Four launches of one training: *quiet*, with a checkpoint every 20 steps and no fault; *kills*, which loses a worker at
KILLS seeded points (replaced, `restart: same`); *nodes*, which loses both workers of a node twice (`restart: replan`);
*soak*, STEPS steps with FAULTS faults, a checkpoint every 5. A fault writes the second of its killing into its worker's
log; the driver's journal has when it knew, what each part took, and when the first step was done that no attempt had
done before. Detection is from the first to the second, recovery from the first to the last.

`goodput_ratio`: steps times the median step of the quiet run, over the wall time from the first step's beginning.
`predicted_goodput_ratio` is the simulator's, made before the soak runs: `hethub simulate PLAN --faults JOB` with the
soak's own job file. Steps, and which are done again, are simulated; the rest of a recovery is in the defaults of
`hethub/simulate/course.py`, which the parts measured here keep true.

The cheapest cheats, and what makes them fail:
- faults that do not happen, or are done again: the journal must have one failure a fault, on its device, and histories
  of all runs must be the quiet one's (`problems`): same samples, same bits under the same plan, 1e-5 under another;
- recovery that begins anew, or skips steps: the checker wants every step committed once, in order;
- a checkpoint of nothing: bytes must be those of three numbers an element, and the recoveries read them;
- a clock that starts late: killing is timed by the killed process itself.

    .venv/bin/python benchmarks/recovery.py          # about fifteen minutes; writes the result file
    .venv/bin/python benchmarks/recovery.py --small  # 3 kills, a soak of 30 steps; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.damage import DAMAGES
from bench.kills import kill_points
from bench.results import print_figures, write_result
from hethub.checkpoints.manifest import CheckpointError
from hethub.checkpoints.store import CHECKPOINTS, Store, verify_checkpoint
from hethub.launch.history import HISTORY, read_history
from hethub.launch.history_check import check_history, check_journal, compare_histories
from hethub.launch.journal import Event, read_journal
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.specs.cluster import load_cluster
from hethub.specs.layout import lay_out
from hethub.specs.plan import load_plan, save_plan

SPECS = Path(__file__).parent / "specs"
KILLS, STEPS, FAULTS, DAMAGED = 24, 200, 10, 1000
QUIET_STEPS, EVERY = 41, 5
ROWS = 8
ALLOWED_SECONDS = {"worker": 8.0, "node": 20.0}
LEAST_STEP_SECONDS = 0.8
SEED = 7
_KILLED = re.compile(r"killed on purpose at ([0-9.]+)")


@dataclass(frozen=True)
class Ran:
    """A launch that has ended, and what is wrong with it."""

    folder: Path
    summary: dict[str, Any]
    events: list[Event]
    problems: list[str]


def main() -> int:
    """Measure every part, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="3 kills, 30 steps of soak; write nothing")
    small = parser.parse_args().small
    kills, steps, faults = (3, 30, 2) if small else (KILLS, STEPS, FAULTS)
    with tempfile.TemporaryDirectory(prefix="hh-") as place:
        folder = Path(place)
        make_plan(folder)
        quiet = launch(folder, "quiet", steps=QUIET_STEPS, every=20)
        step = step_seconds(quiet)
        killed = launch(
            folder,
            "kills",
            steps=kills + EVERY + 2,
            points=kill_points(folder / "plan.yaml", SEED, kills, kills + EVERY + 1, EVERY),
        )
        nodes = launch(
            folder, "nodes", steps=14, points=[*node(folder, "slow/1", 4), *node(folder, "slow/0", 9)]
        )
        raw: dict[str, Any] = {
            "step_seconds": step,
            "killed_workers": recoveries(killed),
            "lost_nodes": recoveries(nodes),
            "quiet": quiet.summary["checkpoints"],
        }
        figures = recovery_figures(raw) | checkpoint_figures(raw, quiet, step)
        figures["kills_survived_ratio"] = bool(killed.summary) * killed_workers(killed.folder) / kills
        wrong = [
            f"{ran.folder.parent.name}: {text}" for ran in (quiet, killed, nodes) for text in ran.problems
        ]
        if step < LEAST_STEP_SECONDS:
            wrong.append(f"a step takes {step:.2f} s")
        if faults:
            soaked = soak(folder, steps, faults, step)
            figures |= soaked["figures"]
            raw["soak"] = soaked["raw"]
            wrong += [f"soak: {text}" for text in soaked["problems"]]
        figures["silent_loads"] = silent_loads(quiet.folder / CHECKPOINTS, 50 if small else DAMAGED)
    print_figures(figures)
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and not small:
        print(f"wrote {write_result('recovery', figures, raw, emulated=True)}")
    return 1 if wrong else 0


# --- launches ---------------------------------------------------------------------------------------------------


def make_plan(folder: Path) -> None:
    """The cluster's own plan, the same for all launches, and one text."""
    cluster, whole = load_cluster(SPECS / "three-types.yaml")
    assert whole is not None
    workload = replace(whole, global_batch=ROWS)
    save_plan(FirstPlanner().plan(Problem.of(cluster, workload)).plan, folder / "plan.yaml")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20_000)


def launch(
    folder: Path, name: str, *, steps: int, every: int = EVERY, points: Sequence[dict[str, Any]] = ()
) -> Ran:
    """Launch with these faults, to the end."""
    return run_job(write_job(folder, name, steps=steps, every=every, points=points), steps, points)


def run_job(here: Path, steps: int, points: Sequence[dict[str, Any]]) -> Ran:
    """Launch a job that is written, to the end."""
    (here / "t").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hethub", "launch", "job.yaml"],
        cwd=here,
        env={**os.environ, "TMPDIR": str(here / "t")},
        capture_output=True,
        text=True,
        check=False,
    )
    run = here / "run"
    summary = json.loads((run / "summary.json").read_text()) if done.returncode == 0 else {}
    entries, problems = read_history(run / HISTORY)
    events, torn = read_journal(run)
    if done.returncode:
        problems.append(done.stderr.splitlines()[-1])
    problems += torn + check_history(entries, steps) + check_journal(entries, events, steps)
    failed = [event for event in events if event.event == "failed"]
    lost = {event.device for event in failed} | {device for event in failed for device in event.lost}
    done_ones = killed_workers(run)
    if not lost <= {point["device"] for point in points} or done_ones != len(points):
        problems.append(f"{done_ones} killed, {sorted(lost)} lost, asked for {len(points)}")
    if here.name != "quiet":
        # The learning rate is the same in all steps, so runs of other lengths are the same training.
        unbroken, _ = read_history(here.parent / "quiet" / "run" / HISTORY)
        common = min(steps, QUIET_STEPS)
        ours = [entry for entry in entries if entry.step < common]
        theirs = [entry for entry in unbroken if entry.step < common]
        problems += compare_histories(ours, theirs, relative=1e-5)
    return Ran(run, summary, events, problems)


def write_job(
    folder: Path, name: str, *, steps: int, every: int, points: Sequence[dict[str, Any]] = ()
) -> Path:
    """The job of a launch, in a folder of its own."""
    here = folder / name
    here.mkdir()
    replan = name == "nodes"
    job = {
        "cluster": str(SPECS / "three-types.yaml"),
        "plan": str(folder / "plan.yaml"),
        "data": {"files": [str(folder / "text.txt")], "tokenizer": "bytes", "held_out": 0.05},
        "workload": {
            "model": str(SPECS / "three-types-model" / "config.json"),
            "sequence_length": 16,
            "global_batch": ROWS,
            "precision": "fp32",
        },
        "steps": steps,
        "seed": 1,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3, "final_learning_rate_ratio": 1.0},
        "output": "run",
        "history": {"digest_every": 5},
        "checkpoint": {"every": every, "keep": 2},
        "on_failure": {"restart": "replan" if replan else "same", "max_restarts": 1000},
        "fault": list(points),
    }
    (here / "job.yaml").write_text(json.dumps(job))
    return here


def predict_goodput(folder: Path, job: Path) -> dict[str, Any]:
    """What the simulator says of a job with faults."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hethub",
            "simulate",
            str(folder / "plan.yaml"),
            "--faults",
            str(job),
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)["faults"]
    return found


def killed_workers(run: Path) -> int:
    """Workers that a fault killed, by their own logs. Two that die together are one failure."""
    return sum(len(_KILLED.findall(log.read_text())) for log in (run / "logs").glob("*.log"))


def step_seconds(ran: Ran) -> float:
    """Median wall seconds of a step."""
    return float(ran.summary["step_seconds"]) * float(ran.summary["time_scale"])


def node(folder: Path, name: str, step: int) -> list[dict[str, Any]]:
    """Kills of all of a node's devices that the plan uses, at the same step."""
    plan, _ = load_plan(folder / "plan.yaml")
    devices = [plan.cluster.devices()[d].name for d in lay_out(plan).used]
    inside = [device for device in devices if device.rpartition("/")[0] == name]
    return [
        {"device": device, "step": step, "action": 0, "phase": "before", "do": "kill"} for device in inside
    ]


# --- what it took -----------------------------------------------------------------------------------------------


def recoveries(ran: Ran) -> list[dict[str, Any]]:
    """Of each failure: cause, seconds until known, and until a step was done that none had done before, by parts."""
    killed = sorted(
        float(found)
        for log in (ran.folder / "logs").glob("*.log")
        for found in _KILLED.findall(log.read_text())
    )
    found = []
    for event in ran.events:
        if event.event == "failed":
            # The last killing before it was known; those of a node come together, and the first counts.
            at = [second for second in killed if second <= event.at_unix_seconds]
            first = min((second for second in at if at[-1] - second < 1.0), default=event.at_unix_seconds)
            found.append(
                {"cause": event.cause, "detect_seconds": event.at_unix_seconds - first, "killed": first}
            )
        elif event.event == "recovered" and found:
            found[-1]["back_seconds"] = event.at_unix_seconds - found[-1]["killed"]
            found[-1]["parts"] = event.seconds
    return found


def recovery_figures(raw: dict[str, Any]) -> dict[str, float]:
    """Medians by part, the worst over what is allowed."""
    workers, nodes = raw["killed_workers"], raw["lost_nodes"]
    figures: dict[str, float] = {}
    for name, found in (("worker", workers), ("node", nodes)):
        whole = [entry for entry in found if "parts" in entry]
        figures[f"{name}_detect_seconds"] = statistics.median(entry["detect_seconds"] for entry in whole)
        for part in ("plan", "regroup", "import", "join", "load", "first_step"):
            seconds = [entry["parts"].get(f"{part}_seconds", 0.0) for entry in whole]
            figures[f"{name}_{part}_seconds"] = statistics.median(seconds)
        figures[f"{name}_back_seconds"] = statistics.median(entry["back_seconds"] for entry in whole)
        worst = max(entry["back_seconds"] for entry in whole)
        figures[f"{name}_recovery_over_allowed"] = worst / ALLOWED_SECONDS[name]
    figures["recovery_over_allowed"] = max(
        figures["worker_recovery_over_allowed"], figures["node_recovery_over_allowed"]
    )
    return figures


def checkpoint_figures(raw: dict[str, Any], quiet: Ran, step: float) -> dict[str, float]:
    """What checkpoints cost in time and bytes."""
    kept = quiet.summary["checkpoints"]
    parts = [entry["parts"] for entry in raw["killed_workers"] + raw["lost_nodes"] if "parts" in entry]
    return {
        "checkpoint_stall_ratio": kept["longest_stall_seconds"] / (20 * step),
        "checkpoint_seconds": kept["longest_seconds"],
        "saved_bytes_ratio": kept["saved_bytes_ratio"],
        "read_bytes_ratio": max(p["read_bytes"] / p["needed_bytes"] for p in parts if p.get("needed_bytes")),
    }


def soak(folder: Path, steps: int, faults: int, step: float) -> dict[str, Any]:
    """Many steps with faults: goodput, and what the simulator expected of it."""
    points = kill_points(folder / "plan.yaml", SEED + 1, faults, steps - EVERY, EVERY)
    here = write_job(folder, "soak", steps=steps, every=EVERY, points=points)
    expected = predict_goodput(folder, here / "job.yaml")
    ran = run_job(here, steps, points)
    began = next(event.at_unix_seconds for event in ran.events if event.event == "began")
    ended = next(event.at_unix_seconds for event in reversed(ran.events) if event.event == "ended")
    goodput, predicted = steps * step / (ended - began), expected["goodput_ratio"]
    figures = {
        "goodput_ratio": goodput,
        "predicted_goodput_ratio": predicted,
        "goodput_off": abs(goodput - predicted),
    }
    raw = {"recoveries": recoveries(ran), "wall_seconds": ended - began, "predicted": expected}
    return {"figures": figures, "raw": raw, "problems": ran.problems}


def silent_loads(folder: Path, count: int) -> int:
    """How many of so many damaged copies of a real checkpoint are read without an error."""
    intact = [one.path for one in Store(folder).listed() if one.manifest is not None]
    silent = 0
    for number in range(count):
        chosen = random.Random(number)
        with tempfile.TemporaryDirectory() as place:
            for path in intact:
                shutil.copytree(path, Path(place) / path.name)
            DAMAGES[number % len(DAMAGES)](Path(place) / intact[0].name, chosen)
            try:
                verify_checkpoint(Path(place) / intact[0].name)
                silent += 1
            except CheckpointError:
                pass
    return silent


if __name__ == "__main__":
    sys.exit(main())
