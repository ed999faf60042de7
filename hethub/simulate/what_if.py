"""What-if: the same plan on a cluster that differs in a link or in devices.

    link:CLASS=2x          every link of that class twice as fast
    link:desk-shelf=0.5x   one link (`Cluster.named_links`) at half its bandwidth
    device:GROUP/NODE/DEVICE=0.8x   one device at 0.8 of its speed, compute and memory traffic alike
    type:NAME=0.5x         every device of a type at half its speed
    type:NAME=+4           four more devices of a type

The program is compiled anew, so that schedule and updaters follow the changed speeds; the split stays. Only further
devices ask for a new one, which is the planner's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hethub.cost.graph import CostGraph
from hethub.errors import InputError
from hethub.specs.cluster import Cluster, Device, DeviceType, Link

__all__ = ["Addition", "Change", "changed_graph", "enlarged", "parse_change", "with_links"]

_FORM = re.compile(r"(link|device|type):(.+)=([0-9.eE+-]+)x")
_MORE = re.compile(r"type:(.+)=\+([1-9][0-9]{0,5})")


@dataclass(frozen=True, slots=True)
class Change:
    """Everything of this name is `factor` times as fast."""

    what: Literal["link", "device", "type"]
    name: str
    factor: float


@dataclass(frozen=True, slots=True)
class Addition:
    """`count` more devices of a type."""

    name: str
    count: int


def parse_change(text: str) -> Change | Addition:
    """Read one `--what-if`. Raises InputError where it is none."""
    more = _MORE.fullmatch(text)
    if more is not None:
        return Addition(more[1], int(more[2]))
    found = _FORM.fullmatch(text)
    try:
        factor = float(found[3]) if found else math.nan
    except ValueError:
        factor = math.nan
    if found is None or not 0 < factor < math.inf:
        raise InputError(
            f"--what-if {text}: not a change. Write link:CLASS=2x, device:GROUP/NODE/DEVICE=0.8x, type:NAME=0.5x "
            "or type:NAME=+4."
        )
    what: Literal["link", "device", "type"] = found[1]  # type: ignore[assignment]
    return Change(what, found[2], factor)


def enlarged(cluster: Cluster, additions: Sequence[Addition]) -> Cluster:
    """The cluster with further nodes in the first group of each named type; of the last of them only as many devices
    as make up the number. Raises InputError where no group is of that type."""
    for addition in additions:
        groups = list(cluster.node_groups)
        place = next((n for n, group in enumerate(groups) if group.device_type == addition.name), None)
        if place is None:
            raise _unknown(cluster, "type", addition.name)
        group = groups[place]
        nodes = -(-addition.count // group.devices_per_node)
        groups[place] = replace(group, nodes=group.nodes + nodes)
        left_out = range(addition.count - (nodes - 1) * group.devices_per_node, group.devices_per_node)
        names = {f"{group.name}/{group.nodes + nodes - 1}/{index}" for index in left_out}
        cluster = replace(cluster, node_groups=tuple(groups), exclude=cluster.exclude | names)
    return cluster


def _unknown(cluster: Cluster, what: str, name: str) -> InputError:
    known = sorted(_names(cluster, what))
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return InputError(f"--what-if {what}:{name}: {cluster.name} has no such {what}. It has {shown}.")


def changed_graph(cluster: Cluster, changes: Sequence[Change]) -> CostGraph:
    """The cost graph of a cluster with all changes made. Raises InputError where a name is not in the cluster."""
    for change in changes:
        if change.name not in _names(cluster, change.what):
            raise _unknown(cluster, change.what, change.name)
    graph = CostGraph(with_links(cluster, {c.name: c.factor for c in changes if c.what == "link"}))
    faster: dict[tuple[DeviceType, float], DeviceType] = {}
    graph.devices = tuple(_changed(device, changes, faster) for device in graph.devices)
    graph.changed_from = {made.name: own for (own, _), made in faster.items()}
    return graph


def _names(cluster: Cluster, what: str) -> set[str]:
    if what == "device":
        return {device.name for device in cluster.devices()}
    if what == "type":
        return set(cluster.device_types)
    links = cluster.named_links()
    return {link.name for link in links.values()} | set(links)


def with_links(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """The cluster with its links `factors` times as fast, by their class or their own name."""

    def factor(own: str, link: Link) -> float:
        return factors.get(own, 1.0) * factors.get(link.name, 1.0)

    def changed(own: str, link: Link) -> Link:
        return replace(link, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * factor(own, link))

    groups = tuple(
        replace(
            group,
            intra_link=changed(f"intra {group.name}", group.intra_link),
            inter_link=changed(f"inter {group.name}", group.inter_link),
        )
        for group in cluster.node_groups
    )
    crossing = []
    for cross in cluster.links:
        total = cross.total_bandwidth_bytes_per_second
        if total is not None:
            total *= factor(cross.name, cross.link)
        link = changed(cross.name, cross.link)
        crossing.append(replace(cross, link=link, total_bandwidth_bytes_per_second=total))
    return replace(cluster, node_groups=groups, links=tuple(crossing))


def _changed(
    device: Device, changes: Sequence[Change], faster: dict[tuple[DeviceType, float], DeviceType]
) -> Device:
    """The device with its own speed; devices of one type and speed share a type, named by both."""
    factor = math.prod(
        change.factor
        for change in changes
        if (change.what, change.name) in (("device", device.name), ("type", device.type.name))
    )
    if factor == 1.0:
        return device
    own = device.type
    if (own, factor) not in faster:
        faster[own, factor] = replace(
            own,
            name=f"{own.name} at {factor:g}x",
            memory_bandwidth_bytes_per_second=own.memory_bandwidth_bytes_per_second * factor,
            peak_flops_per_second={d: peak * factor for d, peak in own.peak_flops_per_second.items()},
        )
    return replace(device, type=faster[own, factor])
