"""Devices: what runs an action's math and says how long it took. An emulated one is a class, not a branch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from hethub.launch.clock import Clock
from hethub.launch.model import TensorGroup
from hethub.launch.streams import Moment, Streams
from hethub.launch.tally import StorageTally
from hethub.program.actions import Price

__all__ = ["Accelerator", "ComputeDevice", "EmulatedDevice", "RealDevice", "Timing"]


@dataclass(slots=True)
class Timing:
    """When an action ran (modelled seconds), the device's own compute in it, and what was real.

    `real_seconds` and `overrun_seconds` are wall seconds. `collectives` are (start, end) in modelled seconds. Of a
    device that works off a queue all are NaN until `ComputeDevice.settle`.
    """

    start: float
    end: float
    busy_seconds: float
    real_seconds: float
    overrun_seconds: float
    collectives: tuple[tuple[float, float], ...] = ()


class ComputeDevice(Protocol):
    """Runs math and times it. One with `streams` works off a queue; the others have done an action when the call
    returns. `slow_down` is how many times as long its compute takes, on purpose."""

    clock: Clock
    slow_down: float
    torch_device: torch.device
    tally: StorageTally | None
    streams: Streams | None

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Run `work` as one action whose predicted price is `price`."""
        ...

    def elapsed(self, work: Callable[[], None]) -> Timing:
        """Do what is not compute: what the device does not do meanwhile is time lost to it."""
        ...

    def settle(self) -> None:
        """Wait until all actions are done; from then on their timings are known."""
        ...


def _collectives(group: TensorGroup) -> list[tuple[Any, Any]]:
    take = getattr(group, "take_events", None)
    events: list[tuple[Any, Any]] = [] if take is None else take()
    return events


def _of_compute(start: float, end: float, collectives: tuple[tuple[float, float], ...]) -> Timing:
    """All of a real action but its collectives is the device's own compute."""
    busy = max(0.0, end - start - sum(b - a for a, b in collectives))
    return Timing(start, end, busy, busy, 0.0, collectives)


def _linger(slow_down: float, seconds: float) -> None:
    """Let what took `seconds` take `slow_down` times as long."""
    if slow_down > 1.0:
        time.sleep((slow_down - 1.0) * seconds)


class _OnHost:
    """A device that is the host's own processor: an action is done when the call returns."""

    clock: Clock
    slow_down: float = 1.0
    streams: Streams | None = None

    def elapsed(self, work: Callable[[], None]) -> Timing:
        """By the clock."""
        start = self.clock.now()
        work()
        return Timing(start, self.clock.now(), 0.0, 0.0, 0.0)

    def settle(self) -> None:
        """Nothing is open."""


class RealDevice(_OnHost):
    """The CPU as it is."""

    tally: StorageTally | None = None

    def __init__(self, clock: Clock, torch_device: torch.device) -> None:
        self.clock = clock
        self.torch_device = torch_device

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Run; collectives inside are exposed communication."""
        start = self.clock.now()
        work()
        _linger(self.slow_down, self.clock.now() - start)
        end = self.clock.now()
        epoch = self.clock.epoch_seconds
        return _of_compute(start, end, tuple((a - epoch, b - epoch) for a, b in _collectives(group)))


@dataclass(frozen=True, slots=True)
class _Queued:
    """An action in an accelerator's queue: moments of its start, its end and its collectives."""

    timing: Timing
    start: Moment
    end: Moment
    collectives: list[tuple[Moment, Moment]]
    busy: bool  # whether what lies between is compute


class Accelerator:
    """A device with streams: actions are queued, and timed by events between them.

    Between two events lies what the device did and what it waited for, so a receive's time is what the device stood
    still for, not what the host waited.
    """

    tally: StorageTally | None = None
    slow_down: float = 1.0

    def __init__(self, clock: Clock, torch_device: torch.device, streams: Streams) -> None:
        self.clock = clock
        self.torch_device = torch_device
        self.streams: Streams | None = streams
        self._streams = streams
        self._queue: list[_Queued] = []

    def compute(self, price: Price, group: TensorGroup, work: Callable[[], None]) -> Timing:
        """Queue it; collectives inside are exposed communication."""
        if self.slow_down == 1.0:
            return self._queued(work, lambda: _collectives(group), busy=True)

        def slowly() -> None:
            self._streams.moment().synchronize()
            begin = time.monotonic()
            work()
            self._streams.moment().synchronize()
            _linger(self.slow_down, time.monotonic() - begin)

        return self._queued(slowly, lambda: _collectives(group), busy=True)

    def elapsed(self, work: Callable[[], None]) -> Timing:
        """By what the device does in between: nothing, where it has to wait."""
        return self._queued(work, list, busy=False)

    def _queued(
        self, work: Callable[[], None], collectives: Callable[[], list[tuple[Moment, Moment]]], busy: bool
    ) -> Timing:
        start = self._streams.moment()
        work()
        timing = Timing(math.nan, math.nan, math.nan, math.nan, math.nan)
        self._queue.append(_Queued(timing, start, self._streams.moment(), collectives(), busy))
        return timing

    def settle(self) -> None:
        """Wait for the device, and count back from now."""
        last = self._streams.moment()
        last.synchronize()
        now = self.clock.now()

        def when(moment: Moment) -> float:
            return now - self._streams.seconds(moment, last)

        for queued in self._queue:
            start, end = when(queued.start), when(queued.end)
            known = Timing(start, end, 0.0, 0.0, 0.0)
            if queued.busy:
                known = _of_compute(start, end, tuple((when(a), when(b)) for a, b in queued.collectives))
            for entry in fields(Timing):
                setattr(queued.timing, entry.name, getattr(known, entry.name))
        self._queue.clear()


class EmulatedDevice(_OnHost):
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
        # Others of its group learn that it is slow when they meet it again.
        more = (self.slow_down - 1.0) * price.busy_seconds
        deadline = start + price.price.seconds + more
        overrun = max(0.0, self.clock.now() - deadline) * self.clock.time_scale
        self.clock.wait_until(deadline)
        # What a device that works alone takes longer is its own; in a group it may be another's.
        late = overrun / self.clock.time_scale if group.size == 1 else 0.0
        busy = price.busy_seconds + more + late
        return Timing(ready, self.clock.now(), busy, real, overrun, self._modelled(price, start))

    def _modelled(self, price: Price, start: float) -> tuple[tuple[float, float], ...]:
        found = []
        at = start
        for segment in price.price.segments:
            at += max(segment.member_seconds)
            if segment.collective_seconds:
                found.append((at, at + segment.collective_seconds))
            at += segment.collective_seconds
        return tuple(found)
