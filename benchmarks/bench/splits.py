"""Small exhaustive searches: the best chains of single devices for a few devices, decided by the simulator.

Every shape that is tried is a set of pipelines of single devices (tensor-parallel degree 1), one row in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

from hethub.cost.bounds import physical_bound
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.program.schedules import SCHEDULES
from hethub.simulate.modelled import steady_step_seconds
from hethub.specs.cluster import Cluster
from hethub.specs.layout import RankPlace, Share
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Model, Workload
from hethub.timeline.record import Kind

__all__ = ["Candidate", "Chain", "best_alone", "best_chains", "compute_of", "only", "share_of_batch"]

_SIMULATED = 4  # shapes that the simulator decides between, best by closed form
_REACHES = (0, 1, 2, 3)  # micro-batches that a stage holds beyond what an ideal link would need
_AS_GOOD = 1.0005
_WANTED_SCHEDULES = ("1f1b", "1f1b-split", "zb-h1", "list")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and its simulated step time."""

    plan: Plan
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Chain:
    """One pipeline before its schedule is chosen: a device for each stage, the layers' cuts, the micro-batches."""

    devices: tuple[str, ...]
    cuts: tuple[int, ...]
    micro_batches: int

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """The stages' layers, half-open; `layers` counts the embedding and the head too."""
        return list(pairwise((0, *self.cuts, layers)))


def compute_of(plan: Plan) -> ComputeModel:
    """The prices of a plan's cluster and workload."""
    return ComputeModel(CostGraph(plan.cluster), plan.workload)


def only(cluster: Cluster, device_type: str) -> Cluster:
    """The cluster with the devices of all other types left out."""
    others = {device.name for device in cluster.devices() if device.type.name != device_type}
    return replace(cluster, exclude=cluster.exclude | others)


def share_of_batch(cluster: Cluster, workload: Workload, device_type: str) -> Workload:
    """The workload with the part of the global batch that a type's speed calls for, rounded."""
    bound = physical_bound(ComputeModel(CostGraph(cluster), workload))
    return replace(workload, global_batch=round(bound.shares[device_type] * workload.global_batch))


def best_chains(
    cluster: Cluster, workload: Workload, shapes: Iterator[tuple[Chain, ...]], name: str
) -> Candidate:
    """The best plan over `shapes`, all schedules and how far the stages run ahead.

    Raises ValueError when none fits.
    """
    compute = ComputeModel(CostGraph(cluster), workload)
    ranked = sorted(shapes, key=lambda chains: _closed_form(compute, chains))[:_SIMULATED]
    schedules = [s for s in _WANTED_SCHEDULES if s in SCHEDULES]
    found = []
    for chains, reach, schedule in product(ranked, _REACHES, schedules):
        pipelines = [_pipeline(chain, workload.model, reach, schedule) for chain in chains]
        plan = Plan(name=name, pipelines=pipelines, cluster=cluster, workload=workload)
        if not check_plan(plan):
            found.append(Candidate(plan, steady_step_seconds(plan, compute)))
    if not found:
        raise ValueError(f"{name}: none of {len(ranked)} shapes fits the devices' memory")
    best = min(candidate.step_seconds for candidate in found)
    # Real devices are late now and then, which the simulator does not know: of equals take the deepest.
    equals = [candidate for candidate in found if candidate.step_seconds <= _AS_GOOD * best]
    return max(equals, key=lambda candidate: _depth(candidate.plan))


def _depth(plan: Plan) -> int:
    return sum(stage.in_flight for pipeline in plan.pipelines for stage in pipeline.stages)


def best_alone(cluster: Cluster, workload: Workload) -> Candidate:
    """The best plan for devices of one type: every way to cut them into equal pipelines of at most all devices, against
    what HetHub's planner finds."""
    name = f"{cluster.devices()[0].type.name}-alone"
    own = best_chains(cluster, workload, _even_chains(cluster, workload), name)
    problem = Problem.of(cluster, workload)
    planned = FirstPlanner().plan(problem).plan.model_copy(update={"name": name})
    other = Candidate(planned, steady_step_seconds(planned, problem.compute))
    return min(own, other, key=lambda candidate: candidate.step_seconds)


def _even_chains(cluster: Cluster, workload: Workload) -> Iterator[tuple[Chain, ...]]:
    devices = [device.name for device in cluster.devices()]
    layers = workload.model.layers + 2
    for stages in range(1, len(devices) + 1):
        pipelines = len(devices) // stages
        if pipelines * stages != len(devices) or workload.global_batch % pipelines:
            continue
        for cuts in combinations(range(1, layers), stages - 1):
            yield tuple(
                Chain(tuple(devices[i * stages : (i + 1) * stages]), cuts, workload.global_batch // pipelines)
                for i in range(pipelines)
            )


def _closed_form(compute: ComputeModel, chains: Sequence[Chain]) -> float:
    """Seconds of the slowest pipeline: its slowest stage for every micro-batch, the others once."""
    index = {device.name: number for number, device in enumerate(compute.graph.devices)}
    layers = compute.workload.model.layers + 2
    worst = 0.0
    for chain in chains:
        stages = []
        for device, span in zip(chain.devices, chain.spans(layers), strict=True):
            ranks = (RankPlace(index[device], Share.whole(compute.workload.model)),)
            stages.append(
                sum(compute.group_price(ranks, span, 1, k).seconds for k in (Kind.FORWARD, Kind.BACKWARD))
            )
        worst = max(worst, (chain.micro_batches - 1) * max(stages) + sum(stages))
    return worst


def _pipeline(chain: Chain, model: Model, reach: int, schedule: str) -> Pipeline:
    stages = []
    spans = chain.spans(model.layers + 2)
    for number, (device, span) in enumerate(zip(chain.devices, spans, strict=True)):
        decodes = span[0] <= model.layers and span[1] > 1
        rank = Rank(
            device=device,
            heads=model.heads if decodes else 0,
            ffn=model.ffn_size if decodes else 0,
            vocab=model.vocab_size if span[0] == 0 or span[1] == model.layers + 2 else 0,
        )
        held = min(len(spans) - number + (reach if len(spans) > 1 else 0), chain.micro_batches)
        stages.append(Stage(layers=span, in_flight=held, replicas=[Replica(rows=1, ranks=[rank])]))
    return Pipeline(schedule=schedule, micro_batches=chain.micro_batches, micro_batch_rows=1, stages=stages)
