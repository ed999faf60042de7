"""Proof that a program is executable: what the compiler promises, checked on the lists themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from hethub.program.actions import CARRIED, Action, Channel, Program, ProgramError, Transfer, What
from hethub.program.exchange import Uses, touches
from hethub.program.progress import prove_progress
from hethub.specs.layout import Span
from hethub.timeline.record import Kind

__all__ = ["ProgramError", "prove"]


def prove(program: Program) -> None:
    """Check that

    1. every message is sent once by its source and received once by its destination, a collective's by all its
       members, and each channel's stated order is the order of its sends,
    2. every micro-batch goes forward (and, in training, backward: whole, or first its input and then its weight
       part) once on every rank of every stage, in one action or in one for each part of the stage,
    3. what an action reads is there before it: inputs are received first, results are sent after they are made,
       gradients leave when they are complete, weights are there before their first use, and reduction, norm,
       update follow each other,
    4. every holder's gradient reaches the updater once and every new weight its holders, directly or through one
       member of an island that passes it on,
    5. the program ends, step after step: executed with blocking receives, receive buffers of the stated depth
       posted in the sender's order, tensor-parallel groups that wait for all their members, and devices that work off
       one collective after the other in the order in which they joined them.

    Raises ProgramError with the waiting actions when there is a cycle.
    """
    _prove_messages(program)
    _prove_collectives(program)
    _prove_work(program)
    _prove_routes(program)
    incoming: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for number, transfer in enumerate(program.transfers):
        if transfer.what == What.REDUCE:
            incoming[transfer.destination].append((number, transfer.slices))
        elif transfer.what == What.REDUCE_SCATTER:
            for member, share in zip(transfer.members, transfer.shares, strict=True):
                incoming[member].append((number, share))
    spans: dict[int, dict[int, tuple[Span, ...]]] = defaultdict(dict)
    for (device, stage), parts in program.parts.items():
        spans[device][stage] = parts
    numbers = {parameter.name: n for n, parameter in enumerate(program.ownership.parameters)}
    for device in program.layout.used:
        uses = touches(program.layout, spans[device], program.devices[device], numbers)
        _DeviceProof(program, device, uses, incoming[device]).run()
    prove_progress(program)


def _prove_messages(program: Program) -> None:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    sends: dict[Channel, list[int]] = defaultdict(list)
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind not in (Kind.SEND, Kind.RECEIVE):
                continue
            transfer = program.transfer(action.message)
            if transfer.members:
                continue
            (sent if action.kind == Kind.SEND else received)[action.message] += 1
            end = transfer.source if action.kind == Kind.SEND else transfer.destination
            if action.kind == Kind.SEND:
                sends[transfer.source, transfer.destination, transfer.lane].append(action.message)
            if end != device:
                raise ProgramError(f"message {action.message} stands at rank {device}, not at {end}")
    for message in range(len(program.messages)):
        if not program.transfer(message).members and (sent[message] != 1 or received[message] != 1):
            raise ProgramError(
                f"message {message} is sent {sent[message]} and received {received[message]} times"
            )
    # Receives are posted in the stated order and carry no tag, so any other order would swap payloads.
    for channel in sends.keys() | program.order.keys():
        if tuple(sends[channel]) != program.order.get(channel, ()):
            raise ProgramError(
                f"channel {channel[0]} to {channel[1]}: its sends do not stand in the stated order"
            )


def _prove_collectives(program: Program) -> None:
    found = Counter(
        (action.message, device, action.kind)
        for device, actions in enumerate(program.devices)
        for action in actions
        if action.message >= 0 and program.transfer(action.message).members
    )
    wanted = {
        (message, device, kind)
        for message in range(len(program.messages))
        for device in program.transfer(message).members
        for kind in (Kind.SEND, Kind.RECEIVE)
    }
    if found.keys() != wanted or any(count != 1 for count in found.values()):
        odd = sorted((found.keys() ^ wanted) | {key for key, count in found.items() if count != 1})[0]
        raise ProgramError(f"rank {odd[1]} does not {odd[2].name.lower()} collective {odd[0]} once")


def _prove_work(program: Program) -> None:
    """Counts shares of work: a whole action is all parts of its stage."""
    done: Counter[tuple[int, Kind, int, int, int]] = Counter()
    for device, actions in enumerate(program.devices):
        for action in actions:
            if action.kind in _WORK:
                for part in _parts_of(program, device, action):
                    done[device, action.kind, action.stage, action.micro_batch, part] += 1
    split = {(d, stage, m) for d, kind, stage, m, _ in done if kind == Kind.BACKWARD_INPUT}
    expected = {
        (device, kind, stage.index, micro_batch, part)
        for pipeline in program.layout.pipelines
        for stage in pipeline.stages
        for device in stage.devices()
        for micro_batch in range(pipeline.micro_batches)
        for kind in _kinds(program, stage.recompute, (device, stage.index, micro_batch) in split)
        for part in range(len(program.parts[device, stage.index]))
    }
    if set(done) != expected or any(count != 1 for count in done.values()):
        odd = sorted((set(done) ^ expected) | {key for key, count in done.items() if count != 1})[0]
        raise ProgramError(
            f"rank {odd[0]}: {odd[1].name} of stage {odd[2]} micro-batch {odd[3]} is not there once"
        )


_WORK = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.RECOMPUTE)


def _parts_of(program: Program, device: int, action: Action) -> range:
    if action.part >= 0:
        return range(action.part, action.part + 1)
    return range(len(program.parts[device, action.stage]))


def _kinds(program: Program, recompute: str, split: bool) -> tuple[Kind, ...]:
    if not program.training:
        return (Kind.FORWARD,)
    backward = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) if split else (Kind.BACKWARD,)
    return (Kind.FORWARD, *((Kind.RECOMPUTE,) if recompute != "none" else ()), *backward)


def _prove_routes(program: Program) -> None:
    """Whatever the way, each holder but the updater has one neighbour in it, towards the updater, at most two of them
    away: a message's other end, which is the updater, or the member of a collective in whose share the slice is."""
    if not program.training:
        return
    for direct, collective in (
        ((What.REDUCE,), What.REDUCE_SCATTER),
        ((What.WEIGHTS, What.RELAY), What.ALL_GATHER),
    ):
        towards: dict[tuple[int, int], int] = {}  # (slice, holder) -> neighbour
        for message in program.messages:
            transfer = program.transfers[message.transfer]
            if transfer.what in direct:
                ends = (transfer.source, transfer.destination)
                holder, updater = ends if transfer.what == What.REDUCE else ends[::-1]
                ways = [(n, holder, updater) for n in transfer.slices]
                if any(program.ownership.slices[n].updater != updater for n in transfer.slices):
                    _fail_route(transfer.what, *ways[0])
            elif transfer.what == collective:
                ways = [
                    (n, member, owner)
                    for owner, share in zip(transfer.members, transfer.shares, strict=True)
                    for n in share
                    for member in transfer.members
                    if member != owner
                ]
            else:
                continue
            for number, holder, neighbour in ways:
                if (number, holder) in towards:
                    _fail_route(transfer.what, number, holder, neighbour)
                towards[number, holder] = neighbour
        _prove_reach(program, direct[0], towards)


