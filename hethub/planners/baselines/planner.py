"""The baselines as planners: a search proposes splits in counts, the simulator decides between the best few."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hethub.errors import InfeasibleError
from hethub.planners.baselines.own_prices import OwnPrices
from hethub.planners.baselines.prices import Late, Prices
from hethub.planners.baselines.split import Band, Group, Side, Split
from hethub.planners.finalists import simulate_plan
from hethub.planners.interface import Found, Problem
from hethub.planners.kept import broken_constraints
from hethub.planners.placement import name_ranks
from hethub.planners.shares import rank_entries
from hethub.specs.plan import Pipeline, Plan, Replica, Stage

__all__ = ["SplitPlanner", "whole_batch"]

_PROPOSED = 24  # of the search's best, from which those that fit exactly are simulated
_SIMULATED = 3
Search = Callable[[Prices, int, Late], list[tuple[float, Split]]]


@dataclass(frozen=True, slots=True)
class SplitPlanner:
    """Runs `search` under our cost model; the simulator chooses among its best that keep the user's constraints, of
    which the searches know tensor-parallel degrees and memory only."""

    name: str
    search: Search
    clock: Callable[[], float] = time.monotonic

    def plan(self, problem: Problem) -> Found:
        """Find a plan. Raises InfeasibleError when the search finds none that fits."""
        prices, end = OwnPrices(problem), self.clock() + problem.seconds
        ranked = self.search(prices, _PROPOSED, lambda: self.clock() >= end) if prices.kinds else []
        best: Found | None = None
        simulated = 0
        broken: dict[str, None] = {}
        for _, split in ranked:
            exact = whole_batch(split, problem.workload.global_batch)
            if exact is None:
                continue
            try:
                plan = _plan(self.name, exact, prices)
            except LookupError:  # the searches count devices, whatever a node's number leaves over
                continue
            breaks = broken_constraints(plan, problem.compute.graph, problem.constraints)
            broken |= dict.fromkeys(breaks)
            if breaks:
                continue
            reserve = problem.constraints.memory_reserve_bytes
            modelled = simulate_plan(plan, problem.compute, reserve_bytes=reserve)
            if modelled is None:
                continue
            found = Found(plan=plan, modelled=modelled, considered=len(ranked), runners_up=())
            if best is None or found.step_seconds < best.step_seconds:
                best = found
            simulated += 1
            if simulated == _SIMULATED:
                break
        if best is None:
            and_keeps = f" and keeps {', '.join(broken)}" if broken else ""
            raise InfeasibleError(
                f"{self.name}: none of its {len(ranked)} splits of {problem.workload.model.name} fits "
                f"{problem.cluster.name}{and_keeps}. Use the planner of hethub plan."
            )
        return replace(best, modelled=best.modelled.steady())


def whole_batch(split: Split, batch: int) -> Split | None:
    """The split with exactly `batch` rows: where its searches round the micro-batches up, each of a stage's replicas
    becomes a pipeline's, and some pipelines do one micro-batch fewer. None where rows do not divide the batch."""
    if split.total_rows == batch:
        return split
    if len(split.bands) != 1:
        return None
    chains = _apart(split.bands[0])
    if chains is None or batch % chains[0].rows:
        return None
    count = sum(chain.repeat for chain in chains)
    each, more = divmod(batch // chains[0].rows, count)
    bands = []
    for chain in chains:
        longer = min(more, chain.repeat)
        more -= longer
        for repeat, micro_batches in ((longer, each + 1), (chain.repeat - longer, each)):
            if repeat and micro_batches:
                bands.append(Band(chain.stages, micro_batches, repeat))
    return Split(split.bounds, tuple(bands))


def _apart(band: Band) -> list[Band] | None:
    """One pipeline of alike-numbered replicas with equal rows as pipelines of one replica a stage."""
    sides = [[side for side in stage for _ in range(side.replicas)] for stage in band.stages]
    if len({side.rows for stage in sides for side in stage}) > 1 or len({len(stage) for stage in sides}) > 1:
        return None
    counts: dict[tuple[tuple[Side, ...], ...], int] = {}
    for chain in zip(*sides, strict=True):
        stages = tuple((Side(side.group, side.rows),) for side in chain)
        counts[stages] = counts.get(stages, 0) + band.repeat
    return [Band(stages, band.micro_batches, repeat) for stages, repeat in counts.items()]


def _plan(name: str, split: Split, prices: OwnPrices) -> Plan:
    """The split on named devices."""
    problem = prices.problem
    seats = _Seats(prices, split)
    return Plan(
        name=name,
        pipelines=[_pipeline(split, band, prices, seats) for band in split.bands],
        cluster=problem.cluster,
        workload=problem.workload,
    )


def _pipeline(split: Split, band: Band, prices: OwnPrices, seats: _Seats) -> Pipeline:
    model = prices.problem.workload.model
    names = [device.name for device in prices.problem.compute.graph.devices]
    last = len(band.stages) - 1
    placed = [[[] for _ in stage] for stage in band.stages]  # type: list[list[list[tuple[int, ...]]]]
    for _ in range(band.repeat):
        for number, stage in enumerate(band.stages):
            for place, side in enumerate(stage):
                placed[number][place] += seats.take(side.group, side.replicas)
    stages = []
    for number, (layers, stage) in enumerate(zip(split.layers, band.stages, strict=True)):
        decoders = layers[0] < model.layers + 1 and layers[1] > 1
        replicas = []
        for side, groups in zip(stage, placed[number], strict=True):
            entries = rank_entries(model, side.group.degree, decoders, number in (0, last))
            ranks = name_ranks(groups, entries, names)
            replicas.append(Replica(rows=side.rows, repeat=side.replicas, ranks=ranks))
        held = min(last + 1 - number, band.micro_batches)
        stages.append(Stage(layers=layers, in_flight=held, replicas=replicas))
    return Pipeline(
        repeat=band.repeat, micro_batches=band.micro_batches, micro_batch_rows=band.rows, stages=stages
    )


class _Seats:
    """Groups of devices inside nodes, wide ones laid first, so that narrow ones fill what is left of a node. Raises
    LookupError where the nodes cannot be cut so."""

    def __init__(self, prices: OwnPrices, split: Split) -> None:
        wanted: dict[Group, int] = {}
        for band in split.bands:
            for stage in band.stages:
                for side in stage:
                    count = wanted.get(side.group, 0)
                    wanted[side.group] = count + side.replicas * band.repeat
        free = {
            number: [list(node) for node in prices.pool(number).nodes] for number in range(len(prices.kinds))
        }
        self._groups = {
            group: _laid(free[group.kind], group.degree, wanted[group])
            for group in sorted(wanted, key=lambda group: -group.degree)
        }

    def take(self, group: Group, count: int) -> list[tuple[int, ...]]:
        """The next `count` groups, in device order."""
        queue = self._groups[group]
        taken, self._groups[group] = queue[:count], queue[count:]
        return taken


def _laid(nodes: list[list[int]], degree: int, count: int) -> list[tuple[int, ...]]:
    laid: list[tuple[int, ...]] = []
    for node in nodes:
        while len(node) >= degree and len(laid) < count:
            laid.append(tuple(node[:degree]))
            del node[:degree]
    if len(laid) < count:
        raise LookupError(f"{count} groups of {degree} do not stand in these nodes")
    return laid
