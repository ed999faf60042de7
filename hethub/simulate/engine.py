"""The simulator: discrete events over the very lists that the workers execute.

Each device runs its list in order. Sends cost no compute time: they reserve the cells of their path when
issued (the rule of `cost.graph.reserve`, which emulated links follow too). Receives wait for the arrival. A
tensor-parallel group's action starts when its last member is there. New weights are received in the step after the
one that sent them; the first step has none to receive.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import reserve
from hethub.program.actions import Action, Program, Transfer
from hethub.program.prove import ProgramError
from hethub.timeline.record import COMPUTE_KINDS, RECORD, Kind, Lane, Timeline, TimelineInfo

__all__ = ["Simulation", "simulate"]

_SEND, _RECEIVE = int(Kind.SEND), int(Kind.RECEIVE)
_CARRIED = (_RECEIVE, int(Kind.GATHER))
_FIRST = Lane.ACTIVATIONS  # at one instant
_CHUNK = 1 << 16  # rows that wait as tuples, four times as big as records, before they become an array
_Row = tuple[int, int, int, int, int, int, int, int, int, float, float, float, float, float, float, int]


@dataclass(frozen=True, slots=True)
class Simulation:
    """One simulated step: its seconds and, when asked for, its timeline.

    The timeline's step 0 is the one to look at; where three steps were simulated its neighbours -1 and 1
    stand beside it, since a device that is done early begins the next step.
    """

    step_seconds: float
    timeline: Timeline | None


class _Engine:
    def __init__(
        self, program: Program, compute: ComputeModel, record: bool, steps: int, sub_events: bool
    ) -> None:
        self.program = program
        self.steps = steps
        self.actions = [actions * steps for actions in program.devices]
        self.graph = compute.graph
        self.free_at = [0.0] * compute.graph.cell_count
        self.at = [0] * len(program.devices)
        # Places in the first step's lists that take what a step before would have sent.
        self.absent = [
            {i for i, a in enumerate(actions) if a.kind in _CARRIED and program.carried(a)}
            for actions in program.devices
        ]
        self.sent: dict[int, float] = {}
        self.arrival: dict[int, float] = {}
        self.waiting: dict[int, tuple[int, float]] = {}  # message -> (device, since)
        self.meeting: dict[tuple[int, ...], dict[int, float]] = {}
        self.sub_events = sub_events
        self.rows: list[_Row] | None = [] if record else None
        self.chunks: list[npt.NDArray[np.void]] = []
        self.queue: list[
            tuple[float, Lane, int]
        ] = []  # (time, what the device does then at the earliest, device)
        self.ends = [[0.0] * len(program.devices) for _ in range(steps)]

    def run(self) -> float:
        """Simulate to the end; returns the seconds of the middle step (of the only one)."""
        self.queue = [(0.0, _FIRST, d) for d, actions in enumerate(self.program.devices) if actions]
        heapq.heapify(self.queue)
        while self.queue:
            now, lane, device = heapq.heappop(self.queue)
            self.advance(device, now, lane)
        stuck = [d for d, actions in enumerate(self.actions) if self.at[d] < len(actions)]
        if stuck:
            shown = "; ".join(f"rank {d} at {self.program.describe(d, self._place(d))}" for d in stuck[:6])
            raise ProgramError(f"deadlock: {shown}")
        middle = self.steps // 2
        if self.steps == 1:
            return max(*self.ends[0], *self.arrival.values(), 0.0)
        return max(self.ends[middle]) - max(self.ends[middle - 1])

    def _place(self, device: int) -> int:
        """The index in the device's list of the action that it is at."""
        return self.at[device] % len(self.program.devices[device])

    def _key(self, device: int, action: Action) -> int:
        """A message of the step that the device is in, or of the one before where it is carried over."""
        step = self.at[device] // len(self.program.devices[device])
        if action.kind == _RECEIVE and self.program.carried(action):
            step -= 1
        return step * len(self.program.messages) + action.message

    def _next(self, device: int, now: float) -> None:
        """An action is done."""
        self.at[device] += 1
        if self.at[device] % len(self.program.devices[device]) == 0:
            self.ends[self.at[device] // len(self.program.devices[device]) - 1][device] = now

    def advance(self, device: int, now: float, lane: Lane) -> None:
        """Run a device until it waits or until another device's event comes first.

        At one instant all devices' sends of activations go before anyone's parameters, else one rank's gradients would
        hold up the activations that its neighbours send beside it.
        """
        actions = self.actions[device]
        while True:
            if self.at[device] == len(actions):
                return
            if self.queue and self.queue[0][0] < now:
                heapq.heappush(self.queue, (now, _FIRST, device))
                return
            action = actions[self.at[device]]
            if self.at[device] in self.absent[device]:
                self._next(device, now)
            elif action.kind == _SEND:
                transfer = self.program.transfer(action.message)
                if transfer.lane > lane:
                    heapq.heappush(self.queue, (now, transfer.lane, device))
                    return
                self.send(device, action, transfer, now)
            elif action.kind == _RECEIVE:
                key = self._key(device, action)
                if key not in self.arrival:
                    self.waiting[key] = (device, now)
                    return
                now, lane = self.receive(device, key, now), _FIRST
            else:
                group = self.program.group(device, action)
                if len(group) > 1:
                    self.meet(device, group, now)
                    return
                now, lane = self.work(device, now, now), _FIRST

    def send(self, device: int, action: Action, transfer: Transfer, now: float) -> None:
        path = self.graph.path(device, transfer.destination)
        key = self._key(device, action)
        arrival = self.arrival[key] = reserve(self.free_at, path, transfer.bytes, now)
        self.sent[key] = now
        self.row(device, now, now, 0.0, now)
        self._next(device, now)
        if key in self.waiting:
            receiver, since = self.waiting.pop(key)
            heapq.heappush(self.queue, (max(since, arrival), _FIRST, receiver))
            self.receive(receiver, key, since)

    def receive(self, device: int, key: int, since: float) -> float:
        end = max(since, self.arrival.pop(key))
        self.row(device, since, end, 0.0, self.sent.pop(key))
        self._next(device, end)
        return end

    def work(self, device: int, ready: float, start: float) -> float:
        """The record begins when the device was ready: waiting for other members is exposed communication."""
        price = self.program.price(device, self.actions[device][self.at[device]])
        end = start + price.price.seconds
        self.row(device, ready, end, price.busy_seconds, float("nan"))
        if self.rows is not None and self.sub_events and len(price.price.busy_seconds) > 1:
            self.collectives(device, start)
        self._next(device, end)
        return end

    def meet(self, device: int, group: tuple[int, ...], now: float) -> None:
        here = self.meeting.setdefault(group, {})
        here[device] = now
        if len(here) == len(group):
            start = max(here.values())
            for member in group:
                heapq.heappush(self.queue, (self.work(member, here[member], start), _FIRST, member))
            here.clear()

    def collectives(self, device: int, start: float) -> None:
        """The collectives of a group's action as sub-events, each ending its segment."""
        at = start
        for segment in self.program.price(device, self.actions[device][self.at[device]]).price.segments:
            at += max(segment.member_seconds)
            if segment.collective_seconds:
                self.row(device, at, at + segment.collective_seconds, 0.0, float("nan"), kind=Kind.COLLECTIVE)
            at += segment.collective_seconds

    def row(
        self, device: int, start: float, end: float, busy: float, sent: float, *, kind: Kind | None = None
    ) -> None:
        if self.rows is None:
            return
        action = self.actions[device][self.at[device]]
        step = self.at[device] // len(self.program.devices[device]) - self.steps // 2
        lane = peer = -1
        size = 0
        if action.message >= 0:
            transfer = self.program.transfer(action.message)
            lane, size = int(transfer.lane), transfer.bytes
            peer = transfer.destination if action.kind == Kind.SEND else transfer.source
        shown = action.kind if kind is None else kind
        real = busy if shown in COMPUTE_KINDS else 0.0
        row: _Row = (
            step, device, self._place(device), int(shown), lane, action.stage, action.micro_batch, peer,
            action.message, start, end, busy, sent, real, 0.0, size,
        )  # fmt: skip
        self.rows.append(row)
        if len(self.rows) == _CHUNK:
            self.pack()

    def pack(self) -> None:
        """Turn the rows that wait into records."""
        self.chunks.append(np.array(self.rows, dtype=RECORD))
        self.rows = []

    def records(self) -> npt.NDArray[np.void]:
        """All records, in the order in which the simulator came by them."""
        self.pack()
        return np.concatenate(self.chunks)


def simulate(
    program: Program,
    compute: ComputeModel,
    *,
    record: bool = True,
    steps: int = 1,
    sub_events: bool = True,
) -> Simulation:
    """Predict one step of a program: the middle one of `steps` (1 or 3) that follow without a pause.

    One step alone leaves out what devices that are done early already do for the next, and ends when the
    last new weights have arrived, which following steps hide under their first forwards: it is the longer figure.
    `sub_events` records the collectives inside compute actions too, which are most of the
    records of a big plan and change no share of a summary. Raises ProgramError on a deadlock.
    """
    engine = _Engine(program, compute, record, steps, sub_events)
    seconds = engine.run()
    if engine.rows is None:
        return Simulation(seconds, None)
    devices = compute.graph.devices
    info = TimelineInfo(
        origin="predicted",
        devices=tuple(device.name for device in devices),
        device_types=tuple(device.type.name for device in devices),
        emulated=compute.graph.cluster.emulated_time_scale is not None,
    )
    return Simulation(seconds, Timeline(info, engine.records()))
