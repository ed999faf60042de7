"""A warm pool of real worker processes (no Ray): importing torch costs seconds, so it is paid once."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from hethub.data.token_file import build_token_file
from hethub.data.tokenizers import ByteTokenizer
from hethub.launch.beacon import Beacon
from hethub.launch.history import HistorySettings
from hethub.launch.links import LinkTable
from hethub.launch.meter import ready_to_count
from hethub.launch.saving import CheckpointSettings
from hethub.launch.sockets import open_store
from hethub.launch.worker import Fetched, Task, WorkerSetup, assemble
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.program.faults import plan_faults
from hethub.program.memory import program_memory
from hethub.program.prove import prove
from hethub.specs.job import Fault, OptimizerSettings
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Timeline, TimelineInfo
from tests.launch.host_streams import PretendingWorker
from tests.plan_strategies import VOCABULARY, compute_model, joined

SETTINGS = OptimizerSettings(
    learning_rate=3e-3,
    warmup_steps=5,
    weight_decay=0.1,
    clip_norm=0.5,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    final_learning_rate_ratio=0.1,
)
_ANSWER_SECONDS = 120.0


@dataclass(frozen=True)
class Trained:
    """What a plan's training gave: per step loss and norm, whole final weights, every device's shards, the held-out
    loss, its timeline and the tally's peaks (None where nothing is emulated)."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    shards: list[dict[str, np.ndarray]]
    held_out: float
    timeline: Timeline
    peaks: list[int | None]
    program: Program
    task: Task


class PoolError(Exception):
    """A worker answered with an error; the text is its traceback."""


def _serve(device: int, count: int, port: int, connection: Connection) -> None:
    worker = PretendingWorker(
        WorkerSetup(
            device=device,
            rank_of={i: i for i in range(count)},
            store_host="127.0.0.1",
            store_port=port,
            timeout_seconds=_ANSWER_SECONDS,
        )
    )
    connection.send(None)
    while True:
        method, arguments = connection.recv()
        if method == "close":
            worker.close()
            return
        try:
            connection.send((True, getattr(worker, method)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Pool:
    """`size` processes that stand for devices 0 to size - 1 of any cluster; `active` of them take part."""

    def __init__(self, size: int) -> None:
        self.size = self.active = size
        self.fetched: list[Fetched] = []  # what each device read of the last checkpoint
        self.folder = Path(tempfile.mkdtemp(prefix="hethub-test-"))
        context = multiprocessing.get_context("spawn")
        self._store = open_store("127.0.0.1")
        self.connections: list[Connection] = []
        self.processes = []
        for device in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(device, size, self._store.port, theirs), daemon=True
            )
            process.start()
            self.connections.append(ours)
            self.processes.append(process)
        for connection in self.connections:
            connection.recv()
        source = self.folder / "text"
        source.write_bytes(np.random.default_rng(0).integers(0, VOCABULARY, 6000).astype(np.uint8).tobytes())
        self.tokens = build_token_file([source], ByteTokenizer(), self.folder / "text.tokens")

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker. Raises PoolError with the traceback of the first that fails."""
        left = dict(enumerate(self.connections[: self.active]))
        for connection in left.values():
            connection.send((method, arguments))
        answers: dict[int, Any] = {}
        while left:
            ready = wait(list(left.values()), timeout=_ANSWER_SECONDS)
            if not ready:
                raise PoolError(f"devices {sorted(left)} do not answer {method}")
            for device, connection in list(left.items()):
                if connection in ready:
                    fine, answers[device] = connection.recv()
                    del left[device]
                    if not fine:
                        raise PoolError(answers[device])
        return [answers[device] for device in range(self.active)]

    def close(self) -> None:
        """End the processes."""
        for connection in self.connections:
            connection.send(("close", ()))
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder)

    def train(
        self,
        plan: Plan,
        steps: int,
        *,
        total_steps: int | None = None,
        held_out_rows: int = 10,
        time_scale: float | None = None,
        seeds: Sequence[int] = (1,),
        faults: Sequence[Fault] = (),
        history: HistorySettings | None = None,
        read_in_place: bool = True,
        first: int = 0,
        checkpoint: CheckpointSettings | None = None,
        restore: Path | None = None,
        initial_weights: Path | None = None,
        skips: bool = False,
        accelerators: Collection[int] = (),
        telemetry: Path | None = None,
        islands: Mapping[int, int] | None = None,
    ) -> Trained:
        """Train a plan from the first step on all its devices; `time_scale` emulates them, `faults` are interruptions
        on purpose, whose predicted actions take a second. Parameters go by messages where devices are emulated or not
        `read_in_place`, inside `islands` by the library's collectives. The devices `accelerators` have streams of their
        own (see `HostStreams`). With `restore` training goes on from that checkpoint, whose step is `first`. Workers
        count in the folder `telemetry`.
        """
        compute = compute_model(plan)
        self.active = len(compute.graph.devices)
        program = compile_program(lay_out(plan), compute, islands=joined(islands))
        prove(program)
        evaluation = compile_program(lay_out(plan), compute, ownership=program.ownership, training=False)
        prove(evaluation)
        Beacon.create(self.folder / "beacon", len(compute.graph.devices))
        LinkTable.create(self.folder / "links", compute.graph.cell_count)
        task = Task(
            graph=compute.graph,
            workload=plan.workload,
            program=program,
            evaluation=evaluation,
            settings=SETTINGS,
            seed=seeds[0],
            total_steps=total_steps or steps,
            tokens_file=self.tokens.path,
            held_out=0.2,
            links_file=None if time_scale is None else self.folder / "links",
            beacon_file=self.folder / "beacon",
            faults=plan_faults(faults, program, lambda device, action: 1.0),
            history=history,
            read_in_place=read_in_place,
            checkpoint=checkpoint,
            restore=restore,
            initial_weights=initial_weights,
            skips=skips,
            peak_bytes={d: peak.total for d, peak in program_memory(program, compute).items()},
        )
        if telemetry is not None:
            meter = ready_to_count(
                telemetry,
                program,
                compute.graph,
                plan.workload,
                run="run",
                time_scale=time_scale or 1.0,
                peak_bytes=task.peak_bytes,
                one_clock=True,
            )
            task = replace(task, meter=meter)
        if restore is not None:
            self.fetched = self.call("fetch", task)
            problem = next((answer.problem for answer in self.fetched if answer.problem), "")
            if problem:
                raise PoolError(problem)
        self.call("pretend", frozenset(accelerators))
        self.call("load", task)
        self.call("start_clock", time.monotonic(), time_scale or 1.0)
        root = program.layout.used[0]
        results = self.call("train", first, steps)[root]
        records = [r for r in self.call("records") if len(r)]
        devices = compute.graph.devices
        info = TimelineInfo(
            origin="measured",
            devices=tuple(d.name for d in devices),
            device_types=tuple(d.type.name for d in devices),
            emulated=time_scale is not None,
            time_scale=time_scale or 1.0,
        )
        return Trained(
            losses=[r.loss for r in results],
            norms=[r.norm for r in results],
            held_out=self.call("evaluate", held_out_rows)[root] if held_out_rows else float("nan"),
            weights=assemble(program, self.call("owned_weights")),
            shards=self.call("held_weights"),
            timeline=Timeline(info, np.concatenate(records)),
            peaks=self.call("peak_bytes"),
            program=program,
            task=task,
        )
