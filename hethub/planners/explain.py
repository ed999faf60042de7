"""Why a plan is as it is: what limits each device type, what one more device or a faster link would bring, and which
way each stage boundary takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.shapes import BYTES
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.simulate.what_if import Change, changed_graph
from hethub.specs.layout import Layout, PipelinePlace
from hethub.specs.resolved import Cluster, DeviceType

__all__ = ["Boundary", "LinkWorth", "TypeLimit", "boundaries", "limits"]

_MORE = 1.1  # of memory, or of speed
_FASTER = 2.0  # a link
_FEW = 0.001  # of the step: what changes it by less limits nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeLimit:
    """What limits a device type. Each figure is the share of the step that goes, by the closed form and a new search:
    with a tenth more memory, or a tenth more speed, on all of its devices, and with one more node of them."""

    device_type: str
    limit: str  # memory, compute, link, nothing
    more_memory: float
    more_speed: float
    one_more_node: float
    devices_of_a_node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWorth:
    """Share of the step that goes where all links of a class are twice as fast."""

    link: str
    faster: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """`count` stage boundaries of this kind: from type to type, by a transport, so many bytes a micro-batch each way,
    and seconds of a message on an idle link."""

    source: str
    destination: str
    transport: str
    size_bytes: int
    seconds: float
    count: int


_Saved = Callable[[Problem], float]


def limits(problem: Problem) -> tuple[tuple[TypeLimit, ...], tuple[LinkWorth, ...]]:
    """The binding limit of each device type, found by searching again with more of each resource, and what a faster
    link of each class would bring, most first. Nothing where no plan of the search's space fits."""
    before = FirstPlanner().estimate(problem)
    if before is None:
        return (), ()
    saved = _saved(before[0])
    links = tuple(sorted(_link_worth(problem, saved), key=lambda entry: (-entry.faster, entry.link)))
    return tuple(_type_limits(problem, saved, max((entry.faster for entry in links), default=0.0))), links


def _saved(step_seconds: float) -> _Saved:
    """A function of a changed problem: which share of the step goes; never negative: the old plan still is one."""

    def saved(changed: Problem) -> float:
        after = FirstPlanner().estimate(changed)
        return 0.0 if after is None else max(0.0, 1.0 - after[0] / step_seconds)

    return saved


def _type_limits(problem: Problem, saved: _Saved, fastest_link: float) -> Iterator[TypeLimit]:
    cluster = problem.cluster
    for name, device_type in cluster.device_types.items():
        wider = replace(device_type, memory_bytes=int(device_type.memory_bytes * _MORE))
        memory = saved(_with_cluster(problem, _with_type(cluster, name, wider)))
        quicker = changed_graph(cluster, [Change("type", name, _MORE)])
        speed = saved(replace(problem, compute=problem.compute.on(quicker)))
        group = next(i for i, group in enumerate(cluster.node_groups) if group.device_type == name)
        groups = list(cluster.node_groups)
        groups[group] = replace(groups[group], nodes=groups[group].nodes + 1)
        node = saved(_with_cluster(problem, replace(cluster, node_groups=tuple(groups))))
        worth = {"memory": memory, "compute": speed, "link": fastest_link}
        limit = max(worth, key=lambda key: worth[key])
        yield TypeLimit(
            device_type=name,
            limit=limit if worth[limit] > _FEW else "nothing",
            more_memory=memory,
            more_speed=speed,
            one_more_node=node,
            devices_of_a_node=cluster.node_groups[group].devices_per_node,
        )


def _link_worth(problem: Problem, saved: _Saved) -> Iterator[LinkWorth]:
    cluster = problem.cluster
    names = {link.name for group in cluster.node_groups for link in (group.intra_link, group.inter_link)}
    names |= {cross.link.name for cross in cluster.links}
    for name in sorted(names):
        graph = changed_graph(cluster, [Change("link", name, _FASTER)])
        changed = replace(problem, compute=problem.compute.on(graph))
        yield LinkWorth(link=name, faster=saved(changed))


def _with_cluster(problem: Problem, cluster: Cluster) -> Problem:
    return replace(problem, cluster=cluster, compute=problem.compute.on(CostGraph(cluster)))


def _with_type(cluster: Cluster, name: str, device_type: DeviceType) -> Cluster:
    return replace(cluster, device_types={**cluster.device_types, name: device_type})


def boundaries(layout: Layout, compute: ComputeModel) -> list[Boundary]:
    """The kinds of stage boundaries, most frequent first."""
    found: Counter[tuple[str, str, str, int, float]] = Counter()
    for pipeline in layout.pipelines:
        found.update(_boundaries_of(pipeline, compute))
    return [
        Boundary(
            source=key[0],
            destination=key[1],
            transport=key[2],
            size_bytes=key[3],
            seconds=key[4],
            count=count,
        )
        for key, count in sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
    ]


def _boundaries_of(
    pipeline: PipelinePlace, compute: ComputeModel
) -> Iterator[tuple[str, str, str, int, float]]:
    workload, devices = compute.workload, compute.graph.devices
    row_bytes = workload.sequence_length * workload.model.hidden_size
    for one, other in pairwise(pipeline.stages):
        for source in one.replicas:
            for target in other.replicas:
                rows = min(source.rows[1], target.rows[1]) - max(source.rows[0], target.rows[0])
                a, b = source.ranks[0].device, target.ranks[0].device
                if rows <= 0 or a == b:
                    continue
                path, kind = compute.graph.path(a, b), devices[a].type
                size = rows * row_bytes * BYTES[kind.dtype_for(workload.precision)]
                yield kind.name, devices[b].type.name, path.transport, size, path.seconds(size)
