"""Proof that a program ends: its lists executed without times, under blocking receives."""

from __future__ import annotations

from collections import defaultdict, deque

from hethub.program.actions import Action, Channel, Program, ProgramError
from hethub.timeline.record import Kind

__all__ = ["prove_progress"]

_STEPS = 2  # what the second step needs of the first is all that any step needs of the one before


class _Progress:
    """Executes the lists of two steps without times."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = [0] * len(program.devices)
        self.sent: set[tuple[int, int]] = set()  # (step, message)
        self.consumed: dict[Channel, int] = defaultdict(int)
        self.position = {m: i for messages in program.order.values() for i, m in enumerate(messages)}
        self.meeting: dict[tuple[int, ...], set[int]] = defaultdict(set)
        self.queues: dict[int, deque[tuple[int, int]]] = defaultdict(
            deque
        )  # device -> collectives that it joined
        self.done: set[tuple[int, int]] = set()  # collectives: (step, message)

    def end(self, device: int) -> int:
        return _STEPS * len(self.program.devices[device])

    def action(self, device: int) -> Action:
        actions = self.program.devices[device]
        return actions[self.at[device] % len(actions)]

    def blocked(self, device: int) -> bool:
        """True when the device's next action cannot happen yet."""
        program = self.program
        action = self.action(device)
        step = self.at[device] // len(program.devices[device])
        if program.carried(action) and step == 0:
            return False
        if action.kind == Kind.RECEIVE:
            return not self.takes(action, step - program.carried(action))
        if action.kind == Kind.SEND:
            if program.transfer(action.message).members:
                self.joins(device, (step, action.message))
            else:
                self.sent.add((step, action.message))
        elif len(group := program.group(device, action)) > 1:
            return not self.meets(device, group)
        return False

    def takes(self, action: Action, step: int) -> bool:
        """Consume a message if it was sent and one of the posted buffers has it."""
        transfer = self.program.transfer(action.message)
        if transfer.members:
            return (step, action.message) in self.done
        channel = (transfer.source, transfer.destination, transfer.lane)
        place = step * len(self.program.order[channel]) + self.position[action.message]
        posted = place < self.consumed[channel] + self.program.depth[channel]
        if (step, action.message) not in self.sent or not posted:
            return False
        self.consumed[channel] += 1
        return True

    def joins(self, device: int, collective: tuple[int, int]) -> None:
        """A device works off its collectives one by one: each is done when all its members have come to it."""
        self.queues[device].append(collective)
        heads = [self.queues[device][0]]
        while heads:
            head = heads.pop()
            queues = [self.queues[member] for member in self.program.transfer(head[1]).members]
            if all(queue and queue[0] == head for queue in queues):
                self.done.add(head)
                for queue in queues:
                    queue.popleft()
                heads += [queue[0] for queue in queues if queue]

    def meets(self, device: int, group: tuple[int, ...]) -> bool:
        """The last member to come to a group's action lets all of them pass."""
        here = self.meeting[group]
        here.add(device)
        if len(here) < len(group):
            return False
        entries = {self.action(d) for d in group}
        if len(entries) > 1:
            raise ProgramError(f"ranks {group} meet in different actions: {sorted(entries)}")
        here.clear()
        for member in group:
            if member != device:
                self.at[member] += 1
        return True


def prove_progress(program: Program) -> None:
    """Run two steps of a program as its devices would, in no particular time. Raises ProgramError where they wait for
    each other."""
    run = _Progress(program)
    waiting = deque(d for d, actions in enumerate(program.devices) if actions)
    idle = 0
    while waiting and idle < len(waiting):
        device = waiting.popleft()
        start = run.at[device]
        while run.at[device] < run.end(device) and not run.blocked(device):
            run.at[device] += 1
        if run.at[device] != start:
            idle = 0
        if run.at[device] < run.end(device):
            # Devices that ended (a group's last member may end the others) leave without counting as idle.
            idle += 1
            waiting.append(device)
    stuck = sorted(d for d in waiting if run.at[d] < run.end(d))
    if stuck:
        shown = "; ".join(
            f"rank {d} waits at {program.describe(d, run.at[d] % len(program.devices[d]))}" for d in stuck[:6]
        )
        raise ProgramError(f"the program does not end: {shown}")
