"""Messages between devices: first-in-first-out channels of two lanes.

Every byte between devices goes through `Communicator`: point-to-point over the job's one store-backed group, staged
through host memory where a device is not the host. Receives are posted ahead in the sender's order, each into its own
buffer, and consumed in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.program.actions import Channel, Program
from hethub.timeline.record import Lane

__all__ = ["Communicator", "Delivery", "PeerLostError", "Reserve", "guard"]

_TRAILER_BYTES = 8  # the arrival time (fp64) that an emulated link's message carries

T = TypeVar("T")
Reserve = Callable[[int, int, float], float]  # (destination, bytes, now) -> arrival


class PeerLostError(Exception):
    """The other end of a channel is gone; usually the consequence of another rank's failure."""


@dataclass(slots=True)
class Delivery:
    """A received message: `payload` (uint8, valid until the next use of the buffer) and its modelled arrival."""

    payload: Tensor
    arrival: float | None


@dataclass(slots=True)
class _Inbox:
    """One channel's receiving end."""

    messages: tuple[int, ...]
    depth: int
    posted: int = 0
    waiting: dict[int, tuple[dist.Work, Tensor]] = field(default_factory=dict)


class Communicator:
    """The channels of one device while it runs one program.

    `rank_of` maps device indices to ranks of the job's process group. With `reserve` given, links are emulated: the
    sender reserves the path and the message carries its arrival time.
    """

    def __init__(
        self, program: Program, device: int, rank_of: Mapping[int, int], reserve: Reserve | None = None
    ) -> None:
        self.program = program
        self.device = device
        self.rank_of = rank_of
        self.reserve = reserve
        self._extra = 0 if reserve is None else _TRAILER_BYTES
        self._inboxes: dict[Channel, _Inbox] = {}
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        self._spare: dict[int, list[Tensor]] = {}
        self._inbound = [channel for channel in program.order if channel[1] == device]

    def begin(self, lane: Lane) -> None:
        """Post the first receives of a lane for the coming step."""
        for channel in self._inbound:
            if channel[2] == lane:
                inbox = _Inbox(self.program.order[channel], self.program.depth[channel])
                self._inboxes[channel] = inbox
                for _ in range(inbox.depth):
                    self._post(channel, inbox)

    def _buffer(self, size: int) -> Tensor:
        spare = self._spare.get(size)
        return spare.pop() if spare else torch.empty(size, dtype=torch.uint8)

    def _post(self, channel: Channel, inbox: _Inbox) -> None:
        if inbox.posted == len(inbox.messages):
            return
        message = inbox.messages[inbox.posted]
        size = self.program.transfers[self.program.messages[message].transfer].bytes + self._extra
        buffer = self._buffer(size)
        work = guard(lambda: dist.irecv(buffer, self.rank_of[channel[0]], tag=int(channel[2])), channel[0])
        assert work is not None
        inbox.waiting[message] = (work, buffer)
        inbox.posted += 1

    def send(self, message: int, parts: Sequence[Tensor], now: float) -> None:
        """Send the concatenation of `parts` (any shapes, one dtype), without waiting for the receiver."""
        transfer = self.program.transfers[self.program.messages[message].transfer]
        self.reap()
        buffer = self._buffer(transfer.bytes + self._extra)
        at = 0
        for part in parts:
            raw = part.detach().contiguous().view(-1).view(torch.uint8)
            buffer[at : at + raw.numel()].copy_(raw)
            at += raw.numel()
        if at != transfer.bytes:
            raise AssertionError(f"message {message} holds {at} bytes, the program says {transfer.bytes}")
        if self.reserve is not None:
            arrival = self.reserve(transfer.destination, transfer.bytes, now)
            buffer[at:].copy_(torch.tensor([arrival], dtype=torch.float64).view(torch.uint8))
        rank = self.rank_of[transfer.destination]
        work = guard(lambda: dist.isend(buffer, rank, tag=int(transfer.lane)), transfer.destination)
        assert work is not None
        self._sending.append((work, buffer))

    def receive(self, message: int, use: Callable[[Delivery], None]) -> None:
        """Wait for a message, hand it to `use`, and give its buffer back."""
        transfer = self.program.transfers[self.program.messages[message].transfer]
        channel = (transfer.source, transfer.destination, transfer.lane)
        inbox = self._inboxes[channel]
        work, buffer = inbox.waiting.pop(message)
        guard(work.wait, transfer.source)
        arrival = float(buffer[transfer.bytes :].view(torch.float64)) if self._extra else None
        use(Delivery(buffer[: transfer.bytes], arrival))
        self._spare.setdefault(buffer.numel(), []).append(buffer)
        self._post(channel, inbox)

    def reap(self) -> None:
        """Take back the buffers of sends that are done."""
        while self._sending and self._sending[0][0].is_completed():
            _, buffer = self._sending.popleft()
            self._spare.setdefault(buffer.numel(), []).append(buffer)

    def drain(self) -> None:
        """Wait until every send has left."""
        while self._sending:
            work, buffer = self._sending.popleft()
            guard(work.wait, self.device)
            self._spare.setdefault(buffer.numel(), []).append(buffer)


def guard(call: Callable[[], T], peer: int) -> T:
    """Translate the library's connection errors at the border."""
    try:
        return call()
    except RuntimeError as error:
        raise PeerLostError(f"connection with rank {peer} is lost ({str(error).splitlines()[0]})") from error
