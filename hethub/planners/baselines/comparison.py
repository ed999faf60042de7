"""Our planner and the baselines on one problem, judged by one simulator, within the user's constraints.

An objective is ours to plan for; the others know speed only, and their plans are held against it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from hethub.errors import InfeasibleError
from hethub.planners.baselines.by_speed import data_parallel_by_speed, pipeline_by_speed
from hethub.planners.baselines.metis_like import metis_like
from hethub.planners.baselines.planner import SplitPlanner
from hethub.planners.baselines.sailor_like import sailor_like
from hethub.planners.even import EvenPlanner
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Found, Planner, Problem
from hethub.planners.kept import excess_watts
from hethub.planners.objective import ObjectiveFigures, best_plan, objective_figures
from hethub.specs.constraints import FASTEST, Objective
from hethub.specs.layout import Share

__all__ = ["OURS", "Contender", "Result", "compare", "contenders"]

OURS = "HetHub"


@dataclass(frozen=True, slots=True)
class Contender:
    """A planner and what it may use of the problem; `note` says in a few words what it does."""

    name: str
    note: str
    planner: Planner
    types: frozenset[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a contender found and how long it searched, or in `failure` why it found nothing. `figures` are the plan's,
    `missed` the objective's limits that it does not keep, as (limit, figure)."""

    name: str
    note: str
    found: Found | None
    tokens_per_second: float
    search_seconds: float
    failure: str | None
    figures: ObjectiveFigures | None
    missed: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Ours:
    """The planner of `hethub plan`, for an objective."""

    objective: Objective

    def plan(self, problem: Problem) -> Found:
        return best_plan(FirstPlanner(), problem, self.objective)


def contenders(problem: Problem, objective: Objective = FASTEST) -> Iterator[Contender]:
    """Ours first, then the baselines of the literature, then the simple rules."""
    yield Contender(OURS, "the planner of hethub plan", _Ours(objective))
    yield Contender(
        "Sailor-like", "stage by stage, equal layers and rows", SplitPlanner("sailor-like", sailor_like)
    )
    yield Contender(
        "Metis-like", "device groups, layers and rows balanced", SplitPlanner("metis-like", metis_like)
    )
    yield Contender("even", "the best even split, as Megatron-LM's", EvenPlanner())
    rows = SplitPlanner("rows-by-speed", data_parallel_by_speed)
    yield Contender("rows by speed", "data parallel, rows by speed", rows)
    layers = SplitPlanner("layers-by-speed", pipeline_by_speed)
    yield Contender("layers by speed", "a node a stage, layers by speed", layers)
    quickest = _quickest_type(problem)
    yield Contender(f"{quickest} alone", "the fastest type by itself", FirstPlanner(), frozenset([quickest]))
    for vendor, types in _vendors(problem).items():
        if types != {quickest}:
            yield Contender(f"{vendor} alone", "one vendor by itself", FirstPlanner(), types)


def _quickest_type(problem: Problem) -> str:
    """Of which one device does a decoder soonest."""
    whole = Share.whole(problem.workload.model)
    types = {device.type.name: device.type for device in problem.compute.graph.devices}
    layer_seconds = problem.compute.layer_seconds
    return min(types, key=lambda name: layer_seconds(types[name], "decoder", whole, 1))


def _vendors(problem: Problem) -> dict[str, frozenset[str]]:
    """Device types by vendor; nothing where there is only one."""
    types = {device.type.name: device.type for device in problem.compute.graph.devices}
    vendors = {found.vendor for found in types.values()}
    if len(vendors) < 2:
        return {}
    return {
        vendor: frozenset(name for name, found in types.items() if found.vendor == vendor)
        for vendor in sorted(vendors)
    }


def compare(
    problem: Problem, objective: Objective = FASTEST, *, clock: Callable[[], float] = time.perf_counter
) -> list[Result]:
    """Run every contender, each for about `problem.seconds`; the results in their order.

    Raises InfeasibleError when not even ours fits, or keeps the objective's limits.
    """
    tokens = problem.workload.global_batch * problem.workload.sequence_length
    results = []
    for contender in contenders(problem, objective):
        begin = clock()
        found: Found | None = None
        failure = None
        try:
            found = contender.planner.plan(replace(problem, types=contender.types))
        except InfeasibleError as error:
            if contender.name == OURS:
                raise
            failure = error.message.splitlines()[0]
        seconds = clock() - begin
        figures = None if found is None else objective_figures(found, problem)
        results.append(
            Result(
                name=contender.name,
                note=contender.note,
                found=found,
                tokens_per_second=0.0 if found is None else tokens / found.step_seconds,
                search_seconds=seconds,
                failure=failure,
                figures=figures,
                missed={} if found is None or figures is None else _missed(found, figures, objective),
            )
        )
    return results


def _missed(found: Found, figures: ObjectiveFigures, objective: Objective) -> dict[str, tuple[float, float]]:
    modelled = found.modelled
    return figures.missed(objective) | excess_watts(modelled.layout, modelled.compute.graph, objective)
