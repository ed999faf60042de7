"""The driver: from a job to a finished run folder. Policies and the simulator decide; only this module acts."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hethub import __version__
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.data.batches import Batches
from hethub.data.token_file import TokenFile, open_token_file, token_file_for
from hethub.data.tokenizers import load_tokenizer
from hethub.data.unigram import unigram_loss
from hethub.errors import InputError
from hethub.launch.beacon import Beacon
from hethub.launch.crew import Crew
from hethub.launch.links import LinkTable
from hethub.launch.progress import Progress
from hethub.launch.run_folder import RunFolder, write_json
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.program.prove import prove
from hethub.simulate.engine import simulate
from hethub.specs.job import Job
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan, save_plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import DeviceSummary, step_seconds, summarize

__all__ = ["RunOutcome", "launch"]

REAL_MATH_SHARE = 0.04  # of the fastest device's padded time, which `time_scale: auto` aims at
_WARM_STEPS = 3  # not counted in the median step
_JOIN_TIMEOUT_SECONDS = 600.0  # how long a silent peer is waited for inside a step


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A plan, its programs, and what the simulator says of it."""

    plan: Plan
    program: Program
    evaluation: Program
    predicted: Timeline
    predicted_step_seconds: float


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One plan's run: per step loss and norm, its timeline, and the held-out loss (None without held-out rows)."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    timeline: Timeline
    held_out: tuple[tuple[int, float], ...]
    step_seconds: float
    wall_seconds: float


def _compile(plan: Plan) -> _Compiled:
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    layout = lay_out(plan)
    program = compile_program(layout, compute)
    prove(program)
    evaluation = compile_program(layout, compute, ownership=program.ownership, training=False)
    prove(evaluation)
    simulation = simulate(program, compute)
    assert simulation.timeline is not None
    return _Compiled(plan, program, evaluation, simulation.timeline, simulation.step_seconds)


def check_data(job: Job) -> None:
    """Refuse data that no run could use, before anything is written. Raises InputError."""
    for path in job.data_files:
        if not path.is_file():
            raise InputError(f"{path}: no such data file. Mend `data.files` of the job.")
        if path.suffix == ".tokens":
            open_token_file(path)


def _tokens(job: Job, folder: Path) -> TokenFile:
    """The job's tokens: a token file as given, or one built from its text files."""
    files = job.data_files
    if len(files) == 1 and files[0].suffix == ".tokens":
        return open_token_file(files[0])
    return token_file_for(files, load_tokenizer(job.tokenizer), folder)


