"""How long `hethub launch` takes from its own start to the end of the first training step, with eight emulated workers.

The time is taken outside: from the start of the command's process to its line about step 1. So nothing can be left out
of it: the interpreter, planning, Ray, torch's import, eight workers, their group, loading shards, the step itself.
The job runs once before, so that files are cached, then REPEATS times; the median counts. The run's own account, stage
by stage, stands in `raw` beside each time.

The cheapest cheats, and what makes them fail: fewer workers (WORKERS logs are wanted, and every device must have
trained); workers kept from run to run (each run has a temporary folder of its own for Ray, removed before the next); a
first step that does nothing (its loss must be near ln(vocabulary), and the modelled step no shorter than predicted).

    .venv/bin/python benchmarks/start.py
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import ROOT, print_figures, write_result
from hethub.timeline.record import Kind, Timeline
from hethub.timeline.summary import step_seconds

SPECS = Path(__file__).parent / "specs"
CLUSTER, MODEL = SPECS / "three-types.yaml", SPECS / "three-types-model" / "config.json"
WORKERS, STEPS, REPEATS = 8, 2, 3
ROWS = 8
JOB = """\
cluster: {cluster}
plan: auto
data: {{files: ["stdlib:a*.py"], tokenizer: bytes, held_out: 0.05}}
steps: {steps}
seed: 1
optimizer: {{learning_rate: 3e-3, warmup_steps: 1}}
workload: {{model: {model}, sequence_length: 16, global_batch: {rows}, precision: fp32, optimizer: adamw}}
output: run
"""


def main() -> int:
    """Launch, check, write the result file."""
    with tempfile.TemporaryDirectory(prefix="hh-") as folder:
        runs = [launch(Path(folder)) for _ in range(1 + REPEATS)][1:]
    seconds = [run["seconds"] for run in runs]
    figures = {"start_seconds": statistics.median(seconds)}
    for name in runs[0]["start"] or {}:
        figures[f"  {name}"] = statistics.median(run["start"][name] for run in runs)
    print_figures(figures)
    wrong = [text for run in runs for text in run.pop("problems")]
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong:
        kept = {"start_seconds": figures["start_seconds"]}
        print(f"wrote {write_result('start', kept, runs, emulated=True)}")
    return 1 if wrong else 0


def launch(folder: Path) -> dict[str, Any]:
    """One launch in a new subfolder: seconds to the end of the first step, the run's own account, what is wrong."""
    here = Path(tempfile.mkdtemp(dir=folder))
    job = here / "job.yaml"
    job.write_text(JOB.format(cluster=CLUSTER, model=MODEL, steps=STEPS, rows=ROWS))
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "hethub", "launch", str(job)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(here)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    told: list[str] = []
    seconds = math.nan
    for line in process.stderr:
        told.append(line)
        if math.isnan(seconds) and f"step 1/{STEPS}" in line:
            seconds = time.monotonic() - begin
    if process.wait() != 0 or math.isnan(seconds):
        raise SystemExit("".join(told) + "the launch failed")
    summary = json.loads((here / "run" / "summary.json").read_text())
    found = {"seconds": seconds, "start": summary.get("start"), "problems": problems(here / "run", summary)}
    shutil.rmtree(here)
    return found


def problems(run: Path, summary: dict[str, Any]) -> list[str]:
    """What makes a launch no launch of eight workers that trained."""
    found = []
    workers = sum(log.read_text().startswith("device index ") for log in (run / "logs").glob("*.log"))
    if workers != WORKERS:
        found.append(f"{workers} workers, not {WORKERS}")
    measured, predicted = (Timeline.load(run / f"{name}.npz") for name in ("measured", "predicted"))
    backward = np.isin(measured.records["kind"], [Kind.BACKWARD, Kind.BACKWARD_INPUT])
    trained = measured.records[backward]["device"]
    if len(np.unique(trained)) != WORKERS:
        found.append(f"{len(np.unique(trained))} devices ran a backward, not {WORKERS}")
    vocabulary = json.loads(MODEL.read_text())["vocab_size"]
    if abs(summary["loss_first"] / math.log(vocabulary) - 1) > 0.1:
        found.append(f"the first loss is {summary['loss_first']:.3f}, not near ln({vocabulary})")
    if step_seconds(measured)[0] < min(step_seconds(predicted)):
        found.append(f"the first step took {step_seconds(measured)[0]:.3f} s, less than predicted")
    return found


if __name__ == "__main__":
    sys.exit(main())
