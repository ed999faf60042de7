"""Who is stuck: read from the beacons of all workers, by the waits that the program implies.

A device that waits for another is not stuck: a receive waits for its sender until that has sent, a group's action for
the member that is not there yet. Following these waits from a device that makes no progress leads to the one that
keeps the others. Only that one's stay in its action is held against a limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from hethub.launch.beacon import Beacon
from hethub.program.actions import Action, Program
from hethub.simulate.course import STALL_LEAST_SECONDS, stall_limit_seconds
from hethub.timeline.record import Kind

__all__ = ["Stall", "StallWatch", "where"]

Place = tuple[int, int]
"""(step, action) of a device; the action is the length of its list when the step is done."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A device that keeps the job: for `seconds` in an action of `predicted_seconds` (wall).

    `members` are those of its group if all have met in the action: then any of them may be the one.
    """

    device: int
    seconds: float
    predicted_seconds: float
    waiting: tuple[int, ...]
    members: tuple[int, ...]


def where(program: Program, device: int, place: Place) -> str:
    """A device's place in words, for errors."""
    step, action = place
    if step < 0:
        return "before its first action"
    if action >= len(program.devices[device]):
        return f"step {step}, after its last action"
    return f"step {step}, {program.describe(device, action)}"


class StallWatch:
    """Looks at the beacons of a program's devices again and again and tells when one keeps the job.

    `predicted_seconds(device, action)` are wall seconds. Predictions of real devices may be far off, so there the
    longest stay seen in any action counts as well.
    """

    def __init__(
        self,
        program: Program,
        beacon: Beacon,
        predicted_seconds: Callable[[int, int], float],
        *,
        emulated: bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self._beacon = beacon
        self._predicted = predicted_seconds
        self._emulated = emulated
        self._now = now
        self._since: dict[int, tuple[Place, float]] = {}
        self._longest = 0.0
        self._numbers: list[dict[Action, int]] = [
            {action: number for number, action in enumerate(actions)} for actions in program.devices
        ]
        self._sends = {  # by message and sender
            (action.message, device): number
            for device, actions in enumerate(program.devices)
            for number, action in enumerate(actions)
            if action.kind == Kind.SEND
        }

    def look(self, pending: Collection[int]) -> Stall | None:
        """The device that keeps those of `pending` (who have not finished), when one does for too long."""
        now = self._now()
        for device in self._program.layout.used:
            self._follow(device, now)
        roots: dict[int, list[int]] = {}
        for device in pending:
            if device in self._since and now - self._since[device][1] > STALL_LEAST_SECONDS:
                roots.setdefault(self._root(device), []).append(device)
        for root, behind in sorted(roots.items()):
            place, since = self._since[root]
            if now - since > self._limit(root, place):
                waiting = tuple(device for device in behind if device != root)
                return Stall(root, now - since, self._seconds(root, place), waiting, self._met(root))
        return None

    def _follow(self, device: int, now: float) -> None:
        place = self._beacon.get(device)
        known, since = self._since.get(device, (place, now))
        if known != place:
            if (
                0 <= known[1] < len(self._program.devices[device])
                and self._kind(device, known) != Kind.RECEIVE
            ):
                self._longest = max(self._longest, now - since)
            since = now
        self._since[device] = (place, since)

    def _kind(self, device: int, place: Place) -> Kind:
        return self._program.devices[device][place[1]].kind

    def _inside(self, device: int, place: Place) -> bool:
        return 0 <= place[1] < len(self._program.devices[device])

    def _seconds(self, device: int, place: Place) -> float:
        return self._predicted(device, place[1]) if self._inside(device, place) else 0.0

    def _limit(self, device: int, place: Place) -> float:
        seconds = self._seconds(device, place)
        if not self._inside(device, place) or (not self._emulated and place[0] <= 0):
            return stall_limit_seconds(seconds, outside=True)
        return stall_limit_seconds(max(seconds, 0.0 if self._emulated else self._longest))

    def _root(self, device: int) -> int:
        """The device at the end of the waits that begin here."""
        seen = {device}
        while True:
            other = self._waits_for(device)
            if other is None or other in seen:
                return device
            seen.add(other)
            device = other

    def _waits_for(self, device: int) -> int | None:
        place = self._since[device][0]
        if not self._inside(device, place):
            return None
        action = self._program.devices[device][place[1]]
        if action.kind == Kind.RECEIVE:
            step = place[0] - self._program.carried(action)  # new weights were sent in the step before
            for source in self._program.transfer(action.message).senders:
                if self._since[source][0] <= (step, self._sends[action.message, source]):
                    return source
            return None
        for member in self._members(device, action):
            if self._since[member][0] < (place[0], self._numbers[member][action]):
                return member
        return None

    def _members(self, device: int, action: Action) -> tuple[int, ...]:
        """Who runs an action together with a device, itself included."""
        alone = action.kind in (Kind.SEND, Kind.RECEIVE)
        return (device,) if alone else self._program.group(device, action)

    def _met(self, device: int) -> tuple[int, ...]:
        place = self._since[device][0]
        if not self._inside(device, place):
            return ()
        members = self._members(device, self._program.devices[device][place[1]])
        return members if len(members) > 1 else ()
