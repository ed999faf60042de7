"""Streams of an accelerator: compute on one, copies to and from host memory on one each, in order by events.

The host queues work and goes on. It waits only where it needs a value (the norm, the loss), where a message has not
come, before it hands a copied message to the network, and at the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["DeviceStreams", "Moment", "Streams", "pack"]


class Moment(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...


class Streams(Protocol):
    """What an accelerator does at the same time. A `Moment` of the stream of compute also stands for what was queued
    before it."""

    def moment(self) -> Moment:
        """Of the stream of compute, now."""
        ...

    def seconds(self, begin: Moment, end: Moment) -> float:
        """Between two moments of compute that are past."""
        ...

    def host_memory(self, size: int) -> Tensor:
        """(size,) uint8 in host memory that the device copies from and to by itself."""
        ...

    def copy_out(self, parts: Sequence[Tensor], buffer: Tensor) -> Moment:
        """Copy parts one after the other into host memory, as they are after all compute queued so far; returns when
        they will be there."""
        ...

    def copy_in(self, host: Tensor) -> tuple[Tensor, Moment]:
        """Copy from host memory. Compute that is queued from now on waits for it; `host` may change from the moment
        returned."""
        ...


def pack(parts: Sequence[Tensor], buffer: Tensor, *, non_blocking: bool = False) -> int:
    """Copy tensors (any shapes, one dtype) one after the other to the start of a uint8 buffer; returns their bytes."""
    at = 0
    for part in parts:
        stop = at + part.numel() * part.element_size()
        place = buffer[at:stop].view(part.dtype).view(part.shape)
        place.copy_(part.detach(), non_blocking=non_blocking)
        at = stop
    return at


class DeviceStreams:
    """Of any device type that torch has a module for (`torch.cuda`, or a vendor's plug-in); the stream of compute is
    the one in use when a call is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._outward = self._module.Stream(device)
        self._inward = self._module.Stream(device)

    def moment(self) -> Moment:
        """An event on the stream of compute."""
        event: Moment = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self.device))  # type: ignore[attr-defined]
        return event

    def seconds(self, begin: Moment, end: Moment) -> float:
        """As the device's own clock has it, to some microseconds."""
        milliseconds: float = begin.elapsed_time(end)  # type: ignore[attr-defined]
        return milliseconds * 1e-3

    def host_memory(self, size: int) -> Tensor:
        """Page-locked; torch keeps what is let go for the next one."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy_out(self, parts: Sequence[Tensor], buffer: Tensor) -> Moment:
        """On the stream outwards. The allocator keeps the parts until then."""
        self._outward.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._outward):
            pack(parts, buffer, non_blocking=True)
            for part in parts:
                part.record_stream(self._outward)
            done: Moment = self._outward.record_event()
        return done

    def copy_in(self, host: Tensor) -> tuple[Tensor, Moment]:
        """On the stream inwards."""
        compute = self._module.current_stream(self.device)
        with self._module.stream(self._inward):
            found = host.to(self.device, non_blocking=True)
            done: Moment = self._inward.record_event()
        compute.wait_event(done)
        found.record_stream(compute)
        return found, done
