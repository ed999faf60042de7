"""Devices: what runs an action's math and says how long it took. An emulated one is a class, not a branch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hethub.launch.clock import Clock
from hethub.launch.model import TensorGroup
from hethub.launch.tally import StorageTally
from hethub.program.actions import Price

__all__ = ["ComputeDevice", "EmulatedDevice", "RealDevice", "Timing"]


@dataclass(frozen=True, slots=True)
class Timing:
    """When an action ran (modelled seconds), the device's own compute in it, and what was real.

    `real_seconds` and `overrun_seconds` are wall seconds. `collectives` are (start, end) in modelled seconds.
    """

    start: float
    end: float
    busy_seconds: float
    real_seconds: float
    overrun_seconds: float
    collectives: tuple[tuple[float, float], ...] = ()


class ComputeDevice(Protocol):
    """Runs math and times it."""

    clock: Clock
    torch_device: torch.device
    tally: StorageTally | None

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Run `work` as one action whose predicted price is `price`."""
        ...


def _collectives(group: TensorGroup) -> list[tuple[float, float]]:
    take = getattr(group, "take_events", None)
    events: list[tuple[float, float]] = [] if take is None else take()
    return events


class RealDevice:
    """Any torch device; the action ends when the device has done the math."""

    tally: StorageTally | None = None

    def __init__(self, clock: Clock, torch_device: torch.device) -> None:
        self.clock = clock
        self.torch_device = torch_device
        module: Any = getattr(torch, torch_device.type, None)
        self._synchronize: Callable[[], None] = getattr(module, "synchronize", lambda: None)

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Run and wait for the device; collectives inside are exposed communication."""
        start = self.clock.now()
        work()
        self._synchronize()
        end = self.clock.now()
        epoch = self.clock.epoch_seconds
        inside = tuple((a - epoch, b - epoch) for a, b in _collectives(group))
        busy = max(0.0, end - start - sum(b - a for a, b in inside))
        return Timing(start, end, busy, busy, 0.0, inside)


class EmulatedDevice:
    """Real math on the CPU in a modelled device's time and memory.

    An action starts when its inputs are there and the device is free (a group's: when its latest member is), never at
    an earlier deadline, and ends at start + predicted seconds.
    """

    def __init__(
        self, clock: Clock, memory_bytes: int, name: str, predicted_bytes: int | None = None
    ) -> None:
        """`predicted_bytes` is the peak that the cost model expects, for the error where memory runs out."""
        self.clock = clock
        self.torch_device = torch.device("cpu")
        self.tally: StorageTally | None = StorageTally(memory_bytes, name, predicted_bytes)

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Run, then wait for the deadline; real work past it is an overrun."""
        ready = self.clock.now()
        start = ready
        if group.size > 1:
            start = float(group.max(torch.tensor([ready], dtype=torch.float64)))
            _collectives(group)
        begin = time.monotonic()
        work()
        real = time.monotonic() - begin
        _collectives(group)
        deadline = start + price.price.seconds
        overrun = max(0.0, self.clock.now() - deadline) * self.clock.time_scale
        self.clock.wait_until(deadline)
        return Timing(
            ready, self.clock.now(), price.busy_seconds, real, overrun, self._modelled(price, start)
        )

    def _modelled(self, price: Price, start: float) -> tuple[tuple[float, float], ...]:
        found = []
        at = start
        for segment in price.price.segments:
            at += max(segment.member_seconds)
            if segment.collective_seconds:
                found.append((at, at + segment.collective_seconds))
            at += segment.collective_seconds
        return tuple(found)
