"""Messages between devices: first-in-first-out channels of two lanes.

Every byte between devices goes through `Communicator`: point-to-point over the job's one store-backed group, staged
through host memory where a device is not the host. Receives are posted ahead in the sender's order, each into its own
buffer, and consumed in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.launch.streams import Moment, Streams, pack
from hethub.launch.tally import StorageTally
from hethub.program.actions import SUMS, Channel, Program, Transfer, What
from hethub.program.memory import TRAILER_BYTES, acknowledged
from hethub.timeline.record import Lane

__all__ = ["Communicator", "Delivery", "PeerLostError", "Reserve", "guard"]

T = TypeVar("T")
Reserve = Callable[[int, int, float], float]  # (destination, bytes, now) -> arrival
_BELL = torch.zeros(1, dtype=torch.uint8)


class PeerLostError(Exception):
    """The other end of a channel is gone; usually the consequence of another rank's failure."""


@dataclass(slots=True)
class Delivery:
    """A received message: `payload` (uint8) inside `buffer`, and its modelled arrival.

    The payload is the receiver's until it gives the buffer back with `Communicator.release`.
    """

    payload: Tensor
    arrival: float | None
    buffer: Tensor


@dataclass(slots=True)
class _Inbox:
    """One channel's receiving end in one step."""

    messages: tuple[int, ...]
    depth: int
    posted: int = 0
    waiting: dict[int, tuple[dist.Work, Tensor]] = field(default_factory=dict)


