"""Messages between devices: first-in-first-out channels of two lanes, and groups inside an island.

Every byte between devices goes through `Communicator`: point-to-point over the job's one store-backed group, staged
through host memory where a device is not the host. Receives are posted ahead in the sender's order, each into its own
buffer, and consumed in any order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.program.actions import Channel, Program
from hethub.timeline.record import Lane

__all__ = ["Communicator", "Delivery", "ExchangeGroup", "NativeGroup", "PeerLostError", "Reserve"]

_TRAILER_BYTES = 8  # the arrival time (fp64) that an emulated link's message carries
_EXCHANGE_TAG = len(Lane)

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
        work = _guard(lambda: dist.irecv(buffer, self.rank_of[channel[0]], tag=int(channel[2])), channel[0])
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
        work = _guard(lambda: dist.isend(buffer, rank, tag=int(transfer.lane)), transfer.destination)
        assert work is not None
        self._sending.append((work, buffer))

    def receive(self, message: int, use: Callable[[Delivery], None]) -> None:
        """Wait for a message, hand it to `use`, and give its buffer back."""
        transfer = self.program.transfers[self.program.messages[message].transfer]
        channel = (transfer.source, transfer.destination, transfer.lane)
        inbox = self._inboxes[channel]
        work, buffer = inbox.waiting.pop(message)
        _guard(work.wait, transfer.source)
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
            _guard(work.wait, self.device)
            self._spare.setdefault(buffer.numel(), []).append(buffer)


def _guard(call: Callable[[], T], peer: int) -> T:
    """Translate the library's connection errors at the border."""
    try:
        return call()
    except RuntimeError as error:
        raise PeerLostError(f"connection with rank {peer} is lost ({str(error).splitlines()[0]})") from error


class _Timed:
    """Counts the seconds and the moments that a group spends in collectives."""

    def __init__(self) -> None:
        self.events: list[tuple[float, float]] = []

    def timed(self, call: Callable[[], object]) -> None:
        start = time.monotonic()
        call()
        self.events.append((start, time.monotonic()))

    def take_events(self) -> list[tuple[float, float]]:
        """The (start, end) monotonic seconds of every collective since the last call."""
        events, self.events = self.events, []
        return events


class NativeGroup(_Timed):
    """A tensor-parallel group inside one island: the vendor library's own collectives."""

    def __init__(self, ranks: Sequence[int], backend: str) -> None:
        super().__init__()
        self.size = len(ranks)
        self._group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        self.timed(lambda: _guard(lambda: dist.all_reduce(tensor, operation, group=self._group), -1))
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place; every member gets the same bits."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)


class ExchangeGroup(_Timed):
    """A group across islands, whose vendor libraries do not mix: everyone sends to everyone through host memory, and
    each adds in rank order, so that all members get the same bits."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.size = len(ranks)
        self._ranks = list(ranks)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        own = tensor.detach().to("cpu").contiguous()
        me = dist.get_rank()
        found = {me: own}
        pending: list[dist.Work | None] = []
        for rank in self._ranks:
            if rank != me:
                found[rank] = torch.empty_like(own)
                pending.append(_guard(lambda r=rank: dist.irecv(found[r], r, tag=_EXCHANGE_TAG), rank))  # type: ignore[misc]
        for rank in self._ranks:
            if rank != me:
                pending.append(_guard(lambda r=rank: dist.isend(own, r, tag=_EXCHANGE_TAG), rank))  # type: ignore[misc]
        for work in pending:
            assert work is not None
            _guard(work.wait, -1)
        return [found[rank] for rank in self._ranks]

    def _reduce(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def exchange() -> None:
            first, *rest = self._gather(tensor)
            total = first.clone()
            for other in rest:
                total = combine(total, other)
            tensor.copy_(total)

        self.timed(exchange)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, added in rank order."""
        return self._reduce(tensor, torch.add)

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        return self._reduce(tensor, torch.maximum)
