"""A job on its crew: workers join, load a plan, train, evaluate and save, and whoever keeps the others is found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hethub.checkpoints.store import Store
from hethub.cost.graph import CostGraph
from hethub.data.token_file import TokenFile
from hethub.errors import RunError
from hethub.files import whole_file
from hethub.interruption import patient, seconds_left, terminated
from hethub.launch.beacon import Beacon
from hethub.launch.compiled import Compiled
from hethub.launch.crew import Crew
from hethub.launch.drift import Moved
from hethub.launch.history import HistorySettings
from hethub.launch.keeper import Keeper
from hethub.launch.lease import Lease
from hethub.launch.links import LinkTable
from hethub.launch.outcome import RunOutcome, median_step_seconds
from hethub.launch.progress import Progress
from hethub.launch.sockets import open_store
from hethub.launch.stall import StallWatch, where
from hethub.launch.step_watch import StepWatch
from hethub.launch.telemetry import Telemetry
from hethub.program.actions import Program
from hethub.program.faults import join_faults, plan_faults
from hethub.specs.job import Fault, Job
from hethub.timeline.record import Timeline
from hethub.timeline.summary import summarize

if TYPE_CHECKING:  # torch is loaded when workers are
    from hethub.launch.meter import MeterSettings
    from hethub.launch.worker import Task

__all__ = ["Attempt", "Session"]

REAL_MATH_SHARE = 0.04  # of the fastest device's padded time, which `time_scale: auto` aims at
_REHEARSAL_STEPS = 4
_PEER_TIMEOUT_SECONDS = 600.0  # of the transports; who is stuck is told long before
_JOIN_SECONDS = 8.0  # for all workers to meet once they have imported what they need, and for each of them
_JOIN_SECONDS_PER_WORKER = 0.1
_SILENT_SECONDS = 8.0  # a process that answers nothing for so long is stopped or hung
_PING_SECONDS = 1.0
_SILENT_WORDS = "; the process is stopped or hung. Continue or replace it, and run again"
_STUCK_WORDS = "; the process answers, the action does not end. Its log has the stacks of its threads"


@dataclass(slots=True)
class Attempt:
    """One attempt at the training that the job asks for.

    `keeper_from(step)` makes what takes its checkpoints, from its first step on; None: none are made. `begins(step)` is
    called when that step is known, `reached` is how many steps earlier attempts of this driver had done, and
    `passed(seconds)` is called when this one has done more. `moved(step, who)` is called when a device or link has
    drifted from its prediction, or is back.
    """

    history: HistorySettings
    store: Store
    faults: tuple[Fault, ...]
    keeper_from: Callable[[int], Keeper | None]
    begins: Callable[[int], None]
    passed: Callable[[float], None]
    evaluated: Callable[[int, float], None]
    moved: Callable[[int, Moved], None]
    goes_on: bool
    reached: int = 0
    done: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Session:
    """A job on its crew."""

    def __init__(
        self,
        job: Job,
        crew: Crew,
        folder: Path,
        tokens: TokenFile,
        lease: Lease,
        telemetry: Telemetry,
        say: Callable[[str], None],
    ) -> None:
        self.job = job
        self.crew = crew
        self.folder = folder
        self.tokens = tokens
        self.lease = lease
        self.telemetry = telemetry
        self.say = say
        self.emulated = job.cluster.emulated_time_scale is not None
        self.one_clock = self.emulated or job.ray_address is None
        self.start: dict[str, float] = {}  # seconds by part of the start
        self.steps: StepWatch | None = None  # of the attempt, until the records of all its steps are here
        self.beacon_file = folder / "beacon.bin"
        self.links_file = folder / "links.bin"
        self._watch_beacon()

    def _watch_beacon(self) -> None:
        count = len(self.job.cluster.devices())
        Beacon.create(self.beacon_file, count)
        self.beacon = Beacon(self.beacon_file, count)

    def clean(self) -> None:
        """Remove what only a running job needs; of an attempt that did not come to its end its last steps are kept,
        where they can be written."""
        if self.steps is not None:
            self.steps.write()
        self.beacon_file.unlink(missing_ok=True)
        self.links_file.unlink(missing_ok=True)

    @property
    def notice_seconds(self) -> float:
        """After SIGTERM, how long what is trained may take to be kept; 0 where the job keeps nothing on the way."""
        return 0.0 if self.job.checkpoint is None else self.job.checkpoint.notice_seconds

    def regroup(self, job: Job, compiled: Compiled, ended: Collection[str]) -> None:
        """Go on with a job that may have fewer devices, on those that `compiled` uses."""
        self.job = job
        self.crew.regroup(job.cluster, sorted(compiled.program.layout.used), ended)
        self._watch_beacon()

    def join(self, faults: Sequence[Fault]) -> None:
        """Start the one store and let every worker join it. Raises RunError naming those that do not."""
        from hethub.launch.worker import WorkerSetup

        on_join = join_faults(faults)
        rank_of = {device: rank for rank, device in enumerate(self.crew.devices)}
        host = self.crew.host()
        self.store = open_store(host)
        setups = {
            device: (
                WorkerSetup(
                    device=device,
                    rank_of=rank_of,
                    store_host=host,
                    store_port=self.store.port,
                    timeout_seconds=_PEER_TIMEOUT_SECONDS,
                    on_join=on_join.get(device),
                    lease=(self.lease.path, self.lease.token),
                ),
            )
            for device in self.crew.devices
        }
        self.crew.explain = lambda device: "join"
        self.crew.call("join", setups, watch=self._join_watch(rank_of))

    def _join_watch(self, rank_of: Mapping[int, int]) -> Callable[[Collection[int]], None]:
        from hethub.launch.worker import HERE

        limit = _JOIN_SECONDS + _JOIN_SECONDS_PER_WORKER * len(rank_of)
        begin = time.monotonic()

        def watch(pending: Collection[int]) -> None:
            if not pending or time.monotonic() - begin < limit:
                return
            absent = [d for d in pending if not self.store.check([HERE.format(rank_of[d])])]
            absent = absent or self.crew.silent(pending, _PING_SECONDS) or list(pending)
            names = self.job.cluster.devices()
            others = ", ".join(f"rank {rank_of[d]} ({names[d].name})" for d in absent[1:])
            raise self.crew.failed(
                absent[0],
                "join",
                f"did not join the other {len(rank_of) - len(absent)} workers within {limit:.1f} s"
                + (f", nor did {others}" if others else "")
                + ". Look into its log, and whether its host reaches "
                f"{self.crew.host()} (GLOO_SOCKET_IFNAME names the interface)",
            )

        return watch

    def _load_watch(self) -> Callable[[Collection[int]], None]:
        """Loading takes as long as the model is large, so only a process that answers nothing is given up."""
        next_look = time.monotonic() + _PING_SECONDS

        def watch(pending: Collection[int]) -> None:
            nonlocal next_look
            if not pending or time.monotonic() < next_look:
                return
            silent = self.crew.silent(pending, _PING_SECONDS)
            silent = self.crew.silent(silent, _SILENT_SECONDS - _PING_SECONDS) if silent else []
            if silent:
                raise self.crew.failed(
                    silent[0],
                    "load",
                    f"the process has answered nothing for {_SILENT_SECONDS:.0f} s{_SILENT_WORDS}",
                )
            next_look = time.monotonic() + _PING_SECONDS

        return watch

    def _stall_watch(
        self, program: Program, seconds: Callable[[int, int], float], scale: float
    ) -> Callable[[Collection[int]], None]:
        """Ends the attempt when a device keeps the others for far longer than predicted, the run when another driver
        has taken it over."""
        self.beacon.clear()
        watcher = StallWatch(program, self.beacon, lambda d, a: seconds(d, a) * scale, emulated=self.emulated)
        self.crew.explain = lambda device: where(program, device, self.beacon.get(device))

        def watch(pending: Collection[int]) -> None:
            if not self.lease.held():
                raise RunError(f"{self.folder}: another driver has taken the run over. This one ends.")
            stall = watcher.look(pending)
            if stall is None:
                return
            self.crew.save_stacks()
            silent = self.crew.silent(stall.members or (stall.device,), _PING_SECONDS)
            device = silent[0] if silent else stall.device
            names = self.job.cluster.devices()
            waiting = ", ".join(names[d].name for d in stall.waiting if d != device) or "nobody"
            raise self.crew.failed(
                device,
                self.crew.explain(device),
                f"no progress for {stall.seconds:.1f} s where {stall.predicted_seconds:.3g} s are predicted "
                f"(waiting: {waiting})" + (_SILENT_WORDS if silent else _STUCK_WORDS),
            )

        return watch

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(
        self,
        compiled: Compiled,
        total_steps: int,
        attempt: Attempt | None = None,
        meter: MeterSettings | None = None,
    ) -> int:
        """Give every worker its part of a plan; returns the step that comes first.

        Without an `attempt` from the initial weights on. With one this is the training that the job asks for: it is
        recorded, the job's faults are done in it, and it goes on from the newest intact checkpoint where there is one.
        """
        if self.emulated:
            LinkTable.create(self.links_file, CostGraph(self.job.cluster).cell_count)
        task = self._task(compiled, total_steps, attempt, meter)
        self.crew.explain = lambda device: "load"
        first = 0
        if attempt is not None and attempt.goes_on:
            task, first = self._fetched(task, attempt)
        self.crew.call("load", (task,), watch=self._load_watch())
        return first

    def _task(
        self, compiled: Compiled, total_steps: int, attempt: Attempt | None, meter: MeterSettings | None
    ) -> Task:
        from hethub.launch.saving import CheckpointSettings
        from hethub.launch.worker import Task

        job = self.job
        checkpoint = None
        if attempt is not None and job.checkpoint is not None:
            checkpoint = CheckpointSettings(
                folder=attempt.store.folder, attempt=attempt.history.attempt, every=job.checkpoint.every
            )
        return Task(
            graph=compiled.graph,
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
            history=None if attempt is None else attempt.history,
            peak_bytes=compiled.peak_bytes,
            faults=() if attempt is None else plan_faults(attempt.faults, compiled.program, compiled.seconds),
            checkpoint=checkpoint,
            initial_weights=job.initial_weights,
            skips=job.on_failure.not_a_number == "skip",
            meter=meter,
        )

    def _fetched(self, task: Task, attempt: Attempt) -> tuple[Task, int]:
        """The task with the newest checkpoint whose every byte is right, which all devices have read by then; damaged
        ones are told and set aside. Without any the training begins anew."""
        for one in attempt.store.listed():
            problem = one.problem
            if one.manifest is not None:
                found = self.crew.call("fetch", (replace(task, restore=one.path),), watch=self._load_watch())
                problem = next((answer.problem for answer in found.values() if answer.problem), "")
                if not problem:
                    self.say(f"going on from {one.path.name}")
                    attempt.seconds["read_bytes"] = float(sum(answer.bytes_read for answer in found.values()))
                    attempt.seconds["needed_bytes"] = float(
                        sum(answer.bytes_needed for answer in found.values())
                    )
                    return replace(task, restore=one.path), one.manifest.step
            aside = attempt.store.set_aside(one.path)
            self.say(f"warning: {problem} It is set aside as {aside.name}; an older checkpoint is used.")
        self.say("no checkpoint to go on from: training begins anew")
        return task, 0

    # -- training ----------------------------------------------------------------------------------------------------

    def time_scale(self, plans: Sequence[Compiled]) -> float:
        """Wall seconds per modelled second: 1 on real devices; where it is `auto`, the smallest at which every device's
        real math is at most REAL_MATH_SHARE of its time under each of the plans."""
        wanted = self.job.cluster.emulated_time_scale
        if wanted is None:
            return 1.0
        if wanted != "auto":
            return float(wanted)
        scale = 0.0
        for compiled in reversed(plans):
            self.load(compiled, 1)
            # One group at a time: in the run, too, most of the others wait for their deadlines.
            for group in sorted(set(compiled.program.groups.values())):
                for real, predicted in self.crew.call("time_stages", devices=group).values():
                    scale = max(scale, real / (REAL_MATH_SHARE * predicted))
        return self._rehearse(plans[0], scale)

    def _rehearse(self, compiled: Compiled, scale: float) -> float:
        """Raise the scale by what the real math of a step takes longer when all workers share this machine.

        The median of a few steps, so that a passing load of something else does not slow the whole run.
        """
        self.crew.call("start_clock", (time.monotonic(), scale))
        watch = self._stall_watch(compiled.program, compiled.seconds, scale)
        self.crew.call("train", (0, _REHEARSAL_STEPS), watch=watch)
        timeline = self._timeline(compiled, scale)
        shares = [max(d.real_ratio for d in summarize(timeline, n, n)) for n in range(1, _REHEARSAL_STEPS)]
        return scale * max(1.0, statistics.median(shares) / REAL_MATH_SHARE)

    def train(
        self,
        compiled: Compiled,
        steps: int,
        scale: float,
        title: str,
        attempt: Attempt | None = None,
    ) -> RunOutcome:
        """Train `steps` steps of the job's, evaluating as the job says in an `attempt` at the training it asks for.

        Evaluation stands outside the timeline: the clock goes on where the last training step ended.
        """
        job = self.job
        begin = time.monotonic()
        meter = None
        if attempt is not None:
            meter = self.telemetry.begin(compiled, scale, attempt.history.attempt, job)
        first_step = self.load(compiled, job.steps, attempt, meter)
        self.start.setdefault("load_seconds", time.monotonic() - begin)
        keeper = None
        if attempt is not None:
            attempt.seconds["load_seconds"] = time.monotonic() - begin
            attempt.done = first_step
            attempt.begins(first_step)
            keeper = attempt.keeper_from(first_step)
            self.steps = StepWatch(compiled, scale, self.folder, self.say, links=self.one_clock)
        workload = compiled.plan.workload
        tokens = workload.global_batch * workload.sequence_length
        progress = Progress(title, steps, tokens, compiled.predicted_step_seconds, scale, self.emulated)
        segments = _Segments(self, compiled, scale, progress, attempt, keeper)
        held_out: list[tuple[int, float]] = []
        with patient(0.0 if keeper is None else self.notice_seconds):
            for first, last in _segments(first_step, steps, job.evaluate_every if attempt is not None else 0):
                segments.train(first, last)
                if segments.stopped:
                    break
                if terminated() and last < steps:
                    continue  # the checkpoint after the next step comes first
                if job.evaluate_rows and attempt is not None:
                    self.telemetry.evaluating()
                    held_out.append((last, self._evaluate(compiled, scale)))
                    attempt.evaluated(*held_out[-1])
                    self.telemetry.evaluated(held_out[-1][1])
            if keeper is not None:
                keeper.take(self.crew.call("all_saved"))
                self.telemetry.saved(keeper.counts, keeper.made_step)
            timeline = self._timeline(compiled, scale)
            self.steps = None
            return RunOutcome(
                tuple(loss for _, loss, _ in segments.reports),
                tuple(norm for _, _, norm in segments.reports),
                timeline,
                tuple(held_out),
                median_step_seconds(timeline, held_out),
                self.crew.call("peak_bytes"),
                segments.stopped,
            )

    def _evaluate(self, compiled: Compiled, scale: float) -> float:
        stall = self._stall_watch(compiled.evaluation, compiled.longest_seconds, scale)
        means = self.crew.call("evaluate", (self.job.evaluate_rows,), watch=stall)
        return float(means[compiled.program.layout.used[0]])

    def _timeline(self, compiled: Compiled, scale: float) -> Timeline:
        parts = self.crew.call("records")
        return compiled.measured(np.concatenate([parts[device] for device in sorted(parts)]), scale)

    def save_weights(self, compiled: Compiled, path: Path) -> None:
        """Write the whole model, Hugging Face names, as one safetensors file."""
        from safetensors.numpy import save_file

        from hethub.launch.worker import assemble

        owned = self.crew.call("owned_weights")
        whole = assemble(compiled.program, [owned[device] for device in sorted(owned)])
        with whole_file(path) as temporary:
            save_file(whole, str(temporary), metadata={"format": "pt"})


class _Segments:
    """The training between evaluations: the clock goes on from one to the next."""

    def __init__(
        self,
        session: Session,
        compiled: Compiled,
        scale: float,
        progress: Progress,
        attempt: Attempt | None,
        keeper: Keeper | None,
    ) -> None:
        self._session, self._compiled, self._scale = session, compiled, scale
        self._progress, self._attempt, self._keeper = progress, attempt, keeper
        self._root = compiled.program.layout.used[0]
        self._modelled = 0.0
        self._begin = time.monotonic()
        self._stop_asked = False
        self.reports: list[tuple[int, float, float]] = []
        self.stopped = False

    def train(self, first: int, last: int) -> None:
        """Steps [first, last); fewer where SIGTERM came, then `stopped` is set. Raises RunError."""
        session, crew = self._session, self._session.crew
        if session.emulated:
            LinkTable.clear(session.links_file)
        stall = session._stall_watch(self._compiled.program, self._compiled.seconds, self._scale)
        crew.call("start_clock", (time.monotonic() - self._modelled * self._scale, self._scale))
        self._progress.start()
        before = len(self.reports)

        def watch(pending: Collection[int]) -> None:
            self._look(before, _PING_SECONDS / 2)
            self._end_in_good_time()
            stall(pending)

        ends = crew.call("train", (first, last), watch=watch)
        self._look(before, _SILENT_SECONDS)
        self._modelled = float(max(ends.values()))
        self.stopped = self._stopped_early()

    def _look(self, before: int, timeout_seconds: float) -> None:
        """Hear what the root has done since the last look, and what has been saved."""
        session = self._session
        fresh = session.crew.results(self._root, len(self.reports) - before, timeout_seconds)
        self.reports.extend(fresh)
        self._progress.update(fresh)
        seconds = time.monotonic() - self._begin
        if self.reports:
            session.start.setdefault("first_step_seconds", seconds)
        attempt = self._attempt
        if attempt is not None and fresh:
            attempt.seconds.setdefault("first_step_seconds", seconds)
            attempt.done = fresh[-1][0] + 1
            if attempt.done > attempt.reached:
                attempt.passed(seconds)
            session.telemetry.steps(fresh)
        session.telemetry.tick()
        if self._keeper is not None and attempt is not None and self._keeper.expects(attempt.done):
            used = self._compiled.program.layout.used
            self._keeper.take(session.crew.ask("saved", used, _PING_SECONDS))
            session.telemetry.saved(self._keeper.counts, self._keeper.made_step)
        if attempt is not None and session.steps is not None and fresh:
            step, moved = session.steps.look(
                len(self.reports), lambda used: session.crew.ask("recent_records", used, _PING_SECONDS)
            )
            for who in moved:
                session.say(f"step {step}: {who.words}")
                attempt.moved(step, who)

    def _end_in_good_time(self) -> None:
        """After SIGTERM: a checkpoint at the next step where what is left of the notice suffices, else the end at once.
        Without a keeper there is no patience: the signal has ended the run by itself."""
        if self._keeper is None or self._stop_asked or not terminated():
            return
        if 2 * self._step_seconds() + (self._keeper.last_seconds or 0.0) > seconds_left():
            raise KeyboardInterrupt
        self._stop_asked = True
        self._session.crew.ask("stop", [self._root], _PING_SECONDS)

    def _stopped_early(self) -> bool:
        """Whether all have stopped after the step that the root chose. After the very last step there is nothing to go
        on with, so that is no stop."""
        from hethub.launch.worker import STOP

        store = self._session.store
        return self._stop_asked and store.check([STOP]) and int(store.get(STOP)) + 1 < self._session.job.steps

    def _step_seconds(self) -> float:
        """Wall seconds of a step: as predicted, or as they were."""
        predicted = self._compiled.predicted_step_seconds * self._scale
        return max(predicted, (time.monotonic() - self._begin) / len(self.reports) if self.reports else 0.0)


def _segments(first: int, steps: int, every: int) -> list[tuple[int, int]]:
    """[first, last) ranges between evaluations, which come after each `every` steps and after the last; 0 means none in
    between."""
    edges = [*range(first - first % every + every, steps, every)] if every else []
    edges = [first, *edges, steps]
    return list(pairwise(edges)) if first < steps else []
