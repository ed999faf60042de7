"""Interruptions on purpose: which of them stands at an action, and the doing of it.

The executor calls one hook before, during and after every action; without a fault for its device there is no hook, so
that nothing is spent. *During* a compute action is inside its math, once a tensor-parallel group has met; during a send
is between its posting and its completion; during a receive is while the message is awaited.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from hethub.errors import InputError
from hethub.program.actions import Program
from hethub.specs.job import COMPUTE, JOIN, Deed, Fault
from hethub.specs.nearest import unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from hethub.launch.devices import ComputeDevice

__all__ = [
    "Hook",
    "InjectedFaultError",
    "Interruptions",
    "Phase",
    "PlannedFault",
    "do_to_process",
    "join_faults",
    "plan_faults",
]

_HUGE_BYTES = 1 << 60


class Phase(IntEnum):
    """Where in an action."""

    BEFORE = 0
    DURING = 1
    AFTER = 2


Hook = Callable[[int, int, Phase], None]
"""Called with (step, action number, phase)."""


class InjectedFaultError(Exception):
    """Raised by a fault of the job file."""


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


class Interruptions:
    """The faults of one device: a hook that does what stands at (step, action, phase) and nothing elsewhere.
    `slow_links` are the links that are slow in the current step, and what their bandwidth is divided by."""

    def __init__(
        self,
        faults: Sequence[PlannedFault],
        compute: ComputeDevice,
        gradients: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._faults: dict[tuple[int, int, Phase], list[PlannedFault]] = {}
        self._lasting = [fault for fault in faults if fault.action < 0]
        self._step = -1
        self.slow_links: dict[str, float] = {}
        for fault in faults:
            if fault.action >= 0:
                self._faults.setdefault((fault.step, fault.action, fault.phase), []).append(fault)
        self._compute = compute
        self._gradients = gradients

    def __call__(self, step: int, action: int, phase: Phase) -> None:
        """Do what the job asks for here. Raises what a fault raises."""
        if step != self._step:
            self._begin(step)
        for fault in self._faults.get((step, action, phase), ()):
            self._do(fault)

    def _begin(self, step: int) -> None:
        """Set what lasts for whole steps."""
        self._step = step
        now = [fault for fault in self._lasting if fault.step <= step < fault.step + fault.steps]
        self._compute.slow_down = math.prod(fault.factor for fault in now if not fault.link)
        self.slow_links = {fault.link: fault.factor for fault in now if fault.link}

    def _do(self, fault: PlannedFault) -> None:
        if fault.do == "slow":
            time.sleep(fault.slow_seconds * self._compute.clock.time_scale)
        elif fault.do == "oom":
            self._run_out_of_memory()
        elif fault.do == "nan":
            next(iter(self._gradients().values())).view(-1)[:1].fill_(float("nan"))
        else:
            do_to_process(fault.do)

    def _run_out_of_memory(self) -> None:
        """Ask for more than there is, of the tally where the device is emulated, else of the real allocator."""
        tally = self._compute.tally
        if tally is not None:
            tally.grow(tally.limit_bytes)
            return
        import torch

        torch.empty(_HUGE_BYTES, dtype=torch.uint8, device=self._compute.torch_device)


def do_to_process(deed: Deed) -> None:
    """Kill, end, stop or hang this process, or raise InjectedFaultError."""
    if deed == "kill":
        os.write(2, f"killed on purpose at {time.time()}\n".encode())  # nothing else is told of it
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "exit":
        os._exit(1)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "hang":
        threading.Event().wait()
    elif deed == "raise":
        raise InjectedFaultError("raised on purpose, as the job file asks")
    else:
        raise ValueError(f"{deed} is not done to a process")
