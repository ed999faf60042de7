"""When things happen in an attempt at a training, and what the parts of a recovery take.

Times inside a step are the simulator's own. What lies between two attempts is not simulated: its parts are named in
`RecoverySeconds`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hethub.cost.graph import CostGraph
from hethub.cost.measured import Measured
from hethub.program.compile import compile_program
from hethub.program.faults import Phase, PlannedFault, plan_faults
from hethub.simulate.engine import seconds_by_action, simulate
from hethub.simulate.pace import at_pace
from hethub.simulate.what_if import with_links
from hethub.specs.job import Fault
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind

__all__ = ["STALL_LEAST_SECONDS", "Course", "RecoverySeconds", "stall_limit_seconds"]

STALL_LEAST_SECONDS = 5.0  # no shorter stay is a stall, however quick the action should be
_STALL_TIMES_PREDICTED = 5.0
_STALL_OUTSIDE_SECONDS = 60.0
_STATE_BYTES = 4  # of a number in a checkpoint, which has three of each element: master and two moments
_PLAYED_STEPS = 3
_FIRST, _STEADY = -1, 0  # numbers of the first and the middle step in a simulation of three


def stall_limit_seconds(predicted_seconds: float, *, outside: bool = False) -> float:
    """How long (wall) a device may stay in an action of `predicted_seconds` until it counts as stuck. `outside`: it is
    between steps, before its first action, or real and in its first step, in which kernels load."""
    least = _STALL_OUTSIDE_SECONDS if outside else STALL_LEAST_SECONDS
    return max(least, _STALL_TIMES_PREDICTED * predicted_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySeconds:
    """What the parts of a recovery take, wall seconds, and how fast a state is written and read, bytes a second.

    The defaults are medians of benchmarks/recovery.py: forked local workers, small checkpoints on a local disk.
    Rates are of one core and a file of 200 MB. On another cluster put in what `recoveries` of a run's summary says.
    """

    detect_seconds: float = 0.3  # from a death or an error to the driver's decision
    silence_seconds: float = 1.0  # for a stopped process to be told from one that is at work
    plan_seconds: float = 0.5  # for another plan, where the policy asks for one
    regroup_seconds: float = 0.1  # until all workers are there again and have met
    load_seconds: float = 0.3  # programs sent, checkpoint found; the state's bytes come on top
    first_step_seconds: float = 0.2  # that an attempt's first step takes longer than another
    commit_seconds: float = 0.2  # from a checkpoint's last byte to its manifest
    copy_bytes_per_second: float = 1e9  # into host memory; training stands still
    write_bytes_per_second: float = 3e8  # digests and disk, while training goes on
    read_bytes_per_second: float = 8e8  # digests verified


class Course:
    """When things happen in attempts under one plan, in wall seconds since the attempt's first step began.

    `scale` is wall seconds per modelled second; checkpoints are made after each `every` steps (0: none). `faults` are
    those of the job that are still to come, each beside its place in the program. Raises InputError, at its line of
    the job file, for a fault that the plan has no place for.
    """

    def __init__(
        self,
        plan: Plan,
        measured: Measured,
        scale: float,
        faults: Sequence[Fault],
        every: int,
        recovery: RecoverySeconds,
    ) -> None:
        self.plan, self._measured, self._scale, self._every = plan, measured, scale, every
        self.recovery = recovery
        compute = measured.compute(CostGraph(plan.cluster), plan.workload)
        self.program = compile_program(lay_out(plan), compute)
        self.names = [device.name for device in plan.cluster.devices()]
        played = simulate(self.program, compute, steps=_PLAYED_STEPS, sub_events=False)
        assert played.timeline is not None
        self.step_seconds = played.step_seconds * scale
        self._action_seconds = seconds_by_action(played.timeline)
        self._spans, self._first_end = _spans(played.timeline.records, scale)
        self._first_end += recovery.first_step_seconds
        self._slowed: dict[tuple[object, object], float] = {}
        self.stall_seconds = self._state_bytes / recovery.copy_bytes_per_second if every else 0.0
        self.resume(faults)

    def of(self, plan: Plan) -> Course:
        """The same training under another plan, without faults."""
        return Course(plan, self._measured, self._scale, (), self._every, self.recovery)

    def resume(self, faults: Sequence[Fault]) -> None:
        """Another attempt under the plan, with the faults that are left."""
        planned = plan_faults(faults, self.program, self.predicted_seconds)
        self.faults = tuple(zip(faults, planned, strict=True))
        self._extra = self._slow_seconds(planned)

    def predicted_seconds(self, device: int, action: int) -> float:
        """Modelled seconds of an action."""
        return self._action_seconds.get((device, action), 0.0)

    def stall_limit_seconds(self, fault: PlannedFault) -> float:
        """How long a device may stay at the action of a fault."""
        return stall_limit_seconds(self._scale * self.predicted_seconds(fault.device, fault.action))

    @property
    def _state_bytes(self) -> int:
        """What the device writes that writes most."""
        return 3 * _STATE_BYTES * max(self.program.ownership.owned_elements.values())

    @property
    def load_seconds(self) -> float:
        """Until all devices have read what they need: weights that they hold, moments that they update."""
        table = self.program.ownership
        owned = table.owned_elements
        most = _STATE_BYTES * max(n + 2 * owned.get(d, 0) for d, n in table.held_elements.items())
        return self.recovery.load_seconds + most / self.recovery.read_bytes_per_second

    def _slow_seconds(self, faults: Sequence[PlannedFault]) -> Mapping[int, float]:
        """Step -> seconds that slow devices, links and actions make it longer. Of a slow action all counts."""
        extra: dict[int, float] = {}
        lasting = [fault for fault in faults if fault.action < 0]
        for step in sorted({s for f in lasting for s in range(f.step, f.step + f.steps)}):
            now = [fault for fault in lasting if fault.step <= step < fault.step + fault.steps]
            extra[step] = self._slow_step_seconds(now) - self.step_seconds
        for fault in faults:
            if fault.action >= 0 and fault.do == "slow":
                waited = fault.slow_seconds * self._scale
                if fault.phase == Phase.DURING:  # then the action's own time is in it
                    waited -= self._scale * self.predicted_seconds(fault.device, fault.action)
                extra[fault.step] = extra.get(fault.step, 0.0) + waited
        return extra

    def _slow_step_seconds(self, faults: Sequence[PlannedFault]) -> float:
        """Wall seconds of a step in which devices and links are slow."""
        devices: dict[int, float] = {}
        links = {fault.link: fault.factor for fault in faults if fault.link}
        for fault in faults:
            if not fault.link:
                devices[fault.device] = devices.get(fault.device, 1.0) * fault.factor
        key = tuple(sorted(devices.items())), tuple(sorted(links.items()))
        if key not in self._slowed:
            cluster = with_links(self.plan.cluster, {name: 1.0 / factor for name, factor in links.items()})
            compute = self._measured.compute(CostGraph(cluster), self.plan.workload)
            program = at_pace(self.program, devices)
            played = simulate(program, compute, record=False, steps=_PLAYED_STEPS)
            self._slowed[key] = played.step_seconds * self._scale
        return self._slowed[key]

    def begin(self, first: int, step: int) -> float:
        """When `step` of an attempt that began with `first` begins: the one before it ends then."""
        if step == first:
            return 0.0
        slow = sum(seconds for at, seconds in self._extra.items() if first <= at < step)
        stalls = self.saved(first, step) * self.stall_seconds
        return self._first_end + (step - first - 1) * self.step_seconds + stalls + slow

    def saved(self, first: int, step: int) -> int:
        """Checkpoints that are begun until `step` begins."""
        return step // self._every - first // self._every if self._every else 0

    def at(self, first: int, fault: PlannedFault) -> float:
        """When a fault comes; infinity where the attempt has not its action."""
        if fault.step < first:
            return math.inf
        if fault.do == "nan":  # all see it in the norm, at the step's end
            return self.begin(first, fault.step + 1)
        number = _FIRST if fault.step == first else _STEADY
        span = self._spans.get((number, fault.device, fault.action))
        if span is None:  # the first step has nothing to take from the one before it
            return math.inf
        return self.begin(first, fault.step) + span[fault.phase == Phase.AFTER]

    def step_at(self, first: int, seconds: float) -> int:
        """The step that is under way after so many seconds."""
        step = first
        while self.begin(first, step + 1) <= seconds:
            step += 1
        return step

    def newest_checkpoint(self, first: int, seconds: float) -> int:
        """The step that is gone on from after a failure; `first` where the attempt has finished no checkpoint."""
        newest = first
        after = self._state_bytes / self.recovery.write_bytes_per_second + self.recovery.commit_seconds
        if self._every:
            for step in itertools.count(first - first % self._every + self._every, self._every):
                if self.begin(first, step) + after > seconds:
                    break
                newest = step
        return newest


def _spans(
    records: np.ndarray[tuple[int], np.dtype[np.void]], scale: float
) -> tuple[Mapping[tuple[int, int, int], tuple[float, float]], float]:
    """(step, device, action) -> wall seconds from the end of the step before to the action's start and end; and when
    the first step ends."""
    records = records[records["kind"] != Kind.COLLECTIVE]
    first_end = float(records["end"][records["step"] == _FIRST].max())
    before = np.where(records["step"] == _FIRST, 0.0, first_end)
    keys = zip(*(records[column].tolist() for column in ("step", "device", "action")), strict=True)
    starts, ends = ((records[column] - before) * scale for column in ("start", "end"))
    return dict(zip(keys, zip(starts.tolist(), ends.tolist(), strict=True), strict=True)), first_end * scale
