"""The cost graph: devices and the node, group and zone vertices between them, joined by links.

A tree with cross links, never an edge per pair of devices. A transfer's path is a set of *cells*: directed
capacities that concurrent transfers queue for (a device's way in or out inside its node, a node's way in or
out of its network, a node's part of a cross link, the part of a cross link that all share). Simulator and
emulated links reserve the same cells by the same rule, and the slowest cell of a path is the path's own
speed, so that messages between two devices never overtake each other.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from hethub import catalog
from hethub.errors import InputError
from hethub.specs.cluster import Cluster, Device, DeviceType, GroupLink, Link, NodeGroup

__all__ = ["STAGED_CHUNK_BYTES", "CostGraph", "FreeAt", "Path", "is_host", "reserve"]

_Vertex = tuple[str, str]  # ("group" or "zone", its name)

STAGED_CHUNK_BYTES = 1 << 18  # of a host-staged message: large enough for a copy at full speed


@dataclass(frozen=True, slots=True)
class Path:
    """How bytes get from one device to another.

    `cells` are (index, bytes per second) pairs; the slowest one bounds the transfer, `latency_seconds` is
    added once. `crossings` are the cross links taken, as they are numbered in the cluster.
    """

    cells: tuple[tuple[int, float], ...]
    bandwidth_bytes_per_second: float
    latency_seconds: float
    transport: str
    crossings: tuple[int, ...] = ()

    def seconds(self, size_bytes: float) -> float:
        """Transfer time on an idle path: latency + bytes / bandwidth."""
        return self.latency_seconds + size_bytes / self.bandwidth_bytes_per_second


def is_host(device_type: DeviceType) -> bool:
    """Whether a device is the CPU of its host."""
    return catalog.vendor(device_type.vendor).torch_device == "cpu"


class FreeAt(Protocol):
    """When each cell is free again, in seconds; a list, or an array that processes share."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...


def reserve(free_at: FreeAt, path: Path, size_bytes: float, now: float) -> float:
    """Take the path's cells from `now` on and return the arrival time.

    Each cell serves first come, first served, and holds a transfer for bytes / its own bandwidth; the
    transfer arrives latency later than the last of them is done. Cells are not taken together: one that
    waited for a busy cell elsewhere on the path would keep everyone else from a link that is idle.
    """
    done = now
    for cell, bandwidth in path.cells:
        free = max(now, free_at[cell]) + size_bytes / bandwidth
        free_at[cell] = free
        done = max(done, free)
    return done + path.latency_seconds


@dataclass(frozen=True, slots=True)
class _Route:
    """The way between two nodes' networks: `crossings` are the cross links taken (number, bytes per second of
    one node), `shared` the cells that all nodes share."""

    bandwidth_bytes_per_second: float
    latency_seconds: float
    transport: str
    crossings: tuple[tuple[int, float], ...]
    shared: tuple[tuple[int, float], ...]

    @classmethod
    def inside(cls, link: Link) -> _Route:
        """Between two nodes of one group."""
        return cls(link.bandwidth_bytes_per_second, link.latency_seconds, link.transport, (), ())