class _Run:
    """A job on its crew: loads plans, trains, evaluates, gathers."""

    def __init__(self, job: Job, crew: Crew, folder: Path, tokens: TokenFile) -> None:
        self.job = job
        self.crew = crew
        self.folder = folder
        self.tokens = tokens
        self.emulated = job.cluster.emulated_time_scale is not None
        self.beacon_file = folder / "beacon.bin"
        self.links_file = folder / "links.bin"
        Beacon.create(self.beacon_file, len(job.cluster.devices()))

    def clean(self) -> None:
        """Remove what only a running job needs."""
        self.beacon_file.unlink(missing_ok=True)
        self.links_file.unlink(missing_ok=True)

    def join(self) -> None:
        """Start the one store and let every worker join it."""
        import torch.distributed as dist

        from hethub.launch.worker import WorkerSetup

        rank_of = {device: rank for rank, device in enumerate(self.crew.devices)}
        host = self.crew.host()
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        setups = {
            device: (
                "join",
                WorkerSetup(
                    device=device,
                    rank_of=rank_of,
                    store_host=host,
                    store_port=self.store.port,
                    timeout_seconds=_JOIN_TIMEOUT_SECONDS,
                ),
            )
            for device in self.crew.devices
        }
        self.crew.call("join", {device: setup[1:] for device, setup in setups.items()})

    def load(self, compiled: _Compiled, total_steps: int) -> None:
        """Give every worker its part of a plan, from the initial weights on."""
        from hethub.launch.worker import Task

        job = self.job
        if self.emulated:
            LinkTable.create(self.links_file, CostGraph(job.cluster).cell_count)
        task = Task(
            cluster=job.cluster,
            workload=compiled.plan.workload,
            program=compiled.program,
            evaluation=compiled.evaluation,
            settings=job.optimizer,
            seed=job.seed,
            total_steps=total_steps,
            tokens_file=self.tokens.path,
            held_out=job.held_out,
            links_file=self.links_file if self.emulated else None,
            beacon_file=self.beacon_file,
        )
        beacon = Beacon(self.beacon_file, len(job.cluster.devices()))
        self.crew.explain = lambda device: _where(compiled.program, beacon, device)
        self.crew.call("load", (task,))

    def measure_scale(self, compiled: _Compiled) -> float:
        """The smallest time scale at which every device's real math is at most REAL_MATH_SHARE of its time."""
        self.load(compiled, 1)
        times = self.crew.call("time_stages").values()
        return max(real / (REAL_MATH_SHARE * predicted) for real, predicted in times if predicted > 0)

    def train(self, compiled: _Compiled, steps: int, total_steps: int, scale: float, title: str) -> RunOutcome:
        """Train `steps` steps of a run of `total_steps`, evaluating as the job says."""
        self.load(compiled, total_steps)
        job, workload = self.job, compiled.plan.workload
        root = compiled.program.layout.used[0]
        progress = Progress(
            title,
            steps,
            workload.global_batch * workload.sequence_length,
            compiled.predicted_step_seconds,
            scale,
            self.emulated,
        )
        epoch = time.monotonic()
        self.crew.call("start_clock", (epoch, scale))
        reports: list[tuple[int, float, float]] = []
        held_out: list[tuple[int, float]] = []
        wall = 0.0
        for first, last in _segments(steps, job.evaluate_every if steps == total_steps else 0):
            seen = len(reports)
            progress.start()
            begin = time.monotonic()

            def watch(seen: int = seen) -> None:
                fresh = self.crew.results(root, len(reports) - seen)
                reports.extend(fresh)
                progress.update(fresh)

            self.crew.call("train", (first, last), watch=watch)
            wall += time.monotonic() - begin
            watch()
            if job.evaluate_rows and steps == total_steps:
                held_out.append((last, float(self.crew.call("evaluate", (job.evaluate_rows,))[root])))
        timeline = self._timeline(compiled, scale)
        return RunOutcome(
            tuple(loss for _, loss, _ in reports),
            tuple(norm for _, _, norm in reports),
            timeline,
            tuple(held_out),
            median_step_seconds(timeline, held_out, steps),
            wall,
        )

    def _timeline(self, compiled: _Compiled, scale: float) -> Timeline:
        parts = self.crew.call("records")
        info = replace(compiled.predicted.info, origin="measured", time_scale=scale)
        return Timeline(info, np.concatenate([parts[device] for device in sorted(parts)]))

    def save_weights(self, compiled: _Compiled, path: Path) -> None:
        """Write the whole model, Hugging Face names, as one safetensors file."""
        from safetensors.numpy import save_file

        from hethub.launch.worker import assemble

        owned = self.crew.call("owned_weights")
        whole = assemble(compiled.program, [owned[device] for device in sorted(owned)])
        temporary = path.with_name(path.name + ".tmp")
        save_file(whole, str(temporary), metadata={"format": "pt"})
        temporary.rename(path)


def _where(program: Program, beacon: Beacon, device: int) -> str:
    step, action = beacon.get(device)
    if step < 0:
        return "before its first action"
    return f"step {step}, {program.describe(device, action)}"


def _segments(steps: int, every: int) -> list[tuple[int, int]]:
    """[first, last) ranges between evaluations; 0 means none in between."""
    stride = every or steps
    return [(first, min(first + stride, steps)) for first in range(0, steps, stride)]


def median_step_seconds(timeline: Timeline, held_out: Sequence[tuple[int, float]], steps: int) -> float:
    """Median over the steps after the third, leaving out those that begin with an evaluation before them."""
    seconds = step_seconds(timeline)
    after_evaluation = {step for step, _ in held_out}
    counted = [s for i, s in enumerate(seconds) if i >= min(_WARM_STEPS, steps - 1) and i not in after_evaluation]
    return statistics.median(counted)
