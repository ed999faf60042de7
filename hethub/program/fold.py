"""A tensor-parallel group as one device, so that a big plan is compiled and simulated in a fraction of the time.

The ranks of a group do the same at the same time: a compute action starts when the last of them is there, and their
messages go side by side. So the group's first device stands for all of them, with their memory traffic, bytes and
links added up; an action costs what it costs the group. Equal are the bytes that cross every link, all times of compute
and the order of everything. Less are latencies of messages to the same neighbour, which overlap anyway, and parameters
that all ranks hold whole, as a norm's, which are counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hethub.cost.compute import ComputeModel, ComputePrice
from hethub.cost.graph import CostGraph, Path
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, Share, Span, StagePlace
from hethub.specs.resolved import DeviceType
from hethub.timeline.record import Kind

__all__ = ["Fold", "fold"]

_Ranks = tuple[RankPlace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """`layout` has groups of one device, whose costs `compute` gives; `members[d]` is the group that d stands for."""

    layout: Layout
    compute: ComputeModel
    members: Mapping[int, tuple[int, ...]]


class _GroupGraph(CostGraph):
    """The first device of every group is as strong as the group; the others are there and never used."""

    def __init__(self, each: CostGraph, members: Mapping[int, tuple[int, ...]]) -> None:
        super().__init__(each.cluster)
        self.devices = each.devices  # which may be other than the cluster's
        self.changed_from = each.changed_from
        self._sizes = {device: len(group) for device, group in members.items()}
        strong: dict[tuple[str, int], DeviceType] = {}
        devices = list(self.devices)
        for device, size in self._sizes.items():
            own = devices[device].type
            if (own.name, size) not in strong:
                strong[own.name, size] = _together(own, size)
            devices[device] = replace(devices[device], type=strong[own.name, size])
        self.devices = tuple(devices)

    def path(self, source: int, destination: int) -> Path:
        """Inside a node every rank has a way of its own, and copies to and from its host of its own; between nodes they
        share the node's."""
        key = (source, destination)
        found = self._paths.get(key)
        if found is None:
            found = super().path(source, destination)
            own = [self.is_own(cell) for cell, _ in found.cells]
            if any(own):
                # an even cell is a way out, an odd one a way in
                sizes = (self._sizes[source], self._sizes[destination])
                cells = tuple(
                    (cell, speed * sizes[cell % 2] if mine else speed)
                    for (cell, speed), mine in zip(found.cells, own, strict=True)
                )
                found = replace(found, cells=cells, bandwidth_bytes_per_second=min(b for _, b in cells))
            self._paths[key] = found
        return found


def _together(one: DeviceType, count: int) -> DeviceType:
    return replace(
        one,
        memory_bytes=one.memory_bytes * count,
        memory_reserve_bytes=one.memory_reserve_bytes * count,
        memory_bandwidth_bytes_per_second=one.memory_bandwidth_bytes_per_second * count,
    )


class _GroupCompute(ComputeModel):
    """Prices a group's only rank as the group that it stands for; alike groups are priced once."""

    def __init__(self, graph: CostGraph, each: ComputeModel, groups: Mapping[int, _Ranks]) -> None:
        super().__init__(graph, each.workload, slow_down=each.slow_down)
        self._each = each
        self._groups = groups

    @cached_property
    def by_figures(self) -> ComputeModel:
        """The same groups by their figures alone."""
        each = self._each.by_figures
        return self if each is self._each else _GroupCompute(self.graph, each, self._groups)

    def group_price(
        self,
        ranks: tuple[RankPlace, ...],
        layers: Span,
        rows: int,
        work: Kind,
        *,
        recompute: str = "none",
        training: bool = True,
    ) -> ComputePrice:
        """The action of the group that the first of `ranks` stands for."""
        group = self._groups[ranks[0].device]
        return self._each.group_price(group, layers, rows, work, recompute=recompute, training=training)

    def touch_seconds(self, device_type: DeviceType, size_bytes: float) -> float:
        """All ranks touch their part at once."""
        bandwidth = device_type.memory_bandwidth_bytes_per_second * device_type.memory_efficiency
        return self._slow(device_type) * size_bytes / bandwidth


def fold(layout: Layout, compute: ComputeModel) -> Fold | None:
    """Fold every group into its first device, or None where that cannot be: ranks of unlike devices or shares (then
    their own times differ), or a device that has other partners or another share in another stage."""
    groups: dict[int, _Ranks] = {}
    leader: dict[int, int] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                first = replica.ranks[0].device
                if groups.setdefault(first, replica.ranks) != replica.ranks or not _alike(replica, compute):
                    return None
                if any(leader.setdefault(rank.device, first) != first for rank in replica.ranks):
                    return None
    members = {first: tuple(rank.device for rank in ranks) for first, ranks in groups.items()}
    graph = _GroupGraph(compute.graph, members)
    return Fold(
        layout=_folded(layout),
        compute=_GroupCompute(graph, compute, _priced_as(groups, compute)),
        members=members,
    )


def _alike(replica: ReplicaPlace, compute: ComputeModel) -> bool:
    """One node, one type, shares that differ by rounding at most."""
    devices = [compute.graph.devices[rank.device] for rank in replica.ranks]
    heads = [rank.share.kv[1] - rank.share.kv[0] for rank in replica.ranks]
    columns = [rank.share.ffn[1] - rank.share.ffn[0] for rank in replica.ranks]
    places = {(d.group, d.node, d.type.name) for d in devices}
    return len(places) == 1 and max(heads) == min(heads) and max(columns) - min(columns) <= 1


def _priced_as(groups: Mapping[int, _Ranks], compute: ComputeModel) -> dict[int, _Ranks]:
    """The first of all groups that cost the same as a device's: same type, shares and link inside the node."""
    links = {group.name: group.intra_link for group in compute.graph.cluster.node_groups}
    first: dict[object, _Ranks] = {}
    found = {}
    for device, ranks in groups.items():
        one = compute.graph.devices[device]
        key = (one.type.name, links[one.group], tuple(rank.share for rank in ranks))
        found[device] = first.setdefault(key, ranks)
    return found


def _folded(layout: Layout) -> Layout:
    def stages(places: Sequence[StagePlace]) -> tuple[StagePlace, ...]:
        return tuple(
            replace(
                stage,
                replicas=tuple(
                    replace(replica, ranks=(RankPlace(replica.ranks[0].device, whole),))
                    for replica in stage.replicas
                ),
            )
            for stage in places
        )

    whole = Share.whole(layout.model)
    pipelines: tuple[PipelinePlace, ...] = tuple(
        replace(pipeline, stages=stages(pipeline.stages)) for pipeline in layout.pipelines
    )
    return Layout(layout.model, pipelines)
