"""An accelerator's streams played by the host, at their least convenient: for machines without an accelerator.

Compute is done when it is queued. A copy to host memory is made when somebody waits for it and never before, as if the
device were far behind: a message that leaves early, or a source that changes too early, is seen in what arrives. A
buffer that is used again although nobody has waited for the device to read it is refused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hethub.launch.clock import Clock
from hethub.launch.devices import Accelerator, ComputeDevice
from hethub.launch.streams import Moment, pack
from hethub.launch.worker import Worker

__all__ = ["HostStreams", "PretendingWorker"]


class _Moment:
    def __init__(self, when_waited_for: Callable[[], object] = lambda: None) -> None:
        self.seconds = time.monotonic()
        self.waited_for = False
        self._when_waited_for = when_waited_for

    def synchronize(self) -> None:
        if not self.waited_for:
            self.waited_for = True
            self._when_waited_for()


class HostStreams:
    """See the module's text."""

    def __init__(self) -> None:
        # By address: what was copied in, kept so that no other memory has the address, and when it is free.
        self._read: dict[int, tuple[Tensor, _Moment]] = {}

    def moment(self) -> Moment:
        return _Moment()

    def seconds(self, begin: Moment, end: Moment) -> float:
        assert isinstance(begin, _Moment) and isinstance(end, _Moment)
        return end.seconds - begin.seconds

    def host_memory(self, size: int) -> Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN, where it is read before it is written

    def copy_out(self, parts: Sequence[Tensor], buffer: Tensor) -> Moment:
        return _Moment(lambda: pack(parts, buffer))

    def copy_in(self, host: Tensor) -> tuple[Tensor, Moment]:
        if host.data_ptr() in self._read and not self._read[host.data_ptr()][1].waited_for:
            raise AssertionError("a buffer is used again before the device has read it")
        free = _Moment()
        self._read[host.data_ptr()] = host, free
        return host.clone(), free


class PretendingWorker(Worker):
    """A worker whose real CPU may pretend to be an accelerator, and that tests can look into."""

    pretends = False

    def pretend(self, devices: frozenset[int]) -> None:
        """From the next load on, if this device is among them."""
        self.pretends = self.setup.device in devices

    def imported(self, module: str) -> bool:
        """Whether this process has loaded it."""
        return module in sys.modules

    def _device(self) -> ComputeDevice:
        device = super()._device()
        if self.pretends and self.task.links_file is None:
            return Accelerator(Clock(time.monotonic()), device.torch_device, HostStreams())
        return device