def _fail_route(what: What, number: int, holder: int, neighbour: int) -> NoReturn:
    name = what.name.lower().replace("_", "-")
    raise ProgramError(f"{name} between ranks {holder} and {neighbour}: slice {number} does not travel once")


def _prove_reach(program: Program, what: What, towards: Mapping[tuple[int, int], int]) -> None:
    """Every holder reaches the updater, and nobody else takes part."""
    reached = 0
    for number, entry in enumerate(program.ownership.slices):
        for holder in entry.holders:
            if holder != entry.updater:
                neighbour = towards.get((number, holder), -1)
                if entry.updater not in (neighbour, towards.get((number, neighbour), -1)):
                    _fail_route(what, number, holder, entry.updater)
                reached += 1
    if reached != len(towards):
        slices = program.ownership.slices
        odd = next(
            (n, d, to)
            for (n, d), to in towards.items()
            if d == slices[n].updater or d not in slices[n].holders
        )
        _fail_route(what, *odd)


# The order of what follows the pipeline on every device; all before it is phase 0.
_PHASE_OF_KIND = {Kind.REDUCE: 2, Kind.NORM: 3, Kind.UPDATE: 6}
_PHASE_OF_MESSAGE = {What.NORM: 4, What.TOTAL: 5, What.RELAY: 6}


