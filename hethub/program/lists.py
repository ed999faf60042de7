"""The lists of all devices while they are written: actions, prices, and the messages that join them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hethub.cost.compute import ComputeModel, ComputePrice, PricedSegment
from hethub.program.actions import CARRIED, Action, Channel, Message, Price, Transfer, What
from hethub.program.islands import Collective
from hethub.program.ownership import Ownership
from hethub.specs.layout import Layout, Span
from hethub.timeline.record import Kind, Lane

__all__ = ["Lists"]


def _alone(seconds: float) -> Price:
    """An action without collectives."""
    return Price(ComputePrice((PricedSegment((seconds,), 0.0),), seconds, (seconds,)), 0)


class Lists:
    """What is written so far. Whoever adds a transfer adds both of its ends."""

    def __init__(self, layout: Layout, compute: ComputeModel, ownership: Ownership, training: bool) -> None:
        self.layout = layout
        self.compute = compute
        self.ownership = ownership
        self.training = training
        self.actions: list[list[Action]] = [[] for _ in compute.graph.devices]
        self.transfers: list[Transfer] = []
        self.messages: list[Message] = []
        self.prices: dict[tuple[int, int, Kind, int], Price] = {}
        self.unreceived: dict[tuple[int, int], int] = {}  # (transfer, micro-batch) -> message

    def add_transfer(
        self,
        what: What,
        source: int,
        destination: int,
        size: int,
        *,
        stage: int = -1,
        rows: Span = (0, 0),
        tokens: Span = (0, 0),
        slices: tuple[int, ...] = (),
    ) -> int:
        """A way of `size` bytes that messages may take; returns its number."""
        lane = Lane.ACTIVATIONS if what in (What.ACTIVATION, What.GRADIENT) else Lane.PARAMETERS
        self.transfers.append(Transfer(what, source, destination, lane, stage, rows, tokens, slices, size))
        return len(self.transfers) - 1

    def sending(self, transfer: int, micro_batch: int = -1) -> Action:
        """A new message along a transfer."""
        number = len(self.messages)
        self.messages.append(Message(transfer, micro_batch))
        self.unreceived[transfer, micro_batch] = number
        return Action(Kind.SEND, self.transfers[transfer].stage, micro_batch, number)

    def receiving(self, transfer: int, micro_batch: int = -1) -> Action:
        """The other end of a message made by `sending`."""
        number = self.unreceived.pop((transfer, micro_batch))
        return Action(Kind.RECEIVE, self.transfers[transfer].stage, micro_batch, number)

    def add_collective(self, what: What, collective: Collective, element_bytes: int) -> int:
        """A collective's one message. Everyone passes all shares but one on around the ring, each as long as the
        longest."""
        members, shares = collective.members, collective.shares
        longest = max(self.ownership.route_elements(share) for share in shares)
        size = (len(members) - 1) * longest * element_bytes
        slices = tuple(n for share in shares for n in share)
        self.transfers.append(
            Transfer(what, -1, -1, Lane.PARAMETERS, -1, (0, 0), (0, 0), slices, size, members, shares)
        )
        self.messages.append(Message(len(self.transfers) - 1, -1))
        return len(self.messages) - 1

    def send(self, transfer: int, micro_batch: int = -1) -> None:
        """A new message, which leaves now."""
        self.actions[self.transfers[transfer].source].append(self.sending(transfer, micro_batch))

    def receive(self, transfer: int, micro_batch: int = -1) -> None:
        """A message that has been sent is received now."""
        self.actions[self.transfers[transfer].destination].append(self.receiving(transfer, micro_batch))

    def touch(self, device: int, kind: Kind, size: float, part: int = -1) -> Action:
        """An action without a stage, priced by the memory traffic of `size` bytes."""
        seconds = self.compute.touch_seconds(self.compute.graph.devices[device].type, size)
        self.prices[device, -1, kind, part] = _alone(seconds)
        return Action(kind, -1, -1, -1, part)

    def order(self) -> dict[Channel, tuple[int, ...]]:
        """Every channel's messages as its sender's list has them."""
        found: dict[Channel, list[int]] = defaultdict(list)
        ways = self._ways()
        for actions in self.actions:
            for kind, _, _, message, _ in actions:
                if kind == Kind.SEND and not ways[message].members:
                    entry = ways[message]
                    found[entry.source, entry.destination, entry.lane].append(message)
        return {channel: tuple(messages) for channel, messages in found.items()}

    def depths(self, order: dict[Channel, tuple[int, ...]]) -> Iterator[tuple[Channel, int]]:
        """Receives are posted in the sender's order and consumed in any: a buffer is needed for every message
        that is posted before the one waited for and not consumed yet. At least two, so that one can fill
        while the other is read. Gradients to reduce have a buffer each, since their updater looks at the first only
        when its own last backward is done."""
        position = {message: i for messages in order.values() for i, message in enumerate(messages)}
        consumed: dict[Channel, int] = defaultdict(int)
        ways = self._ways()
        need = {
            channel: max(2, sum(ways[m].what == What.REDUCE for m in messages))
            for channel, messages in order.items()
        }
        received = [
            message for actions in self.actions for kind, _, _, message, _ in actions if kind == Kind.RECEIVE
        ]
        # New weights are consumed in the next step, after everything else of theirs.
        for message in sorted(received, key=lambda m: ways[m].what in CARRIED):
            entry = ways[message]
            if entry.members:
                continue
            channel = (entry.source, entry.destination, entry.lane)
            need[channel] = max(need[channel], position[message] + 1 - consumed[channel])
            consumed[channel] += 1
        for channel, messages in order.items():
            yield channel, min(need[channel], len(messages))

    def _ways(self) -> list[Transfer]:
        """Every message's transfer."""
        return [self.transfers[message.transfer] for message in self.messages]
