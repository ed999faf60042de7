"""What a training takes when faults come: its attempts played through, each up to the fault that ends it.

The policy's decisions are made by the very function that the driver asks, times are a `Course`'s, and the new plan is
the planner's that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hethub.checkpoints.restarts import Cause, decide, told_cause
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.program.faults import PlannedFault, faults_left
from hethub.simulate.course import Course, RecoverySeconds
from hethub.specs.cluster import Cluster
from hethub.specs.job import JOIN, CheckpointPolicy, FailurePolicy, Fault
from hethub.specs.plan import Plan

__all__ = ["Forecast", "Outage", "forecast"]

_CAUSES = {"oom": Cause.MEMORY, "hang": Cause.STALL, "stop": Cause.STALL, "nan": Cause.NOT_A_NUMBER}
_DEATHS = ("kill", "exit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """One failure, of `device` in its step `step`; the run goes on from `from_step` without the devices
    `lost`, with steps of `step_seconds`. `again_seconds` of work are done again."""

    step: int
    device: str
    cause: str
    from_step: int
    lost: tuple[str, ...]
    again_seconds: float
    detect_seconds: float
    plan_seconds: float
    regroup_seconds: float
    load_seconds: float
    step_seconds: float

    @property
    def between_seconds(self) -> float:
        """From the failure to the beginning of the next attempt's first step."""
        return self.detect_seconds + self.plan_seconds + self.regroup_seconds + self.load_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A training with faults, wall seconds from its first step's beginning to its last step's end.

    `steps` are done at the end; `step_seconds` is a step that nothing happens to, under the first plan;
    `stall_seconds` is how long all checkpoints keep training. `ended` says why the run does not come to its last step.
    """

    steps: int
    wall_seconds: float
    step_seconds: float
    stall_seconds: float
    outages: tuple[Outage, ...]
    ended: str

    @property
    def goodput_ratio(self) -> float:
        """Steps done, each at its fault-free time, over the time that they took."""
        return self.steps * self.step_seconds / self.wall_seconds


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ends an attempt: the first fault, and the devices and faults that go with it before it is known."""

    first: PlannedFault
    at_seconds: float
    detect_seconds: float
    cause: Cause
    over: frozenset[int]  # places in Course.faults
    dead: frozenset[str]


def forecast(
    plan: Plan,
    faults: Sequence[Fault],
    *,
    steps: int,
    checkpoint: CheckpointPolicy | None,
    policy: FailurePolicy,
    replan: Callable[[Cluster], Plan],
    scale: float = 1.0,
    measured: Measured = NOT_MEASURED,
    recovery: RecoverySeconds | None = None,
) -> Forecast:
    """Play `steps` steps of a training through, with its faults.

    `scale` is wall seconds per modelled second, `replan` plans for a cluster that has lost devices. Evaluation is left
    out, and so are faults at joining, which come before the first step. Raises InputError, at its line of the job file,
    for a fault that the plan has no place for, and whatever `replan` raises.
    """
    skips = policy.not_a_number == "skip"  # such a step takes as long as another
    left = tuple(fault for fault in faults if fault.action != JOIN and not (skips and fault.do == "nan"))
    every = checkpoint.every if checkpoint else 0
    course = Course(plan, measured, scale, left, every, recovery or RecoverySeconds())
    return _Replay(course, steps, policy, replan).play()


class _Replay:
    """Attempt after attempt, each under the course that the one before has left."""

    def __init__(
        self, course: Course, steps: int, policy: FailurePolicy, replan: Callable[[Cluster], Plan]
    ) -> None:
        self._course, self._steps, self._policy, self._replan = course, steps, policy, replan
        self._step_seconds = course.step_seconds
        self._first = 0  # step that the attempt begins with
        self._wall = self._stalls = 0.0
        self._restarts_at: list[float] = []
        self._outages: list[Outage] = []

    def play(self) -> Forecast:
        while True:
            failure = _next_failure(self._course, self._first)
            end = self._course.begin(self._first, self._steps)
            if failure is None or failure.at_seconds >= end:
                self._stall_until(self._steps)
                return self._forecast(self._steps, self._wall + end)
            done = self._course.step_at(self._first, failure.at_seconds)
            self._stall_until(done)
            ended = self._fail(failure)
            if ended:
                return self._forecast(done, self._wall, ended)

    def _stall_until(self, step: int) -> None:
        self._stalls += self._course.saved(self._first, step) * self._course.stall_seconds

    def _forecast(self, steps: int, wall_seconds: float, ended: str = "") -> Forecast:
        return Forecast(
            steps=steps,
            wall_seconds=wall_seconds,
            step_seconds=self._step_seconds,
            stall_seconds=self._stalls,
            outages=tuple(self._outages),
            ended=ended,
        )

    def _fail(self, failure: _Failure) -> str:
        """Go past a failure, to the next attempt's first step; returns why there is none, if so."""
        before, first, at = self._course, self._first, failure.at_seconds
        name = before.names[failure.first.device]
        self._wall += at + failure.detect_seconds
        decision = decide(failure.cause, self._policy, self._restarts_at, self._wall)
        lost = tuple(sorted({name, *failure.dead})) if decision.without_the_lost else ()
        self._first = before.newest_checkpoint(first, at)
        again = at - before.begin(first, self._first)
        if decision.restart:
            self._resume(lost, [fault for n, (fault, _) in enumerate(before.faults) if n not in failure.over])
        recovery = before.recovery
        outage = Outage(
            step=failure.first.step,
            device=name,
            cause=failure.cause.value,
            from_step=self._first,
            lost=lost,
            again_seconds=again,
            detect_seconds=failure.detect_seconds,
            plan_seconds=recovery.plan_seconds if lost else 0.0,
            regroup_seconds=recovery.regroup_seconds,
            load_seconds=self._course.load_seconds,
            step_seconds=self._course.step_seconds,
        )
        self._outages.append(outage)
        self._restarts_at.append(self._wall)
        if not decision.restart:
            return decision.why
        self._wall += outage.between_seconds - outage.detect_seconds
        return ""

    def _resume(self, lost: Sequence[str], faults: Sequence[Fault]) -> None:
        """The next attempt's course, with the faults that it has a place for."""
        before = self._course.plan.cluster
        if not lost:
            self._course.resume(faults)
            return
        plan = self._replan(replace(before, exclude=before.exclude | set(lost)))
        self._course = course = self._course.of(plan)
        course.resume(faults_left(faults, before, plan.cluster, course.program, course.predicted_seconds))


def _next_failure(course: Course, first: int) -> _Failure | None:
    """What ends an attempt that begins with step `first`; None where nothing does."""
    coming = [
        (course.at(first, planned), number, planned)
        for number, (_, planned) in enumerate(course.faults)
        if planned.action >= 0 and planned.do != "slow"
    ]
    at, _, fault = min(coming, default=(math.inf, 0, None))
    if fault is None or at == math.inf:
        return None
    cause = _CAUSES.get(fault.do, Cause.WORKER)
    detect = course.recovery.detect_seconds
    if cause == Cause.STALL:
        detect += course.stall_limit_seconds(fault)
        detect += course.recovery.silence_seconds if fault.do == "stop" else 0.0
    together = [(number, other) for seconds, number, other in coming if seconds <= at + detect]
    dead = frozenset(course.names[other.device] for _, other in together if other.do in _DEATHS)
    used = (course.names[device] for device in course.program.layout.used)
    cause = told_cause(cause, course.names[fault.device], used, dead)
    return _Failure(fault, at, detect, cause, frozenset(number for number, _ in together), dead)
