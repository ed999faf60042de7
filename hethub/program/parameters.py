"""What the lists do with parameters: gradients to their updaters, norm and update, new weights to their holders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.shapes import BYTES
from hethub.program.actions import Action, What
from hethub.program.exchange import Exchange, Gathering, WeightSend
from hethub.program.lists import Lists
from hethub.program.ownership import Ownership
from hethub.specs.layout import Layout
from hethub.timeline.record import Kind

__all__ = ["ParameterLists"]

_SCALARS_BYTES = 16  # sum of squares and loss, fp64 each


class _Awaited(NamedTuple):
    """New weights that a device receives before their first use: `bytes` of them are put into place."""

    first_use: Action
    receive: Action
    bytes: int


class ParameterLists(Lists):
    """Around and after the pipelines, as an exchange says. `buckets[d]` are the slices that device d updates."""

    def __init__(self, layout: Layout, compute: ComputeModel, ownership: Ownership, training: bool) -> None:
        super().__init__(layout, compute, ownership, training)
        self.buckets: dict[int, tuple[tuple[int, ...], ...]] = {}

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one element of a weight on the wire."""
        precision = self.compute.workload.precision
        types = [self.compute.graph.devices[d].type for d in self.layout.used]
        return min(BYTES[t.dtype_for(precision)] for t in types)

    def reduce(self, exchange: Exchange) -> None:
        """Gradients leave as soon as a part of the last backward has completed them; their updaters add them up."""
        width = gradient_bytes(self.compute.workload.precision)
        elements = self.ownership.route_elements
        inserted: dict[int, list[tuple[Action, Action]]] = defaultdict(list)
        sums: dict[int, list[int]] = defaultdict(list)  # collective -> the sends of its members that relay
        number: dict[int, int] = {}
        for n, send in enumerate(exchange.gradients):
            number[n] = self.add_transfer(
                What.REDUCE, send.source, send.destination, elements(send.slices) * width, slices=send.slices
            )
            if send.behind is None:
                sums[send.reduced].append(number[n])
            else:
                inserted[send.source].append((send.behind, self.sending(number[n])))
        messages = [self.add_collective(What.REDUCE_SCATTER, r.collective, width) for r in exchange.reducing]
        for (collective, behind), message in zip(exchange.reducing, messages, strict=True):
            for device, action in zip(collective.members, behind, strict=True):
                inserted[device].append((action, Action(Kind.SEND, -1, -1, message)))
        for device, entries in inserted.items():
            self.actions[device] = _insert(self.actions[device], entries, before=False)
        for place, message in enumerate(messages):
            for device in exchange.reducing[place].collective.members:
                self.actions[device].append(Action(Kind.RECEIVE, -1, -1, message))
            for transfer in sums[place]:
                self.send(transfer)
        for device in self.layout.used:
            for wait in exchange.reductions.get(device, ()):
                for n in wait.needs:
                    self.receive(number[n])
                # each incoming slice is read and added into the device's own
                size = 3 * elements(wait.slices) * width
                self.actions[device].append(self.touch(device, Kind.REDUCE, size, wait.bucket))

    def norm(self) -> None:
        """Everyone's squares to the root, their total back; in evaluation the loss alone, to the root."""
        root, *others = self.layout.used
        width = gradient_bytes(self.compute.workload.precision)
        for device in self.layout.used:
            owned = self.ownership.owned_elements.get(device, 0)
            self.actions[device].append(self.touch(device, Kind.NORM, owned * width if self.training else 0))
        up = [self.add_transfer(What.NORM, d, root, _SCALARS_BYTES) for d in others]
        for transfer in up:
            self.send(transfer)
        for transfer in up:
            self.receive(transfer)
        if self.training:
            down = [self.add_transfer(What.TOTAL, root, d, _SCALARS_BYTES) for d in others]
            for transfer in down:
                self.send(transfer)
            for transfer in down:
                self.receive(transfer)

    def update(self, exchange: Exchange) -> None:
        """Bucket by bucket in the order of first use; each leaves for its holders at once. What the step before sent
        is received before the first forward that uses it."""
        waiting: dict[int, list[_Awaited]] = defaultdict(list)  # by holder
        relayed: dict[tuple[int, int], int] = {}  # (relay, slice) -> the transfer that brings it
        gathers = [
            (g, self.add_collective(What.ALL_GATHER, g.collective, self.weight_bytes))
            for g in exchange.gathering
        ]
        joins = _joins(gathers)
        for device in self.layout.used:
            sends = exchange.weights.get(device, ())
            buckets = self.buckets.get(device, ())
            leaving: dict[int, list[WeightSend]] = defaultdict(list)
            for send in sends:
                leaving[send.bucket].append(send)
            for bucket in range(len(buckets)) or (-1,):  # -1: nothing to update, gradients to clear
                self.actions[device].append(self.update_bucket(device, bucket, len(buckets)))
                for send in leaving[bucket]:
                    size = self.ownership.route_elements(send.slices) * self.weight_bytes
                    what = What.RELAY if send.first_use is None else What.WEIGHTS
                    transfer = self.add_transfer(what, device, send.destination, size, slices=send.slices)
                    self.send(transfer)
                    if send.first_use is None:
                        relayed.update({(send.destination, n): transfer for n in send.slices})
                    else:
                        entry = _Awaited(send.first_use, self.receiving(transfer), size)
                        waiting[send.destination].append(entry)
                self.actions[device] += joins[device].pop(max(bucket, 0), ())
        for gathering, message in gathers:
            self.spread(gathering, message, relayed, waiting)
        for device, entries in waiting.items():
            self.gather(device, entries)

    def spread(
        self,
        gathering: Gathering,
        message: int,
        relayed: dict[tuple[int, int], int],
        waiting: dict[int, list[_Awaited]],
    ) -> None:
        """The receiving ends of an all-gather, and where it is relayed all of it: behind the updates, once its relays
        have what they pass on."""
        members, shares, _ = gathering.collective
        elements = self.ownership.route_elements
        whole = sum(elements(share) for share in shares)
        for device, share, first_use in zip(members, shares, gathering.first_use, strict=True):
            if gathering.relayed:
                for transfer in dict.fromkeys(relayed[device, n] for n in share if (device, n) in relayed):
                    if (transfer, -1) in self.unreceived:  # an earlier one may have needed it
                        self.receive(transfer)
                self.actions[device].append(Action(Kind.SEND, -1, -1, message))
            size = (whole - elements(share)) * self.weight_bytes
            waiting[device].append(_Awaited(first_use, Action(Kind.RECEIVE, -1, -1, message), size))

    def update_bucket(self, device: int, bucket: int, buckets: int) -> Action:
        """Read gradient; read and write master and moments; write the weight. The last bucket's action also clears the
        gradients of all that the device holds."""
        precision = self.compute.workload.precision
        slices = self.buckets[device][bucket] if buckets else ()
        width = gradient_bytes(precision)
        size = BYTES[self.compute.graph.devices[device].type.dtype_for(precision)]
        each = width + 2 * state_bytes(precision) + 2 * size
        cleared = self.ownership.held_elements.get(device, 0) if bucket == buckets - 1 else 0
        return self.touch(
            device,
            Kind.UPDATE,
            self.ownership.route_elements(slices) * each + cleared * width,
            bucket if buckets else -1,
        )

    def gather(self, device: int, entries: list[_Awaited]) -> None:
        """Receive new weights before their first use, and put them into place."""
        by_use: dict[Action, list[_Awaited]] = defaultdict(list)
        for entry in entries:
            by_use[entry.first_use].append(entry)
        inserted: list[tuple[Action, Action]] = []
        for number, first_use in enumerate(a for a in self.actions[device] if a in by_use):
            inserted += [(first_use, entry.receive) for entry in by_use[first_use]]
            size = 2 * sum(entry.bytes for entry in by_use[first_use])
            inserted.append((first_use, self.touch(device, Kind.GATHER, size, number)))
        self.actions[device] = _insert(self.actions[device], inserted, before=True)


