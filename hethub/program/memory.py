"""Peak memory of every device of a program, by walking its action list: real in-flight counts, not declared limits.

The walk follows the steady state, in which a step begins while the new weights of the one before are on their way. What
an action begins and ends to hold is what `hethub/launch/flights.py` and `communicator.py` do:

- a forward holds what autograd keeps and the stage's result until the stage's backward; a stage that recomputes in full
  holds its input only, and its result until the last send of it;
- RECOMPUTE adds what its mode left out; an input backward turns what was kept into the operands of the weights'
  products, beside the stage's input and both its gradients, until the weight part;
- on a host, messages lie in buffers: those that are posted, those that a micro-batch or a reduction still reads, and
  those sent, until something that comes back proves that they have left (`acknowledged`). Activations' are kept and
  used again, sorted by size; parameters' are not. Elsewhere a message takes memory on the device from its receive
  until its last use, and buffers are the host's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.memory import StageBytes, apart_bytes, on_host, rank_shape, stage_bytes
from hethub.cost.shapes import BYTES
from hethub.program.actions import Action, Channel, Program, Transfer, What
from hethub.timeline.record import Kind, Lane

__all__ = ["TRAILER_BYTES", "MemoryPeak", "acknowledged", "opens_parameters", "program_memory"]

TRAILER_BYTES = 8  # of a message over an emulated link: its arrival time
_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeak:
    """Bytes of one device by purpose at its peak, which is in action `action` of its list.

    `stash` are operands of weight gradients still to be taken, `buffers` messages of activations and their gradients,
    `exchange` messages of the parameters' gradients and of new weights. `live_bytes` is the most of all but
    `workspace` at any action: what the runtime's tally counts.
    """

    action: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    stash: int
    buffers: int
    exchange: int
    workspace: int
    live_bytes: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.stash
            + self.buffers
            + self.exchange
            + self.workspace
        )


def program_memory(program: Program, compute: ComputeModel) -> dict[int, MemoryPeak]:
    """The peak of every used device, in the steady state of a run of this program."""
    told = acknowledged(program, program.layout.used)
    return {device: _Walk(program, compute, device, told).peak() for device in program.layout.used}


def acknowledged(program: Program, senders: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """For each message of these devices: the messages of its receiver that the sender had received before it sent, and
    had not told of by an earlier one. So whoever gets the message knows that those have left.

    A part of the norm tells of all messages: those that come later in the list came in the step before. The total tells
    more than any pair can: every device has received what was sent to it before. New weights have nothing left to tell.
    """
    found: dict[int, tuple[int, ...]] = {}
    for sender in senders:
        received: dict[int, list[int]] = defaultdict(list)
        for action in program.devices[sender]:
            if action.message < 0 or program.transfer(action.message).members:
                continue
            if action.kind == Kind.RECEIVE:
                received[program.transfer(action.message).source].append(action.message)
            elif action.kind == Kind.SEND:
                transfer = program.transfer(action.message)
                if transfer.what == What.NORM:
                    channels = ((transfer.destination, sender, lane) for lane in Lane)
                    found[action.message] = tuple(m for c in channels for m in program.order.get(c, ()))
                elif transfer.what != What.WEIGHTS:
                    found[action.message] = tuple(received.pop(transfer.destination, ()))
    return found


def opens_parameters(program: Program, device: int) -> int:
    """The action at which receives of the parameter lane are posted: before the gradients of others can come, not
    earlier, since until then their buffers would only take memory."""
    for number, action in enumerate(program.devices[device]):
        if action.message >= 0:
            lane = program.transfer(action.message).lane
            opens = lane == Lane.PARAMETERS and not program.carried(action)
        else:
            part_of_last = action.part >= 0 and action.kind in _BACKWARDS
            opens = part_of_last or action.kind in (Kind.REDUCE, Kind.NORM)
        if opens:
            return number
    raise AssertionError(f"rank {device} has no work")


# -- what lasts ---------------------------------------------------------------------------------------------------


def _lasting(program: Program, compute: ComputeModel, device: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state; a tied table in two stages of the device is one."""
    precision = compute.workload.precision
    size, wide = BYTES[compute.graph.devices[device].type.dtype_for(precision)], gradient_bytes(precision)
    ownership = program.ownership
    held = ownership.held_elements.get(device, 0)
    optimizer = ownership.owned_elements.get(device, 0) * state_bytes(precision)
    apart = ownership.apart_elements.get(device, 0) * apart_bytes(compute.workload, size)
    return held * size, held * wide, optimizer + apart


