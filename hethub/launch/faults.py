"""Interruptions on purpose: the doing of them.

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
from typing import TYPE_CHECKING

from hethub.program.faults import Phase, PlannedFault
from hethub.specs.job import Deed

if TYPE_CHECKING:
    from torch import Tensor

    from hethub.launch.devices import ComputeDevice

__all__ = ["Hook", "InjectedFaultError", "Interruptions", "do_to_process"]

_HUGE_BYTES = 1 << 60


Hook = Callable[[int, int, Phase], None]
"""Called with (step, action number, phase)."""


class InjectedFaultError(Exception):
    """Raised by a fault of the job file."""


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