def _joins(gathers: Sequence[tuple[Gathering, int]]) -> dict[int, dict[int, list[Action]]]:
    """Device -> bucket -> the all-gathers (with their messages) that it joins behind that bucket's update, in their
    order, those that are relayed left out. A device without a bucket of its own joins behind its first update."""
    found: dict[int, dict[int, list[Action]]] = defaultdict(lambda: defaultdict(list))
    latest: dict[int, int] = {}
    for gathering, message in gathers:
        if not gathering.relayed:
            for device, bucket in zip(gathering.collective.members, gathering.bucket, strict=True):
                latest[device] = max(latest.get(device, 0), bucket)
                found[device][latest[device]].append(Action(Kind.SEND, -1, -1, message))
    return found


def _insert(
    actions: Sequence[Action], entries: Sequence[tuple[Action, Action]], *, before: bool
) -> list[Action]:
    """`actions` with entries (place, new) set before or behind their places, in the order given; behind means behind
    the sends of the place's own results too, for which other stages wait."""
    new: dict[Action, list[Action]] = defaultdict(list)
    for place, action in entries:
        new[place].append(action)
    if before:
        return [entry for action in actions for entry in (*new.get(action, ()), action)]
    found: list[Action] = []
    due: list[Action] = []
    for action in actions:
        if due and action.kind != Kind.SEND:
            found += due
            due = []
        found.append(action)
        due += new.get(action, ())
    return found + due
