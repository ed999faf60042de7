"""The program: one list of actions for every device, read by the simulator and by the workers alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from hethub.cost.compute import ComputePrice
from hethub.program.ownership import Ownership
from hethub.specs.layout import Layout, Span
from hethub.timeline.record import Kind, Lane

__all__ = [
    "CARRIED",
    "SUMS",
    "Action",
    "Channel",
    "Message",
    "Price",
    "Program",
    "ProgramError",
    "Transfer",
    "What",
]


class What(IntEnum):
    """What a transfer carries."""

    ACTIVATION = 0  # a stage's output rows, to the next stage
    GRADIENT = 1  # the gradient of a stage's input rows, to the stage before
    REDUCE = 2  # gradient slices, to their updater
    NORM = 3  # sum of squares and loss of one updater, to the root
    TOTAL = 4  # their totals, from the root
    WEIGHTS = 5  # new weights of slices, to their holders
    RELAY = 6  # new weights of slices, to the member that passes them on inside its island
    REDUCE_SCATTER = 7  # a collective: gradients inside an island, to the members that get their sums
    ALL_GATHER = 8  # a collective: new weights inside an island, to all members


SUMS = frozenset({What.NORM, What.TOTAL})  # a few numbers, which are formed and read in host memory
CARRIED = frozenset({What.WEIGHTS, What.ALL_GATHER})  # received in the step after the one that sent it


class Action(NamedTuple):
    """One entry of a device's list; -1 where a field does not apply. `message` indexes `Program.messages`.

    `part` counts the parts of a stage (`Program.parts`) where an action does only one of them; of REDUCE and UPDATE
    it is the bucket (`Program.buckets`), of GATHER its place in the list.
    """

    kind: Kind
    stage: int
    micro_batch: int
    message: int
    part: int = -1


class Transfer(NamedTuple):
    """A way that messages take every step: a rectangle of `rows` inside the micro-batch x `tokens` of each row, or
    `slices` of the ownership table.

    `stage` is the receiving stage of activations and gradients. A collective has `members` (ascending) instead of
    source and destination, which are -1: each of them sends and receives its one message. `shares` are the slices whose
    sum each member gets, or whose new weights it gives, as many elements as in the longest with padding; `bytes` is
    what a member sends around the ring.
    """

    what: What
    source: int
    destination: int
    lane: Lane
    stage: int
    rows: Span
    tokens: Span
    slices: tuple[int, ...]
    bytes: int
    members: tuple[int, ...] = ()
    shares: tuple[tuple[int, ...], ...] = ()

    @property
    def senders(self) -> tuple[int, ...]:
        """Everyone who must have sent before it can be received."""
        return self.members or (self.source,)

    def share(self, device: int) -> tuple[int, ...]:
        """A member's slices."""
        return self.shares[self.members.index(device)]


class Message(NamedTuple):
    """One use of a transfer within a step."""

    transfer: int
    micro_batch: int


class Price(NamedTuple):
    """Predicted seconds of an action on one device: its whole group's price and its place in the group.

    An action without collectives has a price of its own, whatever group the stage has.
    """

    price: ComputePrice
    member: int

    @property
    def busy_seconds(self) -> float:
        """The device's own compute."""
        return self.price.busy_seconds[self.member]

    @property
    def alone(self) -> bool:
        """Whether the device does the action without its group."""
        return len(self.price.busy_seconds) == 1


Channel = tuple[int, int, Lane]


class ProgramError(Exception):
    """A compiled program breaks one of its promises; the text says which and where."""


@dataclass(frozen=True)
class Program:
    """Everything that one step does, everywhere.

    `devices[d]` is the action list of device d (empty when unused). `groups[d, stage]` is the tensor-parallel
    group that device d computes stage `stage` with, `parts[d, stage]` the layer ranges that the stage is cut into so
    that gradients leave and weights come while others compute. `buckets[d]` are the slices that device d updates, in
    the order of their first use. `prices[d, stage, kind, part]` prices compute; stage -1 for the work after the
    pipeline. `inbound[d, stage, what]` are the transfers that make up a stage's input or output gradient on d, by row
    and token, those from d itself included. `order[channel]` are its messages in the sender's order and
    `depth[channel]` the receive buffers that suffice.

    Steps repeat the lists without a pause: new weights are sent at the end of a step and received by the next one
    (`carried`), before each part of its first forward.
    """

    layout: Layout
    ownership: Ownership
    devices: tuple[tuple[Action, ...], ...]
    transfers: tuple[Transfer, ...]
    messages: tuple[Message, ...]
    groups: Mapping[tuple[int, int], tuple[int, ...]]
    parts: Mapping[tuple[int, int], tuple[Span, ...]]
    buckets: Mapping[int, tuple[tuple[int, ...], ...]]
    prices: Mapping[tuple[int, int, Kind, int], Price]
    inbound: Mapping[tuple[int, int, What], tuple[int, ...]]
    outbound: Mapping[tuple[int, int, What], tuple[int, ...]]
    order: Mapping[Channel, tuple[int, ...]]
    depth: Mapping[Channel, int]
    training: bool

    def transfer(self, message: int) -> Transfer:
        """The way that a message takes."""
        return self.transfers[self.messages[message].transfer]

    def price(self, device: int, action: Action) -> Price:
        """What a compute action costs on a device."""
        return self.prices[device, action.stage, action.kind, action.part]

    def group(self, device: int, action: Action) -> tuple[int, ...]:
        """The devices that a compute action meets with, itself included."""
        if action.stage < 0 or self.price(device, action).alone:
            return (device,)
        return self.groups[device, action.stage]

    def carried(self, action: Action) -> bool:
        """Whether an action takes what the step before sent: the first step of a run leaves it out."""
        if action.kind == Kind.GATHER:
            return True
        return action.kind == Kind.RECEIVE and self.transfer(action.message).what in CARRIED

    def describe(self, device: int, action: int) -> str:
        """An action in words, for errors."""
        entry = self.devices[device][action]
        words = [entry.kind.name.lower().replace("_", "-")]
        if entry.stage >= 0:
            words.append(f"stage {entry.stage}")
        if entry.micro_batch >= 0:
            words.append(f"micro-batch {entry.micro_batch}")
        if entry.part >= 0 and entry.stage >= 0:
            words.append(f"part {entry.part}")
        elif entry.part > 0 or (entry.part == 0 and len(self.buckets.get(device, ())) > 1):
            words.append(f"bucket {entry.part}" if entry.kind != Kind.GATHER else f"{entry.part}")
        if entry.message >= 0:
            transfer = self.transfer(entry.message)
            what = transfer.what.name.lower().replace("_", "-")
            end = "to" if entry.kind == Kind.SEND else "from"
            other = transfer.destination if entry.kind == Kind.SEND else transfer.source
            ranks = ", ".join(map(str, transfer.members))
            words.append(f"{what} {end} {f'ranks {ranks}' if transfer.members else f'rank {other}'}")
        return " ".join(words)