class Communicator:
    """The channels of one device while it runs one program.

    `rank_of` maps device indices to ranks of the job's process group. With `reserve` given, links are emulated: the
    sender reserves the path and the message carries its arrival time. A `tally` counts the buffers. The library's own
    threads move the bytes while the device computes. Buffers of activations are kept and used again; those of
    parameters, which come once a step, give their memory to activations meanwhile. Messages of the transfers in `bells`
    only say that what they would carry can be read where it lies. With `streams` the device is an accelerator: it
    copies to host memory by itself, and a thread of this process hands each message on when its copy is there.
    """

    def __init__(
        self,
        program: Program,
        device: int,
        rank_of: Mapping[int, int],
        reserve: Reserve | None = None,
        tally: StorageTally | None = None,
        bells: frozenset[int] = frozenset(),
        streams: Streams | None = None,
    ) -> None:
        self.program = program
        self.device = device
        self.rank_of = rank_of
        self.reserve = reserve
        self.tally = tally
        self._extra = 0 if reserve is None else TRAILER_BYTES
        self._inboxes: dict[Channel, _Inbox] = {}
        # by message: (how to wait for it, payload, its lane where it is a buffer of ours)
        self._sending: dict[int, tuple[Callable[[], object], Tensor, Lane | None]] = {}
        # by size: buffers, and from when on they may be written
        self._spare: dict[int, list[tuple[Tensor, Moment | None]]] = {}
        self._streams = streams
        # One thread, so that messages leave in the order of the program.
        self._leaving = None if streams is None else ThreadPoolExecutor(1, thread_name_prefix="leaving")
        self._inbound = [channel for channel in program.order if channel[1] == device]
        self._told = acknowledged(program, {channel[0] for channel in self._inbound})
        self._bells = bells
        self._size = [
            _BELL.numel() if m.transfer in bells else program.transfers[m.transfer].bytes + self._extra
            for m in program.messages
        ]

    def begin(self, lane: Lane) -> None:
        """Post the first receives of a lane for the coming step; all of the step before have been consumed."""
        for channel in self._inbound:
            if channel[2] == lane:
                inbox = _Inbox(self.program.order[channel], self.program.depth[channel])
                self._inboxes[channel] = inbox
                for _ in range(inbox.depth):
                    self._post(channel, inbox)

    def _buffer(self, size: int, lane: Lane) -> Tensor:
        spare = self._spare.get(size) if lane == Lane.ACTIVATIONS else None
        if spare:
            buffer, free = spare.pop()
            if free is not None:
                free.synchronize()
            return buffer
        buffer = (
            torch.empty(size, dtype=torch.uint8) if self._streams is None else self._streams.host_memory(size)
        )
        if self.tally is not None:
            self.tally.add(buffer)
        return buffer

    def release(self, buffer: Tensor, lane: Lane, free: Moment | None = None) -> None:
        """Give a received message's buffer back; `free` is when the device will have read it, None where it has."""
        if lane == Lane.ACTIVATIONS:
            self._spare.setdefault(buffer.numel(), []).append((buffer, free))
        elif self.tally is not None:
            self.tally.drop(buffer.data_ptr())

    def _post(self, channel: Channel, inbox: _Inbox) -> None:
        if inbox.posted == len(inbox.messages):
            return
        message = inbox.messages[inbox.posted]
        buffer = self._buffer(self._size[message], channel[2])
        work = guard(lambda: dist.irecv(buffer, self.rank_of[channel[0]], tag=int(channel[2])), channel[0])
        assert work is not None
        inbox.waiting[message] = (work, buffer)
        inbox.posted += 1

    def send(self, message: int, parts: Sequence[Tensor], now: float) -> None:
        """Send the concatenation of `parts` (any shapes, one dtype), without waiting for the receiver.

        A single contiguous part is sent from where it lies: it must not change until its receiver has it.
        """
        transfer = self.program.transfer(message)
        # Nobody told of the last step's, as in evaluation: it has long left, but may not be dropped before it is known.
        self._reclaim(message)
        if self.program.messages[message].transfer in self._bells:
            self._start(message, transfer, _BELL, None)
            return
        size = sum(part.numel() * part.element_size() for part in parts)
        if size != transfer.bytes:
            raise AssertionError(f"message {message} holds {size} bytes, the program says {transfer.bytes}")
        copies = self._streams is not None and transfer.what not in SUMS
        own = copies or self.reserve is not None or len(parts) > 1 or not parts[0].is_contiguous()
        there: Moment | None = None
        if not own:
            payload = parts[0].detach().view(-1).view(torch.uint8)
        else:
            payload = self._buffer(self._size[message], transfer.lane)
            if self._streams is not None and copies:
                there = self._streams.copy_out(parts, payload)
            else:
                pack(parts, payload)
        if self.reserve is not None:
            arrival = self.reserve(transfer.destination, transfer.bytes, now)
            payload[size:].view(torch.float64).fill_(arrival)
        self._start(message, transfer, payload, transfer.lane if own else None, there)

    def _start(
        self,
        message: int,
        transfer: Transfer,
        payload: Tensor,
        lane: Lane | None,
        there: Moment | None = None,
    ) -> None:
        """Hand bytes to the library, from `there` on; `lane` is that of a buffer of ours."""
        rank = self.rank_of[transfer.destination]

        def leave() -> dist.Work:
            if there is not None:
                there.synchronize()
            work = guard(lambda: dist.isend(payload, rank, tag=int(transfer.lane)), transfer.destination)
            assert work is not None
            return work

        if self._leaving is None:
            wait: Callable[[], object] = leave().wait
        else:
            left = self._leaving.submit(leave)
            wait = lambda: left.result().wait()  # noqa: E731
        self._sending[message] = (wait, payload, lane)

    def receive(self, message: int) -> Delivery:
        """Wait for a message. Its buffer comes back with `release`."""
        transfer = self.program.transfer(message)
        channel = (transfer.source, transfer.destination, transfer.lane)
        inbox = self._inboxes[channel]
        work, buffer = inbox.waiting.pop(message)
        guard(work.wait, transfer.source)
        for sent in list(self._sending) if transfer.what == What.TOTAL else self._told.get(message, ()):
            self._reclaim(sent)
        self._post(channel, inbox)
        arrival = float(buffer[transfer.bytes :].view(torch.float64)) if self._extra else None
        return Delivery(buffer[: transfer.bytes], arrival, buffer)

    def drain(self) -> None:
        """Wait until every send has left."""
        for message in list(self._sending):
            self._reclaim(message)

    def _reclaim(self, message: int) -> None:
        """Take back what was sent. A wait is all that the library tells of a send, so it is made when the receiver has
        shown that it has the message: then it ends at once."""
        if message in self._sending:
            wait, payload, lane = self._sending.pop(message)
            guard(wait, self.program.transfer(message).destination)
            if lane is not None:
                self.release(payload, lane)


def guard(call: Callable[[], T], peer: int) -> T:
    """Translate the library's connection errors at the border."""
    try:
        return call()
    except RuntimeError as error:
        raise PeerLostError(f"connection with rank {peer} is lost ({str(error).splitlines()[0]})") from error