# -- what comes and goes ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """One stage on the device: its bytes as a whole and of each part, and whether its input and its output's gradient
    come in one message each, so that they are used where they arrive."""

    whole: StageBytes
    parts: tuple[StageBytes, ...]
    passing: int  # what a micro-batch holds of which nothing else is kept: its input and targets
    mode: str
    alone: bool  # no tensor-parallel group
    in_message: bool
    gradient_in_message: bool

    def of(self, part: int) -> StageBytes:
        """Of a part, or of all."""
        return self.parts[part] if part >= 0 else self.whole


def _places(program: Program, compute: ComputeModel, device: int, on_host: bool) -> dict[int, _Place]:
    def one_message(stage: int, what: What) -> bool:
        numbers = program.inbound.get((device, stage, what), ())
        return on_host and len(numbers) == 1 and program.transfers[numbers[0]].source != device

    found = {}
    for pipeline in program.layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for member, rank in enumerate(replica.ranks):
                    if rank.device != device:
                        continue
                    shape, mode = rank_shape(compute, replica, member), stage.recompute
                    found[stage.index] = _Place(
                        stage_bytes(shape, stage.layers, mode),
                        tuple(stage_bytes(shape, span, mode) for span in program.parts[device, stage.index]),
                        stage_bytes(shape, stage.layers, "full").kept,
                        mode,
                        len(replica.ranks) == 1,
                        one_message(stage.index, What.ACTIVATION),
                        one_message(stage.index, What.GRADIENT),
                    )
    return found


class _Buffers:
    """Message buffers of one lane. Where they are `kept`, one that is free waits for the next message of its size."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept
        self.bytes = 0
        self._free: Counter[int] = Counter()

    def take(self, size: int) -> None:
        """Use a buffer."""
        if self._free[size]:
            self._free[size] -= 1
        else:
            self.bytes += size

    def free(self, size: int) -> None:
        """Give it back."""
        if self.kept:
            self._free[size] += 1
        else:
            self.bytes -= size


