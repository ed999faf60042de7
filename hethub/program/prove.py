"""Proof that a program is executable: what the compiler promises, checked on the lists themselves."""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from hethub.program.actions import Action, Channel, Program, Transfer, What
from hethub.timeline.record import Kind

__all__ = ["ProgramError", "prove"]

_Work = tuple[Kind, int, int]  # kind, stage, micro-batch


class ProgramError(Exception):
    """A compiled program breaks one of its promises; the text says which and where."""


def prove(program: Program) -> None:
    """Check that

    1. every message is sent once by its source and received once by its destination, and each channel's
       stated order is the order of its sends,
    2. every micro-batch goes forward (and, in training, backward) once on every rank of every stage,
    3. what an action reads is there before it: inputs are received first, results are sent after they are
       made, and reduction, norm, update and gather follow each other,
    4. the program ends: executed with blocking receives, receive buffers of the stated depth posted in the
       sender's order, and tensor-parallel groups that wait for all their members.

    Raises ProgramError with the waiting actions when there is a cycle.
    """
    _prove_messages(program)
    _prove_work(program)
    for device in range(len(program.devices)):
        _prove_data(program, device)
    _prove_progress(program)


def _prove_messages(program: Program) -> None:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    sends: dict[Channel, list[int]] = defaultdict(list)
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind not in (Kind.SEND, Kind.RECEIVE):
                continue
            transfer = program.transfers[program.messages[action.message].transfer]
            (sent if action.kind == Kind.SEND else received)[action.message] += 1
            end = transfer.source if action.kind == Kind.SEND else transfer.destination
            if action.kind == Kind.SEND:
                sends[transfer.source, transfer.destination, transfer.lane].append(action.message)
            if end != device:
                raise ProgramError(f"message {action.message} stands at rank {device}, not at {end}")
    for message in range(len(program.messages)):
        if sent[message] != 1 or received[message] != 1:
            raise ProgramError(
                f"message {message} is sent {sent[message]} and received {received[message]} times"
            )
    # Receives are posted in the stated order and carry no tag, so any other order would swap payloads.
    for channel in sends.keys() | program.order.keys():
        if tuple(sends[channel]) != program.order.get(channel, ()):
            raise ProgramError(
                f"channel {channel[0]} to {channel[1]}: its sends do not stand in the stated order"
            )


def _prove_work(program: Program) -> None:
    done: Counter[tuple[int, Kind, int, int]] = Counter()
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.RECOMPUTE):
                done[device, action.kind, action.stage, action.micro_batch] += 1
    expected = {
        (device, kind, stage.index, micro_batch)
        for pipeline in program.layout.pipelines
        for stage in pipeline.stages
        for device in stage.devices()
        for kind in _kinds(program, stage.recompute)
        for micro_batch in range(pipeline.micro_batches)
    }
    if set(done) != expected or any(count != 1 for count in done.values()):
        odd = sorted((set(done) ^ expected) | {key for key, count in done.items() if count != 1})[0]
        raise ProgramError(
            f"rank {odd[0]}: {odd[1].name} of stage {odd[2]} micro-batch {odd[3]} is not there once"
        )


def _kinds(program: Program, recompute: str) -> tuple[Kind, ...]:
    if not program.training:
        return (Kind.FORWARD,)
    return (
        (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD)
        if recompute == "full"
        else (Kind.FORWARD, Kind.BACKWARD)
    )


# The order of what follows the pipeline on every device; actions of the pipeline itself are phase 0.
_PHASE_OF_KIND = {Kind.REDUCE: 2, Kind.NORM: 3, Kind.UPDATE: 6, Kind.GATHER: 8}
_PHASE_OF_MESSAGE = {What.REDUCE: 1, What.NORM: 4, What.TOTAL: 5, What.WEIGHTS: 7}


def _prove_data(program: Program, device: int) -> None:
    """One device's own order: a list of its messages and work so far decides what may come next."""
    received: set[tuple[int, int]] = set()  # (transfer, micro-batch)
    made: set[_Work] = set()
    again = {action.stage for action in program.devices[device] if action.kind == Kind.RECOMPUTE}
    phase = 0
    for number, action in enumerate(program.devices[device]):
        needs: list[_Work] = []
        now = _PHASE_OF_KIND.get(action.kind, 0)
        if action.message >= 0:
            message = program.messages[action.message]
            transfer = program.transfers[message.transfer]
            now = _PHASE_OF_MESSAGE.get(transfer.what, 0)
            if action.kind == Kind.RECEIVE:
                received.add((message.transfer, message.micro_batch))
            elif now == 0:
                needs.append(_maker(transfer, message.micro_batch))
        elif action.stage >= 0:
            needs = _own_work(action, again) + _inputs(program, device, action, received)
            made.add((action.kind, action.stage, action.micro_batch))
        if now < phase or any(need not in made for need in needs):
            raise ProgramError(
                f"rank {device}: {program.describe(device, number)} comes before what it needs"
            )
        phase = now


def _maker(transfer: Transfer, micro_batch: int) -> _Work:
    """The work that makes what a transfer carries; the transfer's `stage` is the receiving one."""
    if transfer.what == What.ACTIVATION:
        return (Kind.FORWARD, transfer.stage - 1, micro_batch)
    return (Kind.BACKWARD, transfer.stage + 1, micro_batch)


def _own_work(action: Action, again: set[int]) -> list[_Work]:
    """What the stage itself must have done: `again` are the stages that recompute."""
    if action.kind == Kind.FORWARD:
        return []
    before = [Kind.FORWARD]
    if action.kind == Kind.BACKWARD and action.stage in again:
        before.append(Kind.RECOMPUTE)
    return [(kind, action.stage, action.micro_batch) for kind in before]


def _inputs(program: Program, device: int, action: Action, received: set[tuple[int, int]]) -> list[_Work]:
    """This device's own work that makes the action's input; ProgramError where a message has not come."""
    if action.kind == Kind.RECOMPUTE:
        return []  # it reads what the forward kept
    what = What.ACTIVATION if action.kind == Kind.FORWARD else What.GRADIENT
    needs = []
    for number in program.inbound.get((device, action.stage, what), ()):
        transfer = program.transfers[number]
        if transfer.source == device:
            needs.append(_maker(transfer, action.micro_batch))
        elif (number, action.micro_batch) not in received:
            raise ProgramError(
                f"rank {device}: {action.kind.name} of stage {action.stage} micro-batch {action.micro_batch} "
                f"comes before its {what.name.lower()} from rank {transfer.source}"
            )
    return needs


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
        if run.at[device] != start:
            idle = 0
        if run.at[device] < len(program.devices[device]):
            # Devices that ended (a group's last member may end the others) leave without counting as idle.
            idle += 1
            waiting.append(device)
    stuck = sorted(d for d in waiting if run.at[d] < len(program.devices[d]))
    if stuck:
        shown = "; ".join(f"rank {d} waits at {program.describe(d, run.at[d])}" for d in stuck[:6])
        raise ProgramError(f"the program does not end: {shown}")
