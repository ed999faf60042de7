"""Proof that a program is executable: what the compiler promises, checked on the lists themselves."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from hethub.program.actions import Channel, Program
from hethub.timeline.record import Kind

__all__ = ["ProgramError", "prove"]


class ProgramError(Exception):
    """A compiled program breaks one of its promises; the text says which and where."""


def prove(program: Program) -> None:
    """Check that

    1. every message is sent once by its source and received once by its destination,
    2. every micro-batch goes forward (and, in training, backward) once on every rank of every stage,
    3. the program ends: executed with blocking receives, receive buffers of the stated depth posted in the sender's
       order, and tensor-parallel groups that wait for all their members.

    Raises ProgramError with the waiting actions when there is a cycle.
    """
    _prove_messages(program)
    _prove_work(program)
    _prove_progress(program)


def _prove_messages(program: Program) -> None:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind not in (Kind.SEND, Kind.RECEIVE):
                continue
            transfer = program.transfers[program.messages[action.message].transfer]
            (sent if action.kind == Kind.SEND else received)[action.message] += 1
            end = transfer.source if action.kind == Kind.SEND else transfer.destination
            if end != device:
                raise ProgramError(f"message {action.message} stands at rank {device}, not at {end}")
    for message in range(len(program.messages)):
        if sent[message] != 1 or received[message] != 1:
            raise ProgramError(f"message {message} is sent {sent[message]} and received {received[message]} times")


def _prove_work(program: Program) -> None:
    done: Counter[tuple[int, Kind, int, int]] = Counter()
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind in (Kind.FORWARD, Kind.BACKWARD):
                done[device, action.kind, action.stage, action.micro_batch] += 1
    kinds = (Kind.FORWARD, Kind.BACKWARD) if program.training else (Kind.FORWARD,)
    expected = {
        (device, kind, stage.index, micro_batch)
        for pipeline in program.layout.pipelines
        for stage in pipeline.stages
        for device in stage.devices()
        for kind in kinds
        for micro_batch in range(pipeline.micro_batches)
    }
    if set(done) != expected or any(count != 1 for count in done.values()):
        odd = sorted((set(done) ^ expected) | {key for key, count in done.items() if count != 1})[0]
        raise ProgramError(f"rank {odd[0]}: {odd[1].name} of stage {odd[2]} micro-batch {odd[3]} is not there once")


class _Progress:
    """Executes the lists without times."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = [0] * len(program.devices)
        self.sent: set[int] = set()
        self.consumed: dict[Channel, int] = defaultdict(int)
        self.position = {m: i for messages in program.order.values() for i, m in enumerate(messages)}
        self.meeting: dict[tuple[int, ...], set[int]] = defaultdict(set)

    def blocked(self, device: int) -> bool:
        """True when the device's next action cannot happen yet."""
        program = self.program
        action = program.devices[device][self.at[device]]
        if action.kind == Kind.RECEIVE:
            transfer = program.transfers[program.messages[action.message].transfer]
            channel = (transfer.source, transfer.destination, transfer.lane)
            posted = self.position[action.message] < self.consumed[channel] + program.depth[channel]
            if action.message not in self.sent or not posted:
                return True
            self.consumed[channel] += 1
        elif action.kind == Kind.SEND:
            self.sent.add(action.message)
        elif action.stage >= 0:
            group = program.groups[device, action.stage]
            if len(group) > 1:
                return not self.meets(device, group)
        return False

    def meets(self, device: int, group: tuple[int, ...]) -> bool:
        """The last member to come to a group's action lets all of them pass."""
        here = self.meeting[group]
        here.add(device)
        if len(here) < len(group):
            return False
        entries = {self.program.devices[d][self.at[d]] for d in group}
        if len(entries) > 1:
            raise ProgramError(f"ranks {group} meet in different actions: {sorted(entries)}")
        here.clear()
        for member in group:
            if member != device:
                self.at[member] += 1
        return True


def _prove_progress(program: Program) -> None:
    run = _Progress(program)
    waiting = deque(d for d, actions in enumerate(program.devices) if actions)
    idle = 0
    while waiting and idle < len(waiting):
        device = waiting.popleft()
        start = run.at[device]
        while run.at[device] < len(program.devices[device]) and not run.blocked(device):
            run.at[device] += 1
        moved = run.at[device] != start
        idle = 0 if moved else idle + 1
        if run.at[device] < len(program.devices[device]):
            waiting.append(device)
    stuck = [d for d in waiting if run.at[d] < len(program.devices[d])]
    if stuck:
        shown = "; ".join(f"rank {d} waits at {program.describe(d, run.at[d])}" for d in stuck[:6])
        raise ProgramError(f"the program does not end: {shown}")