class _Inbox:
    """The receiving end of a channel: messages in the sender's order, of which the first `posted` have buffers."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.posted = 0

    def post(self, count: int, buffers: _Buffers) -> None:
        """Post more receives, as far as there are more messages."""
        for size in self.sizes[self.posted : self.posted + count]:
            buffers.take(size)
            self.posted += 1


def _bytes_of(held: tuple[int, ...]) -> int:
    """All that an action holds; its number stands first."""
    return sum(held[1:])


class _Walk:
    """What one device holds, action by action."""

    def __init__(
        self, program: Program, compute: ComputeModel, device: int, told: Mapping[int, tuple[int, ...]]
    ) -> None:
        self.program = program
        self.told = told
        self.device = device
        self.emulated = compute.graph.cluster.emulated_time_scale is not None
        self.on_host = on_host(compute, device)
        self.places = _places(program, compute, device, self.on_host)
        self.lasting = _lasting(program, compute, device)
        self.lanes = {lane: _Buffers(self.on_host and lane == Lane.ACTIVATIONS) for lane in Lane}
        self.inboxes: dict[Channel, _Inbox] = {}
        self.channels = [channel for channel in program.order if channel[1] == device]
        self.leaving: set[int] = set()  # messages on their way out
        self.flights: dict[tuple[int, int], int] = {}  # (stage, micro-batch) -> bytes that it holds
        self.lent: dict[tuple[int, int], list[int]] = {}  # the message buffers that it lies in
        self.arrived: dict[tuple[What, int, int], list[int]] = {}  # buffers of a stage's input or gradient
        self.results: dict[tuple[What, int, int], list[int]] = {}  # [bytes, sends left] that only sends hold
        self.letters: list[int] = []  # buffers of parameter mail
        self.activations = self.stash = self.flowing = 0
        self.stashes: dict[tuple[int, int], int] = {}  # by stage and micro-batch
        self.owes = False
        self.begins: dict[Kind, Callable[[Action], int]] = {
            Kind.FORWARD: self._forward,
            Kind.RECOMPUTE: self._recompute,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.SEND: self._send,
            Kind.RECEIVE: self._receive,
            Kind.NORM: self._read_mail,
        }
        self.ends: dict[Kind, Callable[[Action], int]] = {
            Kind.FORWARD: self._forwarded,
            Kind.BACKWARD: self._backwarded,
            Kind.BACKWARD_INPUT: self._input_backwarded,
            Kind.BACKWARD_WEIGHT: self._weight_backwarded,
            Kind.SEND: self._sent,
            Kind.GATHER: self._read_mail,
        }

    def peak(self) -> MemoryPeak:
        """Of the second step: the first makes the buffers that a run keeps, and owes new weights to the second."""
        self._walk()
        self.owes = self.program.training
        return self._walk()

    def _walk(self) -> MemoryPeak:
        live, best = 0, (-1, 0, 0, 0, 0, 0)
        opening, program = opens_parameters(self.program, self.device), self.program
        self._open(Lane.ACTIVATIONS)
        for number, action in enumerate(program.devices[self.device]):
            if number == opening:
                # Before the action itself: what it receives may tell that older messages have left.
                self._open(Lane.PARAMETERS)
                live, best = max(live, self._live()), max(best, self._now(number, 0), key=_bytes_of)
            if not self.owes and program.carried(action):
                continue
            begin, end = self.begins.get(action.kind), self.ends.get(action.kind)
            workspace = 0 if begin is None else begin(action)
            live, best = max(live, self._live()), max(best, self._now(number, workspace), key=_bytes_of)
            if end is not None:
                end(action)
        weights, gradients, optimizer = self.lasting
        return MemoryPeak(
            action=best[0],
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=best[1],
            stash=best[2],
            buffers=best[3],
            exchange=best[4],
            workspace=best[5],
            live_bytes=weights + gradients + optimizer + live,
        )

    def _now(self, number: int, workspace: int) -> tuple[int, int, int, int, int, int]:
        """The action and what is held in it, by purpose."""
        activations, exchange = self.lanes[Lane.ACTIVATIONS], self.lanes[Lane.PARAMETERS]
        return (number, self.activations, self.stash, activations.bytes, exchange.bytes, workspace)

    def _live(self) -> int:
        return _bytes_of(self._now(0, 0))

    # -- messages ------------------------------------------------------------------------------------------------

    def _size(self, message: int) -> int:
        return self.program.transfer(message).bytes + (TRAILER_BYTES if self.emulated else 0)

    def _open(self, lane: Lane) -> None:
        """Post the first receives of the step."""
        if not self.on_host:
            return
        for channel in self.channels:
            if channel[2] == lane:
                inbox = _Inbox([self._size(message) for message in self.program.order[channel]])
                self.inboxes[channel] = inbox
                inbox.post(self.program.depth[channel], self.lanes[lane])

    def _receive(self, action: Action) -> int:
        transfer, size = self.program.transfer(action.message), self._size(action.message)
        buffers = self.lanes[transfer.lane]
        if transfer.what == What.REDUCE_SCATTER:
            buffers.free(self._joint_bytes(transfer))
            return 0
        if transfer.what == What.ALL_GATHER:
            self.letters.append(self._joint_bytes(transfer))
            return 0
        for message in (
            list(self.leaving) if transfer.what == What.TOTAL else self.told.get(action.message, ())
        ):
            self._left(message)
        if self.on_host:
            self.inboxes[transfer.source, self.device, transfer.lane].post(1, buffers)
        else:
            buffers.take(size)
        if transfer.lane == Lane.ACTIVATIONS:
            key = (transfer.what, action.stage, action.micro_batch)
            self.arrived.setdefault(key, []).append(size)
        elif transfer.what in (What.REDUCE, What.WEIGHTS):
            self.letters.append(size)
        else:
            buffers.free(size)
        return 0

    def _read_mail(self, action: Action) -> int:
        for size in self.letters:
            self.lanes[Lane.PARAMETERS].free(size)
        self.letters.clear()
        return 0

    def _packs(self, transfer: Transfer) -> bool:
        """Whether a message is put together in a buffer, or leaves from where it lies."""
        if transfer.lane == Lane.ACTIVATIONS:
            return self.on_host and self.emulated
        return self.on_host and (self.emulated or len(transfer.slices) > 1)

    def _send(self, action: Action) -> int:
        """On a host a message is on its way until the receiver proves to have it."""
        transfer = self.program.transfer(action.message)
        if transfer.members:
            self.lanes[transfer.lane].take(self._joint_bytes(transfer))
            return 0
        if self.on_host:
            self.leaving.add(action.message)
        if self._packs(transfer):
            self.lanes[transfer.lane].take(self._size(action.message))
        return 0

    def _sent(self, action: Action) -> int:
        """What is not in a buffer of its own is held until it has left."""
        transfer = self.program.transfer(action.message)
        if not transfer.members and (self._packs(transfer) or not self.on_host):
            self._release_result(action.message)
        return 0

    @staticmethod
    def _joint_bytes(transfer: Transfer) -> int:
        """What a collective takes from the join on: every member's padded share, and this one's beside them."""
        others = len(transfer.members) - 1
        return (others + 2) * (transfer.bytes // others)

    def _left(self, message: int) -> None:
        if message in self.leaving:
            self.leaving.remove(message)
            transfer = self.program.transfer(message)
            if self._packs(transfer):
                self.lanes[transfer.lane].free(self._size(message))
            else:
                self._release_result(message)

    def _release_result(self, message: int) -> None:
        """One of the sends of a stage's result less."""
        transfer = self.program.transfer(message)
        if transfer.lane == Lane.ACTIVATIONS:
            step = -1 if transfer.what == What.ACTIVATION else 1
            key = (transfer.what, transfer.stage + step, self.program.messages[message].micro_batch)
            entry = self.results[key]
            entry[1] -= 1
            if not entry[1]:
                self.activations -= self.results.pop(key)[0]

    def _offer(self, what: What, action: Action, size: int) -> None:
        """A result is held until its last send; `size` is 0 where something else holds it longer."""
        numbers = self.program.outbound.get((self.device, action.stage, what), ())
        sends = sum(self.program.transfers[n].destination != self.device for n in numbers)
        if sends:
            self.results[what, action.stage, action.micro_batch] = [size, sends]
            self.activations += size

    def _assemble(self, what: What, action: Action, in_message: bool, size: int) -> int:
        """Bytes of a new tensor that the parts are put into, 0 where the only one is used as it lies."""
        buffers = self.arrived.pop((what, action.stage, action.micro_batch), [])
        if in_message:
            self.lent.setdefault((action.stage, action.micro_batch), []).extend(buffers)
            return 0
        for buffer in buffers:
            self.lanes[Lane.ACTIVATIONS].free(buffer)
        return size

    # -- micro-batches -------------------------------------------------------------------------------------------

    def _hold(self, action: Action, size: int) -> None:
        key = (action.stage, action.micro_batch)
        self.flights[key] = self.flights.get(key, 0) + size
        self.activations += size

    def _land(self, action: Action) -> None:
        key = (action.stage, action.micro_batch)
        self.activations -= self.flights.pop(key)
        for size in self.lent.pop(key, ()):
            self.lanes[Lane.ACTIVATIONS].free(size)

    def _is_last_part(self, action: Action) -> bool:
        return action.part < 0 or action.part == len(self.places[action.stage].parts) - 1

    def _forward(self, action: Action) -> int:
        place = self.places[action.stage]
        found = place.of(action.part)
        if action.part <= 0:
            entry = self._assemble(What.ACTIVATION, action, place.in_message, found.entry)
            self._hold(action, entry - found.entry)
        if self.program.training and place.mode != "full":
            self._hold(action, found.kept + (place.whole.output if self._is_last_part(action) else 0))
        elif action.part <= 0:
            self._hold(action, place.passing)
        return found.forward_workspace

    def _forwarded(self, action: Action) -> int:
        place = self.places[action.stage]
        if self._is_last_part(action):
            lasts = self.program.training and place.mode != "full"
            self._offer(What.ACTIVATION, action, 0 if lasts else place.whole.output)
            if not self.program.training:
                self._land(action)
        return 0

    def _recompute(self, action: Action) -> int:
        """All of it with its result, or the attention cores."""
        place = self.places[action.stage]
        full = place.mode == "full"
        self._hold(action, place.whole.again + (place.whole.output if full else 0))
        return place.whole.forward_workspace if full else 0

    def _backward(self, action: Action) -> int:
        place = self.places[action.stage]
        if self._is_last_part(action) and place.whole.output:
            self._flow(self._assemble(What.GRADIENT, action, place.gradient_in_message, place.whole.output))
        return place.of(action.part).backward_workspace

    def _flow(self, size: int) -> None:
        """A gradient between two pieces of backward takes the place of the one before it."""
        self.activations += size - self.flowing
        self.flowing = size

    def _backwarded(self, action: Action) -> int:
        if action.part > 0:
            self._part_backwarded(action)
            return 0
        self._flow(0)
        self._land(action)
        self._offer(What.GRADIENT, action, self.places[action.stage].whole.entry)
        return 0

    def _part_backwarded(self, action: Action) -> None:
        """The part's input and the targets stay until the micro-batch leaves the stage; the input's gradient goes on to
        the part before."""
        place = self.places[action.stage]
        found = place.of(action.part)
        gone = found.kept + found.again - found.entry
        if self._is_last_part(action):
            gone += place.whole.output - (place.passing - place.whole.entry)
        self._hold(action, -gone)
        self._flow(found.entry)

    def _input_backwarded(self, action: Action) -> int:
        """What was kept becomes operands. The last layer's output gradient is one of them, and of a device alone it is
        what came in, where it lies."""
        place, key = self.places[action.stage], (action.stage, action.micro_batch)
        found = place.of(action.part)
        lies = place.alone and place.gradient_in_message and self._is_last_part(action)
        stash = found.stash - (place.whole.output if lies else 0)
        self.stashes[key] = self.stashes.get(key, 0) + stash
        self.stash += stash
        if action.part > 0:
            self._part_backwarded(action)
            return 0
        self._flow(0)
        # inputs of all parts, the stage's own where it came, and its gradient, which the flight holds until it lands
        inputs = place.passing + (0 if action.part < 0 else sum(part.entry for part in place.parts[1:]))
        inputs -= place.whole.entry if place.in_message else 0
        first = self.program.inbound.get((self.device, action.stage, What.ACTIVATION)) is None
        self._hold(action, inputs + (0 if first else place.whole.entry) - self.flights[key])
        self._offer(What.GRADIENT, action, 0)
        return 0

    def _backward_weight(self, action: Action) -> int:
        return self.places[action.stage].of(action.part).weight_workspace

    def _weight_backwarded(self, action: Action) -> int:
        """A part's operands go with it, the first part's with all that is left."""
        key = (action.stage, action.micro_batch)
        left = self.stashes.pop(key)
        gone = left if action.part <= 0 else min(left, self.places[action.stage].of(action.part).stash)
        self.stash -= gone
        if action.part > 0:
            self.stashes[key] = left - gone
        else:
            self._land(action)
        return 0