class CostGraph:
    """Devices, links and routes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.devices: tuple[Device, ...] = cluster.devices()
        self._groups = {group.name: group for group in cluster.node_groups}
        self._node_cells: dict[tuple[str, int], int] = {}
        for device in self.devices:
            self._node_cells.setdefault((device.group, device.node), len(self._node_cells))
        self._first_node_cell = 2 * len(self.devices)
        self._first_crossing_cell = self._first_node_cell + 2 * len(self._node_cells)
        self._first_shared_cell = self._first_crossing_cell + 2 * len(self._node_cells) * len(cluster.links)
        self._first_copy_cell = self._first_shared_cell + 2 * len(cluster.links)
        self._paths: dict[tuple[int, int], Path] = {}
        self._routes: dict[tuple[str, str], _Route] = {}
        self.changed_from: Mapping[str, DeviceType] = {}  # of types made up by a what-if, by their name

    def as_known(self, device_type: DeviceType) -> DeviceType:
        """The type that profiles and calibrations know this one by."""
        return self.changed_from.get(device_type.name, device_type)

    def __getstate__(self) -> dict[str, object]:
        """Routes travel along; what is derived quickly does not."""
        cached = ("_network", "_paths")
        return {**{k: v for k, v in self.__dict__.items() if k not in cached}, "_paths": {}}

    @property
    def cell_count(self) -> int:
        """How many cells `reserve` may index."""
        return self._first_copy_cell + 2 * len(self.devices)

    def is_own(self, cell: int) -> bool:
        """Whether a cell is one device's: its way in or out inside the node, or its copies to and from the host."""
        return cell < self._first_node_cell or cell >= self._first_copy_cell

    @property
    def shares_links(self) -> bool:
        """Whether concurrent transfers share a link fairly, as real ones do; emulated links serve first come, first
        served, since a sender reserves them and cannot take that back (`reserve`)."""
        return self.cluster.emulated_time_scale is None

    @cached_property
    def shares_memory(self) -> bool:
        """Whether some devices are real CPUs, which may read each other's parameters where they lie."""
        real = self.cluster.emulated_time_scale is None
        return real and any(is_host(device_type) for device_type in self.cluster.device_types.values())

    def reads_in_place(self, source: int, destination: int) -> bool:
        """Whether parameters between two devices are read where they lie, so that no message carries them: both are
        CPUs of one host, which shared memory joins."""
        ends = (self.devices[source], self.devices[destination])
        alike = self.shares_memory and all(is_host(device.type) for device in ends)
        return alike and self.path(source, destination).transport == "shared-memory"

    @cached_property
    def _network(self) -> dict[_Vertex, dict[_Vertex, tuple[float, int | None]]]:
        """Groups and zones only, small, whatever the number of devices: neighbours of each with (latency, number of the
        cross link)."""
        found: dict[_Vertex, dict[_Vertex, tuple[float, int | None]]] = {}

        def join(one: _Vertex, other: _Vertex, latency: float, number: int | None) -> None:
            found.setdefault(one, {})[other] = found.setdefault(other, {})[one] = (latency, number)

        for group in self.cluster.node_groups:
            # Joining a zone costs nothing itself: the nodes' own links were paid for.
            join(("group", group.name), ("zone", group.zone), 0.0, None)
        for number, cross in enumerate(self.cluster.links):
            one, other = (self._vertex(name) for name in cross.between)
            join(one, other, cross.link.latency_seconds, number)
        return found

    def _vertex(self, name: str) -> _Vertex:
        return ("group", name) if name in self._groups else ("zone", name)

    def _route(self, source: NodeGroup, destination: NodeGroup) -> _Route:
        """The way between two groups' networks.

        A link named between the two groups themselves is taken; else the way of least latency.
        """
        key = (source.name, destination.name)
        if key not in self._routes:
            ends = ("group", source.name), ("group", destination.name)
            hops: tuple[_Vertex, ...] | None = (
                ends if ends[1] in self._network[ends[0]] else self._quickest(*ends)
            )
            if hops is None:
                raise InputError(
                    f"{self.cluster.name}: no link joins {source.name} and {destination.name}. "
                    "Add one to `links`."
                )
            self._routes[key] = self._along(hops, source, destination)
        return self._routes[key]

    def _quickest(self, source: _Vertex, destination: _Vertex) -> tuple[_Vertex, ...] | None:
        """The way of least latency (Dijkstra's algorithm), of such ways the one with fewest links; None where there is
        none."""
        queue: list[tuple[float, int, tuple[_Vertex, ...]]] = [(0.0, 1, (source,))]
        done: set[_Vertex] = set()
        while queue:
            latency, length, way = heapq.heappop(queue)
            if way[-1] == destination:
                return way
            if way[-1] not in done:
                done.add(way[-1])
                for further, (more, _) in self._network[way[-1]].items():
                    if further not in done:
                        heapq.heappush(queue, (latency + more, length + 1, (*way, further)))
        return None

    def _along(self, hops: Sequence[_Vertex], source: NodeGroup, destination: NodeGroup) -> _Route:
        taken: list[tuple[GroupLink, int, bool]] = []
        for start, stop in pairwise(hops):
            _, number = self._network[start][stop]
            if number is not None:
                cross = self.cluster.links[number]
                taken.append((cross, number, self._vertex(cross.between[0]) == start))
        links = [source.inter_link, destination.inter_link, *(cross.link for cross, _, _ in taken)]
        slowest = min(links, key=lambda link: link.bandwidth_bytes_per_second)
        # Named cross links have the measured end-to-end latency; else the worse of the two networks counts.
        latency = (
            sum(cross.link.latency_seconds for cross, _, _ in taken)
            if taken
            else max(source.inter_link.latency_seconds, destination.inter_link.latency_seconds)
        )
        shared = tuple(
            (
                self._first_shared_cell + 2 * number + (0 if forward else 1),
                cross.total_bandwidth_bytes_per_second,
            )
            for cross, number, forward in taken
            if cross.total_bandwidth_bytes_per_second is not None
        )
        return _Route(
            bandwidth_bytes_per_second=min([slowest.bandwidth_bytes_per_second, *(b for _, b in shared)]),
            latency_seconds=latency,
            transport=taken[0][0].link.transport if taken else slowest.transport,
            crossings=tuple((number, cross.link.bandwidth_bytes_per_second) for cross, number, _ in taken),
            shared=shared,
        )

    def path(self, source: int, destination: int) -> Path:
        """The path between two different devices (indices into `Cluster.devices()`).

        Raises InputError when no chain of links joins them.
        """
        key = (source, destination)
        found = self._paths.get(key)
        if found is None:
            found = self._find(self.devices[source], self.devices[destination], key)
            found = self._paths[key] = self._staged(found, key) if found.transport == "host-staged" else found
        return found

    def has_collectives(self, device: int) -> bool:
        """Whether its vendor's library may carry gradients and weights (see `program.islands`): emulated links carry
        messages only."""
        vendor = catalog.vendor(self.devices[device].type.vendor)
        return vendor.has_native_collectives and self.cluster.emulated_time_scale is None

    def way(self, source: int, destination: int, members: Sequence[int] = ()) -> Path:
        """The path of a message, or the ring of a collective of `members`."""
        return self.ring(members) if members else self.path(source, destination)

    def ring(self, members: Sequence[int]) -> Path:
        """A ring of devices as one path, whose transfer is what each of them passes on in a reduce-scatter or
        all-gather: all shares but one, in as many steps of which each takes the longest hop's latency. Every hop's
        cells carry that much; a cell of several hops stands there as often."""
        hops = [self.path(one, other) for one, other in zip(members, (*members[1:], members[0]), strict=True)]
        cells = tuple(cell for hop in hops for cell in hop.cells)
        uses = Counter(cell for cell, _ in cells)
        return Path(
            cells,
            min([*(h.bandwidth_bytes_per_second for h in hops), *(speed / uses[c] for c, speed in cells)]),
            (len(members) - 1) * max(hop.latency_seconds for hop in hops),
            hops[0].transport,
            tuple(crossing for hop in hops for crossing in hop.crossings),
        )

    def slowest_links(self, source: int, destination: int) -> tuple[str, ...]:
        """The links that bound the path between two devices, as `Cluster.named_links` calls them: the slowest link
        between groups or zones, where none of the two networks is slower; else the slower network. Alike ones all."""
        one, other = (self._groups[self.devices[end].group] for end in (source, destination))
        if one is other:
            same = self.devices[source].node == self.devices[destination].node
            return (f"{'intra' if same else 'inter'} {one.name}",)
        ends = {f"inter {group.name}": group.inter_link.bandwidth_bytes_per_second for group in (one, other)}
        crossed = {}
        for number in self.path(source, destination).crossings:
            cross = self.cluster.links[number]
            total = cross.total_bandwidth_bytes_per_second or math.inf
            crossed[cross.name] = min(total, cross.link.bandwidth_bytes_per_second)
        least = min(ends.values())
        bounding = crossed if min(crossed.values(), default=math.inf) <= least else ends
        least = min(bounding.values())
        return tuple(name for name, bandwidth in bounding.items() if bandwidth == least)

    def _staged(self, path: Path, ends: tuple[int, int]) -> Path:
        """With the copies between device and host memory at both ends, where their speed is known: in chunks, so that
        copy, wire and copy go on at once, and the first and the last chunk's copies alone add to the latency."""
        copies = []
        for way, device in enumerate(ends):
            speed = self.devices[device].type.host_copy_bytes_per_second
            if speed is not None:
                copies.append((self._first_copy_cell + 2 * device + way, speed))
        alone = sum(STAGED_CHUNK_BYTES / speed for _, speed in copies)
        return replace(
            path,
            cells=(*path.cells, *copies),
            bandwidth_bytes_per_second=min([path.bandwidth_bytes_per_second, *(s for _, s in copies)]),
            latency_seconds=path.latency_seconds + alone,
        )

    def _find(self, source: Device, destination: Device, indices: tuple[int, int]) -> Path:
        one, other = self._groups[source.group], self._groups[destination.group]
        out, into = 2 * indices[0], 2 * indices[1] + 1
        if (source.group, source.node) == (destination.group, destination.node):
            link = one.intra_link
            bandwidth = link.bandwidth_bytes_per_second
            cells: tuple[tuple[int, float], ...] = ((out, bandwidth), (into, bandwidth))
            return Path(cells, bandwidth, link.latency_seconds, link.transport)
        route = _Route.inside(one.inter_link) if one is other else self._route(one, other)
        leaving = self._node_cells[source.group, source.node]
        entering = self._node_cells[destination.group, destination.node]
        # A node's own adapter may be faster than the route: then it is free again sooner.
        cells = (
            (self._first_node_cell + 2 * leaving, one.inter_link.bandwidth_bytes_per_second),
            (self._first_node_cell + 2 * entering + 1, other.inter_link.bandwidth_bytes_per_second),
            *self._crossing_cells(route, leaving, entering),
            *route.shared,
        )
        crossings = tuple(number for number, _ in route.crossings)
        return Path(
            cells, route.bandwidth_bytes_per_second, route.latency_seconds, route.transport, crossings
        )

    def _crossing_cells(self, route: _Route, leaving: int, entering: int) -> Iterator[tuple[int, float]]:
        """What one node gets of a cross link: all its transfers over that link queue for it, each way."""
        for number, bandwidth in route.crossings:
            first = self._first_crossing_cell + 2 * number * len(self._node_cells)
            yield first + 2 * leaving, bandwidth
            yield first + 2 * entering + 1, bandwidth
