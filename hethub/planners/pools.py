"""Pools: devices that are interchangeable for a planner, so that it searches over counts and not over
devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from hethub.cost.graph import CostGraph, Path
from hethub.specs.cluster import DeviceType

__all__ = ["Pool", "Pools"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Devices of one type on nodes with alike links in one zone. `nodes` holds device indices, node by
    node."""

    number: int
    type: DeviceType
    known_name: str  # of the type that the user names, where a what-if or a pace made this one of it
    nodes: tuple[tuple[int, ...], ...]

    @cached_property
    def count(self) -> int:
        """Devices in the pool."""
        return sum(len(node) for node in self.nodes)

    @cached_property
    def node_size(self) -> int:
        """Devices of the largest node."""
        return max(len(node) for node in self.nodes)

    def units(self, degree: int) -> list[tuple[int, ...]]:
        """Tensor-parallel groups of `degree` devices, each within a node, in device order; the rest is left
        out."""
        return [
            node[start : start + degree]
            for node in self.nodes
            for start in range(0, len(node) - degree + 1, degree)
        ]

    def unit_count(self, degree: int) -> int:
        """How many groups `units` gives."""
        return sum(len(node) // degree for node in self.nodes)

    def unit_devices(self, degree: int) -> int:
        """Devices that each of these groups takes or spoils, so that no more of them are counted than there are."""
        return self.count // max(1, self.unit_count(degree))


class Pools:
    """The pools of a cluster and the paths between them, a pair of devices standing for the rest."""

    def __init__(self, graph: CostGraph) -> None:
        self.graph = graph
        self.all = self._divide()
        self._paths: dict[tuple[int, int, bool], Path | None] = {}

    def __getitem__(self, number: int) -> Pool:
        return self.all[number]

    def of_types(self, types: Collection[str] | None) -> tuple[int, ...]:
        """Numbers of the pools of these device types (None: all)."""
        return tuple(pool.number for pool in self.all if types is None or pool.type.name in types)

    def _divide(self) -> tuple[Pool, ...]:
        groups = {group.name: group for group in self.graph.cluster.node_groups}
        found: dict[tuple[object, ...], dict[tuple[str, int], list[int]]] = {}
        kinds: dict[tuple[object, ...], DeviceType] = {}
        for index, device in enumerate(self.graph.devices):
            group = groups[device.group]
            key = (device.type.name, group.intra_link, group.inter_link, group.zone)
            kinds[key] = device.type
            found.setdefault(key, defaultdict(list))[device.group, device.node].append(index)
        return tuple(
            Pool(
                number=number,
                type=kinds[key],
                known_name=self.graph.as_known(kinds[key]).name,
                nodes=tuple(tuple(node) for node in nodes.values()),
            )
            for number, (key, nodes) in enumerate(found.items())
        )

    def path(self, source: int, destination: int, *, within_node: bool = False) -> Path | None:
        """The path from pool to pool; of one pool, between nodes or `within_node`. None where there is no
        such pair."""
        key = (source, destination, within_node)
        if key not in self._paths:
            ends = self._ends(source, destination, within_node)
            self._paths[key] = None if ends is None else self.graph.path(*ends)
        return self._paths[key]

    def joined(self, number: int) -> bool:
        """Whether collectives of the vendor's library join all devices of a pool."""
        ways = [self.path(number, number, within_node=within) for within in (True, False)]
        native = all(way.transport == "native" for way in ways if way is not None)
        return native and self.graph.has_collectives(self.all[number].nodes[0][0])

    def _ends(self, source: int, destination: int, within_node: bool) -> tuple[int, int] | None:
        one, other = self.all[source], self.all[destination]
        if source != destination:
            return one.nodes[-1][-1], other.nodes[0][0]
        if within_node:
            wide = next((node for node in one.nodes if len(node) > 1), None)
            return None if wide is None else (wide[0], wide[1])
        return None if len(one.nodes) < 2 else (one.nodes[0][0], one.nodes[1][0])
