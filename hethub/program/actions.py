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

__all__ = ["Action", "Channel", "Message", "Price", "Program", "Transfer", "What"]


class What(IntEnum):
    """What a transfer carries."""

    ACTIVATION = 0  # a stage's output rows, to the next stage
    GRADIENT = 1  # the gradient of a stage's input rows, to the stage before
    REDUCE = 2  # gradient slices, to their updater
    NORM = 3  # sum of squares and loss of one updater, to the root
    TOTAL = 4  # their totals, from the root
    WEIGHTS = 5  # new weights of slices, to their holders


class Action(NamedTuple):
    """One entry of a device's list; -1 where a field does not apply. `message` indexes `Program.messages`."""

    kind: Kind
    stage: int
    micro_batch: int
    message: int


class Transfer(NamedTuple):
    """A way that messages take every step: `rows` inside the micro-batch, or `slices` of the ownership table.

    `stage` is the receiving stage of activations and gradients.
    """

    what: What
    source: int
    destination: int
    lane: Lane
    stage: int
    rows: Span
    slices: tuple[int, ...]
    bytes: int


class Message(NamedTuple):
    """One use of a transfer within a step."""

    transfer: int
    micro_batch: int


class Price(NamedTuple):
    """Predicted seconds of an action on one device: its whole group's price and its place in the group."""

    price: ComputePrice
    member: int

    @property
    def busy_seconds(self) -> float:
        """The device's own compute."""
        return self.price.busy_seconds[self.member]


Channel = tuple[int, int, Lane]


@dataclass(frozen=True)
class Program:
    """Everything that one step does, everywhere.

    `devices[d]` is the action list of device d (empty when unused). `groups[d, stage]` is the tensor-parallel
    group that device d computes stage `stage` with. `prices[d, stage, kind]` prices compute; stage -1 for the
    work after the pipeline. `inbound[d, stage, what]` are the transfers that make up a stage's input or
    output gradient on d, in row order, those from d itself included. `order[channel]` are its messages in the
    sender's order and `depth[channel]` the receive buffers that suffice.
    """

    layout: Layout
    ownership: Ownership
    devices: tuple[tuple[Action, ...], ...]
    transfers: tuple[Transfer, ...]
    messages: tuple[Message, ...]
    groups: Mapping[tuple[int, int], tuple[int, ...]]
    prices: Mapping[tuple[int, int, Kind], Price]
    inbound: Mapping[tuple[int, int, What], tuple[int, ...]]
    outbound: Mapping[tuple[int, int, What], tuple[int, ...]]
    order: Mapping[Channel, tuple[int, ...]]
    depth: Mapping[Channel, int]
    training: bool

    def describe(self, device: int, action: int) -> str:
        """An action in words, for errors."""
        entry = self.devices[device][action]
        words = [entry.kind.name.lower()]
        if entry.stage >= 0:
            words.append(f"stage {entry.stage}")
        if entry.micro_batch >= 0:
            words.append(f"micro-batch {entry.micro_batch}")
        if entry.message >= 0:
            transfer = self.transfers[self.messages[entry.message].transfer]
            other = transfer.destination if entry.kind == Kind.SEND else transfer.source
            words.append(
                f"{transfer.what.name.lower()} {'to' if entry.kind == Kind.SEND else 'from'} rank {other}"
            )
        return " ".join(words)