class _DeviceProof:
    """One device's own order: its messages and work so far decide what may come next."""

    def __init__(
        self, program: Program, device: int, uses: Uses, incoming: Sequence[tuple[int, tuple[int, ...]]]
    ) -> None:
        """`incoming` are the transfers (by number) that bring it others' gradients, with their slices."""
        self.program = program
        self.device = device
        self.received: set[tuple[int, int]] = set()  # (transfer, micro-batch)
        self.joined: set[int] = set()  # collectives (transfers)
        self.made: set[tuple[Kind, int, int, int]] = set()  # kind, stage, micro-batch, part
        self.updated: set[int] = set()  # slices with new weights: its own, and what it is to pass on
        self.mailed: set[int] = set()  # slices whose new weights have been received and not put into place
        self.first, self.last = uses.first, uses.last
        self.again = {a.stage for a in program.devices[device] if a.kind == Kind.RECOMPUTE}
        self.incoming = incoming
        self.sums: dict[int, int] = {}  # slice -> the collective that adds it up here
        for number, slices in incoming:
            if program.transfers[number].members:
                self.sums.update(dict.fromkeys(slices, number))
        self.phase = 0
        self.number = -1

    def fail(self) -> NoReturn:
        raise ProgramError(
            f"rank {self.device}: {self.program.describe(self.device, self.number)} comes before what it needs"
        )

    def run(self) -> None:
        for number, action in enumerate(self.program.devices[self.device]):
            self.number = number
            if action.kind == Kind.SEND:
                self.send(action)
            elif action.kind == Kind.RECEIVE:
                self.receive(action)
            elif action.stage >= 0:
                self.work(action)
            else:
                self.after(action)
        if self.mailed:
            self.fail()

    def enter(self, phase: int) -> None:
        if phase < self.phase:
            self.fail()
        self.phase = phase

    def send(self, action: Action) -> None:
        transfer = self.program.transfer(action.message)
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            if not self.has(*_makers(self.program, transfer), action.micro_batch):
                self.fail()
        elif transfer.what in (What.REDUCE, What.REDUCE_SCATTER):
            if any(self.last[self.parameter(n)] > self.number for n in transfer.slices):
                self.fail()
            number = self.program.messages[action.message].transfer
            self.joined.add(number)
            if not self.has_all({self.sums[n] for n in transfer.slices if n in self.sums} - {number}):
                self.fail()
        elif transfer.what in (What.WEIGHTS, What.RELAY, What.ALL_GATHER):
            given = transfer.share(self.device) if transfer.members else transfer.slices
            if any(n not in self.updated for n in given):
                self.fail()
        else:
            self.enter(_PHASE_OF_MESSAGE[transfer.what])

    def receive(self, action: Action) -> None:
        number = self.program.messages[action.message].transfer
        transfer = self.program.transfers[number]
        self.received.add((number, action.micro_batch))
        if transfer.what in CARRIED:
            self.mailed.update(transfer.slices)
            if any(self.first[self.parameter(n)] < self.number for n in transfer.slices):
                self.fail()
        elif transfer.what == What.REDUCE_SCATTER:
            if number not in self.joined:
                self.fail()
        elif transfer.what in _PHASE_OF_MESSAGE:
            self.enter(_PHASE_OF_MESSAGE[transfer.what])
            if transfer.what == What.RELAY:
                self.updated.update(transfer.slices)

    def has_all(self, transfers: Iterable[int]) -> bool:
        """Whether they have all been received."""
        return all((number, -1) in self.received for number in transfers)

    def parameter(self, entry: int) -> int:
        return self.program.ownership.slices[entry].parameter

    def has(self, kinds: tuple[Kind, ...], stage: int, micro_batch: int) -> bool:
        """Whether all parts of one of these kinds of work are done."""
        parts = range(len(self.program.parts[self.device, stage]))
        return any(all((kind, stage, micro_batch, part) in self.made for part in parts) for kind in kinds)

    def work(self, action: Action) -> None:
        program, kind, stage, micro_batch = self.program, action.kind, action.stage, action.micro_batch
        if self.phase or (kind == Kind.FORWARD and self.mailed and self._reads_mail(action)):
            self.fail()
        if kind != Kind.FORWARD and not self.has((Kind.FORWARD,), stage, micro_batch):
            self.fail()
        if kind == Kind.BACKWARD_WEIGHT and not self.has((Kind.BACKWARD_INPUT,), stage, micro_batch):
            self.fail()
        reads_kept = kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        if reads_kept and stage in self.again and not self.has((Kind.RECOMPUTE,), stage, micro_batch):
            self.fail()
        if kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT):
            self.inputs(action)
        for part in _parts_of(program, self.device, action):
            forward = kind in (Kind.FORWARD, Kind.RECOMPUTE)
            count = len(program.parts[self.device, stage])
            before = part - 1 if forward else part + 1
            chained = kind != Kind.BACKWARD_WEIGHT and 0 <= before < count
            if chained and (kind, stage, micro_batch, before) not in self.made and action.part >= 0:
                self.fail()
            self.made.add((kind, stage, micro_batch, part))

    def _reads_mail(self, action: Action) -> bool:
        parts = self.program.parts[self.device, action.stage]
        spans = [parts[part] for part in _parts_of(self.program, self.device, action)]
        read = {
            layer
            for n in self.mailed
            for layer in self.program.ownership.parameters[self.parameter(n)].layers
        }
        return any(start <= layer < stop for start, stop in spans for layer in read)

    def inputs(self, action: Action) -> None:
        """The action's input has been received, or made by this device."""
        what = What.ACTIVATION if action.kind == Kind.FORWARD else What.GRADIENT
        for number in self.program.inbound.get((self.device, action.stage, what), ()):
            transfer = self.program.transfers[number]
            if transfer.source == self.device:
                if not self.has(*_makers(self.program, transfer), action.micro_batch):
                    self.fail()
            elif (number, action.micro_batch) not in self.received:
                raise ProgramError(
                    f"rank {self.device}: {action.kind.name} of stage {action.stage} micro-batch "
                    f"{action.micro_batch} comes before its {what.name.lower()} from rank {transfer.source}"
                )

    def after(self, action: Action) -> None:
        program = self.program
        if action.kind == Kind.GATHER:
            self.mailed.clear()
            return
        self.enter(_PHASE_OF_KIND[action.kind])
        if action.kind == Kind.REDUCE:
            bucket = set(program.buckets[self.device][action.part])
            if not self.has_all(n for n, slices in self.incoming if not bucket.isdisjoint(slices)):
                self.fail()
        elif action.kind == Kind.NORM:
            if not self.has_all(n for n, _ in self.incoming):
                self.fail()
        elif action.kind == Kind.UPDATE and action.part >= 0:
            self.updated.update(program.buckets[self.device][action.part])


def _makers(program: Program, transfer: Transfer) -> tuple[tuple[Kind, ...], int]:
    """The kinds of work that make what a transfer carries, and their stage; its own `stage` is the receiving one."""
    if transfer.what == What.ACTIVATION:
        return (Kind.FORWARD,), transfer.stage - 1
    return (Kind.BACKWARD, Kind.BACKWARD_INPUT), transfer.stage + 1
