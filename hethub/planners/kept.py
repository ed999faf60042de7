"""Whether a plan keeps the user's constraints and the objective's limits, read from the plan alone: for planners that
do not search with them."""

from __future__ import annotations

from collections import defaultdict

from hethub.cost.graph import CostGraph
from hethub.specs.constraints import FREE, Constraints, Objective
from hethub.specs.layout import Layout, lay_out
from hethub.specs.plan import Plan

__all__ = ["broken_constraints", "excess_watts"]


def broken_constraints(plan: Plan, graph: CostGraph, constraints: Constraints) -> list[str]:
    """Keys of the constraints that the plan breaks, as they stand in the file; memory reserves are looked at where the
    plan's memory is."""
    if constraints == FREE:
        return []
    layout, found = lay_out(plan), []
    stages = [stage for pipeline in layout.pipelines for stage in pipeline.stages]
    names = [graph.as_known(device.type).name for device in graph.devices]
    degrees: dict[str, set[int]] = {}
    for stage in stages:
        for replica in stage.replicas:
            for rank in replica.ranks:
                degrees.setdefault(names[rank.device], set()).add(len(replica.ranks))
    for name, allowed in constraints.tensor_parallel.items():
        if not degrees.get(name, set()) <= set(allowed):
            found.append(f"tensor_parallel.{name}")
    longest = max(len(pipeline.stages) for pipeline in layout.pipelines)
    if constraints.max_pipeline is not None and longest > constraints.max_pipeline:
        found.append("max_pipeline")
    types = ({names[d] for d in stage.devices()} for stage in stages)
    if not constraints.same_stage and any(len(own) > 1 for own in types):
        found.append("same_stage")
    if constraints.use_all and len(layout.used) < len(graph.devices):
        found.append("use_all")
    return found


def excess_watts(layout: Layout, graph: CostGraph, objective: Objective) -> dict[str, tuple[float, float]]:
    """(limit, watts at full power) of each zone whose devices in use may take less."""
    zones = {group.name: group.zone for group in graph.cluster.node_groups}
    watts: defaultdict[str, float] = defaultdict(float)
    for number in layout.used:
        device = graph.devices[number]
        watts[zones[device.group]] += device.type.power_watts or 0.0
    return {
        f"site_watts.{zone}": (limit, watts[zone])
        for zone, limit in objective.site_watts.items()
        if watts[zone] > limit
    }
