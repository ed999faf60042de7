"""Faults that a job asks for, at the actions of a program: the workers do them, the simulator prices them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from hethub.errors import InputError
from hethub.program.actions import Program
from hethub.specs.cluster import Cluster
from hethub.specs.job import COMPUTE, JOIN, Deed, Fault
from hethub.specs.nearest import unknown_name

__all__ = ["Phase", "PlannedFault", "faults_left", "join_faults", "plan_faults"]


class Phase(IntEnum):
    """Where in an action."""

    BEFORE = 0
    DURING = 1
    AFTER = 2


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault at an action of a program.

    `slow_seconds` is how long a slow one waits, in modelled seconds. One that lasts for `steps` whole steps has no
    action (-1): all compute of the device takes `factor` times as long, or the `link` (and no device) has a `factor`-th
    of its bandwidth.
    """

    device: int
    step: int
    action: int
    phase: Phase
    do: Deed
    slow_seconds: float = 0.0
    steps: int = 1
    factor: float = 1.0
    link: str = ""


def plan_faults(
    faults: Sequence[Fault], program: Program, predicted_seconds: Callable[[int, int], float]
) -> tuple[PlannedFault, ...]:
    """Find the action of each fault inside a step.

    `predicted_seconds(device, action)` sizes the slow ones. Raises InputError, at the fault's line of the job file,
    when the plan leaves the device out or its list has no such action.
    """
    planned = []
    for fault in faults:
        if fault.link or fault.action == COMPUTE:
            planned.append(_lasting(fault, program))
            continue
        if not program.devices[fault.device]:
            raise InputError(f"{fault.place}: the plan leaves this device out. Name a device that it uses.")
        if fault.action == JOIN:
            continue
        action = _find_action(fault, program)
        seconds = 0.0
        if fault.do == "slow":
            # An emulated device waits for its deadline anyway, so inside the math all of the time has to pass.
            times = fault.factor if fault.phase == "during" else fault.factor - 1
            seconds = times * predicted_seconds(fault.device, action)
        phase = Phase[fault.phase.upper()]
        planned.append(PlannedFault(fault.device, fault.step, action, phase, fault.do, seconds))
    return tuple(planned)


def _lasting(fault: Fault, program: Program) -> PlannedFault:
    if not fault.link and not program.devices[fault.device]:
        raise InputError(f"{fault.place}: the plan leaves this device out. Name a device that it uses.")
    return PlannedFault(
        device=fault.device,
        step=fault.step,
        action=-1,
        phase=Phase.BEFORE,
        do=fault.do,
        steps=fault.steps,
        factor=fault.factor,
        link=fault.link,
    )


def _find_action(fault: Fault, program: Program) -> int:
    count = len(program.devices[fault.device])
    if isinstance(fault.action, int):
        if not 0 <= fault.action < count:
            raise InputError(
                f"{fault.place}: the device has actions 0 to {count - 1}, not {fault.action}. Name one of them."
            )
        return fault.action
    known: dict[str, int] = {}
    for number in range(count):
        known.setdefault(program.describe(fault.device, number), number)
    if fault.action not in known:
        what = f'the device has no action "{fault.action}"'
        raise InputError(f"{fault.place}: {unknown_name(what, fault.action, known)}")
    return known[fault.action]


def join_faults(faults: Sequence[Fault]) -> Mapping[int, Deed]:
    """Device -> what happens to its worker when it joins."""
    return {fault.device: fault.do for fault in faults if fault.action == JOIN}


def faults_left(
    faults: Sequence[Fault],
    before: Cluster,
    after: Cluster,
    program: Program,
    predicted_seconds: Callable[[int, int], float],
) -> tuple[Fault, ...]:
    """Those of the faults of a cluster that a program of a smaller one has a place for, by its numbers of devices."""
    names = [device.name for device in before.devices()]
    index = {device.name: number for number, device in enumerate(after.devices())}
    moved = [
        fault if fault.link else replace(fault, device=index[names[fault.device]])
        for fault in faults
        if fault.link or names[fault.device] in index
    ]
    return tuple(fault for fault in moved if _possible(fault, program, predicted_seconds))


def _possible(fault: Fault, program: Program, predicted_seconds: Callable[[int, int], float]) -> bool:
    try:
        return bool(plan_faults([fault], program, predicted_seconds))
    except InputError:
        return False
