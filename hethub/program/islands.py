"""Islands: alike devices that one vendor's collective library joins, and what its collectives carry between replicas.

Where several holders of a slice stand in one island, a reduce-scatter leaves the sum of their gradients with one of
them, and an all-gather gives all of them the new weights: the updater, or, where that stands elsewhere, a *relay*,
which exchanges messages with the updater for its whole island. So each byte crosses the link between islands once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hethub.cost.graph import CostGraph
from hethub.program.ownership import Ownership

__all__ = ["Collective", "Collectives", "Islands", "find_collectives", "native_islands"]

# On the 768 devices of cluster_specs/hethub-768.yaml the simulated step was as long as with messages alone where
# padding was up to a tenth (26.3 s), and 1.7 % longer where it was up to a quarter.
_MOST_PADDING = 1.1


@dataclass(frozen=True, slots=True)
class Islands:
    """`number[d]` is the island of device d; one without exchanges messages only.

    Shares are padded to the longest: a bucket whose padded shares are more than `most_padding` times its elements goes
    by messages, as that of a norm weight of forty holders, which has one updater.
    """

    number: Mapping[int, int]
    most_padding: float = _MOST_PADDING


def native_islands(graph: CostGraph, devices: Iterable[int]) -> Islands:
    """Of these devices, those of a type whose vendor has a library for collectives, joined where all paths between
    them are native. None where links are emulated: those carry messages only."""
    found: dict[int, int] = {}
    islands: list[tuple[str, dict[str, int]]] = []  # type, and a device of each node group
    nodes: dict[tuple[str, str, int], tuple[int, int]] = {}  # island, and the first device there
    for number in sorted(d for d in devices if graph.has_collectives(d)):
        device = graph.devices[number]
        type_name = graph.as_known(device.type).name
        node = (type_name, device.group, device.node)
        if node not in nodes:
            nodes[node] = _join(graph, islands, type_name, number), number
        island, first = nodes[node]
        if first == number or _native(graph, first, number):
            found[number] = island
    return Islands(found)


def _join(graph: CostGraph, islands: list[tuple[str, dict[str, int]]], type_name: str, device: int) -> int:
    for number, (known, heads) in enumerate(islands):
        if known == type_name and all(_native(graph, head, device) for head in heads.values()):
            heads.setdefault(graph.devices[device].group, device)
            return number
    islands.append((type_name, {graph.devices[device].group: device}))
    return len(islands) - 1


def _native(graph: CostGraph, one: int, other: int) -> bool:
    return graph.path(one, other).transport == "native"


class Collective(NamedTuple):
    """A reduce-scatter or all-gather of some slices among `members` (ascending), all of which hold them: `shares[i]`
    are those that member i updates or relays, `moments[i]` says when in its list they are ready or needed."""

    members: tuple[int, ...]
    shares: tuple[tuple[int, ...], ...]
    moments: tuple[int, ...]


@dataclass(frozen=True)
class Collectives:
    """All collectives of one way. `relays` are the (slice, member) whose share holds a slice that another island
    updates, `served` by slice the holders that need no message with its updater, since a collective serves them."""

    each: tuple[Collective, ...]
    relays: frozenset[tuple[int, int]]
    served: Mapping[int, frozenset[int]]

    def left(self, number: int, holders: tuple[int, ...]) -> tuple[int, ...]:
        """Those holders of a slice that exchange messages with its updater: relays, and whom no collective serves. The
        updater itself may be among them."""
        served = self.served.get(number)
        if served is None:
            return holders
        return () if len(served) == len(holders) else tuple(d for d in holders if d not in served)


def find_collectives(
    ownership: Ownership, islands: Islands, moment: Callable[[int, int], int]
) -> Collectives:
    """One collective for all slices that the same members of an island have ready (or need) at the same moments;
    `moment(device, parameter)` says when in the device's list that is."""
    parts: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}  # holders -> those that share an island
    moments: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}
    buckets: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for number, entry in enumerate(ownership.slices if islands.number else ()):
        if entry.holders not in parts:
            parts[entry.holders] = _parts(entry.holders, islands.number)
        for members in parts[entry.holders]:
            key = (members, entry.parameter)
            if key not in moments:
                moments[key] = tuple(moment(d, entry.parameter) for d in members)
            buckets[members, moments[key]].append(number)
    found, relays = [], set()
    served: dict[int, frozenset[int]] = {}
    alike: dict[frozenset[int], frozenset[int]] = {}  # most slices are served alike
    for (members, when), numbers in buckets.items():
        shares = _shares(ownership, members, numbers)
        sizes = [ownership.route_elements(share) for share in shares]
        if len(members) * max(sizes) > islands.most_padding * sum(sizes):
            continue
        found.append(Collective(members, shares, when))
        for device, share in zip(members, shares, strict=True):
            for number in share:
                joined = served.get(number, frozenset()).union(members)
                if ownership.slices[number].updater not in members:
                    relays.add((number, device))
                    joined -= {device}
                served[number] = alike.setdefault(joined, joined)
    return Collectives(tuple(found), frozenset(relays), served)


def _parts(holders: Sequence[int], islands: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    found: dict[int, list[int]] = defaultdict(list)
    for device in holders:
        if device in islands:
            found[islands[device]].append(device)
    return tuple(tuple(members) for members in found.values() if len(members) > 1)


def _shares(
    ownership: Ownership, members: tuple[int, ...], numbers: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Each slice to its updater; those of others, the largest first, to the member with the least so far."""
    slices = ownership.slices
    shares: dict[int, list[int]] = {device: [] for device in members}
    for number in numbers:
        if slices[number].updater in shares:
            shares[slices[number].updater].append(number)
    loads = {d: ownership.route_elements(tuple(share)) for d, share in shares.items()}
    foreign = [n for n in numbers if slices[n].updater not in shares]
    for number in sorted(foreign, key=lambda n: (-slices[n].elements, n)):
        least = min(members, key=lambda d: (loads[d], d))
        shares[least].append(number)
        loads[least] += slices[number].elements
    return tuple(tuple(sorted(share)) for share in shares.values())
