"""The driver's part of telemetry: says what there is to count, serves the run's metrics, tells Prometheus where."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hethub.cost.shapes import model_flops_per_token
from hethub.errors import MachineError
from hethub.launch.compiled import Compiled
from hethub.launch.meter import MeterSettings, ready_to_count
from hethub.specs.job import Job
from hethub.telemetry.counters import FIELDS, CountersFile
from hethub.telemetry.describe import counters_file
from hethub.telemetry.folder import (
    AGENTS,
    MOMENTS,
    TARGETS,
    TELEMETRY,
    address,
    agent_addresses,
    agent_complaints,
    write_targets,
)
from hethub.telemetry.metrics import STEP_BUCKETS_SECONDS
from hethub.timeline.record import Kind
from hethub.timeline.summary import DeviceSummary, summarize

if TYPE_CHECKING:
    from hethub.launch.keeper import SaveCounts
    from hethub.telemetry.run import PlanFacts, RunMetrics, StageFacts

__all__ = ["Telemetry"]

_STEPS = FIELDS.index("steps")
_STEP_SECONDS = FIELDS.index("step_seconds")
_FIRST_BUCKET = FIELDS.index(f"step_bucket.{STEP_BUCKETS_SECONDS[0]}")
_SHARES = ("busy", "recompute", "exposed_communication", "bubble", "idle", "unaccounted")


class Telemetry:
    """What a driver does for telemetry as its run goes on; nothing where the job turns it off.

    Use as a context manager: leaving it takes the targets back, when the hosts' agents have ended, and leaves the
    counters.
    """

    def __init__(self, job: Job, folder: Path, say: Callable[[str], None]) -> None:
        """`folder` is the run folder; the attribute is its telemetry folder. `say` takes lines for a person.

        Entering it raises MachineError where the job's address cannot be listened on.
        """
        self._listen = job.telemetry_listen
        self._run = job.output.name
        self.folder = folder / TELEMETRY
        self._target_files = [self.folder / TARGETS, folder.parent / ".targets" / f"{self._run}.json"]
        self._job, self._say = job, say
        self._complained: Mapping[str, str] = {}
        self._metrics: RunMetrics | None = None
        self._server: Any = None
        self._told: dict[Path, Mapping[str, str]] = {}  # targets file -> what stands in it
        self._warned: set[Path] = set()  # of targets files that could not be written
        self._root: CountersFile | None = None
        self._counted: list[float] = []  # by the root, when it was read last
        self._times = [0.0] * (2 + len(STEP_BUCKETS_SECONDS) + 1)  # steps, their seconds, and by bucket
        self._saves = (0, 0)

    def __enter__(self) -> Telemetry:
        if self._listen is None:
            return self
        from prometheus_client import start_http_server

        from hethub.telemetry.families import registry_of
        from hethub.telemetry.run import RunMetrics

        shutil.rmtree(self.folder, ignore_errors=True)  # an earlier driver's counters
        (self.folder / AGENTS).mkdir(parents=True, exist_ok=True)
        policy = self._job.checkpoint
        self._metrics = RunMetrics(
            self._run,
            run_id=uuid.uuid4().hex,
            steps=self._job.steps,
            checkpoint_every=None if policy is None else policy.every,
        )
        try:
            self._server, _ = start_http_server(
                0, addr=self._listen, registry=registry_of(self._metrics.families)
            )
        except OSError as error:
            raise MachineError(
                f"{self._job.path}: telemetry.listen: cannot listen on {self._listen} ({error.strerror}). "
                "Give an address of this machine."
            ) from error
        self.tick()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if self._root is not None:
            self._root.close()
        for file in (*self._target_files, self.folder / MOMENTS):
            with contextlib.suppress(OSError):  # where it could not be written either
                file.unlink()
        shutil.rmtree(self.folder / AGENTS, ignore_errors=True)  # what devices counted stays, for reports
        for parent in (self.folder, self._target_files[-1].parent):
            with contextlib.suppress(OSError):  # another run is told of there, or devices have counted
                parent.rmdir()

    def tick(self) -> None:
        """Tell Prometheus who serves now, and a person which agent does not."""
        if self._server is None or self._listen is None:
            return
        complaints = agent_complaints(self.folder)
        for name, words in complaints.items():
            if self._complained.get(name) != words:
                self._say(f"warning: agent {name}: {words}")
        self._complained = complaints
        found = {"driver": address(self._listen, self._server.server_port), **agent_addresses(self.folder)}
        for file in self._target_files:
            if found != self._told.get(file):
                self._write_targets(file, found)

    def _write_targets(self, file: Path, found: Mapping[str, str]) -> None:
        """Training goes on where that fails, and the next tick tries again."""
        try:
            write_targets(file, self._run, found)
        except OSError as error:
            if file not in self._warned:
                self._say(
                    f"warning: {file}: cannot be written ({error.strerror}), so Prometheus finds no run there. "
                    "Let its folder be writable and have room: it is tried again all the time."
                )
            self._warned.add(file)
        else:
            self._told[file] = found

    # -- what happens ------------------------------------------------------------------------------------------------

    def begin(self, compiled: Compiled, time_scale: float, attempt: int, job: Job) -> MeterSettings | None:
        """An attempt begins: what its workers count, and where."""
        if self._metrics is None:
            return None
        meter = ready_to_count(
            self.folder,
            compiled.program,
            compiled.graph,
            compiled.plan.workload,
            run=self._run,
            time_scale=time_scale,
            peak_bytes=compiled.peak_bytes,
            predicted_seconds=_predicted_transfers(compiled),
            one_clock=job.ray_address is None or job.cluster.emulated_time_scale is not None,
        )
        self._metrics.plan(_plan_facts(compiled, job), time_scale=time_scale, attempt=attempt)
        self._metrics.state("training")
        if self._root is not None:
            self._root.close()
        root = compiled.graph.devices[compiled.program.layout.used[0]]
        self._root = CountersFile(counters_file(self.folder, root))
        self._counted = self._root.read()
        return meter

    def steps(self, reports: Sequence[tuple[int, float, float]]) -> None:
        """Steps have ended: (step, loss, gradient norm) of each."""
        if self._metrics is None or self._root is None or not reports:
            return
        from hethub.launch.optimizer import learning_rate
        from hethub.telemetry.run import StepTimes

        counted = self._root.read()
        at = (_STEPS, _STEP_SECONDS, *range(_FIRST_BUCKET, _FIRST_BUCKET + len(STEP_BUCKETS_SECONDS) + 1))
        self._times = [
            total + counted[place] - self._counted[place]
            for total, place in zip(self._times, at, strict=True)
        ]
        self._counted = counted
        rate = learning_rate(self._job.optimizer, reports[-1][0], self._job.steps)
        self._metrics.steps(reports, rate, StepTimes(self._times[0], self._times[1], self._times[2:]))

    def evaluating(self) -> None:
        """Training pauses for an evaluation."""
        if self._metrics is not None:
            self._metrics.state("evaluating")

    def evaluated(self, loss: float) -> None:
        """Training goes on after an evaluation."""
        if self._metrics is not None:
            self._metrics.evaluated(loss)
            self._metrics.state("training")

    def saved(self, counts: SaveCounts, step: int) -> None:
        """Checkpoints may have been made or given up; the newest is of `step`."""
        if self._metrics is None:
            return
        made, failed = self._saves
        for seconds, stall in zip(counts.seconds[made:], counts.stall_seconds[made:], strict=True):
            self._metrics.checkpoint(step, seconds, stall)
        for _ in range(counts.failed - failed):
            self._metrics.checkpoint_failed()
        self._saves = (counts.made, counts.failed)

    def failed(self, cause: str, *, restarts: bool) -> None:
        """An attempt has failed."""
        if self._metrics is not None:
            self._metrics.failed(cause, restarts=restarts)

    def recovered(self, cause: str, seconds: float) -> None:
        """A step is done that no attempt before had done, so long after the last such one."""
        if self._metrics is not None:
            self._metrics.recovered(cause, seconds)

    def state(self, state: str) -> None:
        """The run is in another state."""
        if self._metrics is not None:
            self._metrics.state(state)


def _predicted_transfers(compiled: Compiled) -> dict[int, float]:
    """Predicted modelled seconds of messages from their sending to their arrival."""
    devices = compiled.program.devices
    return {
        devices[device][action].message: seconds
        for (device, action), seconds in compiled.action_seconds.items()
        if devices[device][action].kind == Kind.RECEIVE
    }


def _plan_facts(compiled: Compiled, job: Job) -> PlanFacts:
    from hethub.telemetry.run import PlanFacts

    workload, figures = compiled.plan.workload, compiled.figures
    used = [compiled.graph.devices[d].type for d in compiled.program.layout.used]
    peaks = [t.peak_flops_per_second.get(t.dtype_for(workload.precision)) for t in used]
    known = [peak for peak in peaks if peak is not None]
    return PlanFacts(
        digest=compiled.digest,
        model=workload.model.name,
        precision=workload.precision,
        objective=job.objective.best,
        cluster=compiled.plan.cluster.name,
        emulated=compiled.plan.cluster.emulated_time_scale is not None,
        devices=len(used),
        rows_per_step=workload.global_batch,
        tokens_per_step=workload.global_batch * workload.sequence_length,
        model_flops_per_token=model_flops_per_token(workload.model, workload.sequence_length),
        peak_flops_per_second=sum(known) if len(known) == len(peaks) else None,
        step_seconds=compiled.predicted_step_seconds,
        bounds={name: figures["bounds"][f"{name}_tokens_per_second"] for name in ("homogeneous", "physical")},
        joules_per_token=figures["joules_per_token"],
        usd_per_million_tokens=figures["usd_per_million_tokens"],
        stages=_stages(compiled, summarize(compiled.predicted, 0, 0)),
    )


def _stages(compiled: Compiled, summaries: Sequence[DeviceSummary]) -> list[StageFacts]:
    """The devices of each type in each stage of each pipeline."""
    from hethub.telemetry.run import StageFacts

    found = []
    for pipeline in compiled.program.layout.pipelines:
        for stage in pipeline.stages:
            by_type: dict[str, list[int]] = {}
            for device in stage.devices():
                by_type.setdefault(compiled.graph.devices[device].type.name, []).append(device)
            for name, members in by_type.items():
                shares = {
                    share: sum(getattr(summaries[d], f"{share}_ratio") for d in members) / len(members)
                    for share in _SHARES
                }
                found.append(
                    StageFacts(
                        pipeline=pipeline.index,
                        stage=stage.index,
                        device_type=name,
                        layers=f"{stage.layers[0]}-{stage.layers[1]}",
                        recompute=stage.recompute,
                        devices=len(members),
                        predicted=shares,
                        peak_bytes=max(compiled.peak_bytes[d] for d in members),
                    )
                )
    return found
