"""Why no plan fits: what is short, by how much, and the smallest change that was found to fit."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from hethub.cost.graph import CostGraph
from hethub.errors import InfeasibleError
from hethub.planners.chain import Chains
from hethub.planners.interface import Found, Problem
from hethub.planners.pools import Pools
from hethub.planners.seats import Crew, Seat, SeatCost, SeatCosts, crew_slots
from hethub.planners.space import degrees
from hethub.planners.stage import Setting
from hethub.specs.cluster import Cluster

__all__ = ["fits_at_all", "shortage"]

_MOST_NODES = 1024  # of one group, that a suggestion may add
_SLIPS = 3  # further nodes that are tried where the closed form's number does not do
_COMBINATIONS = 20  # of degrees, that are all tried
_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class _Need:
    """The worst device of the most spread-out split: bytes over, bytes needed, bytes it has, its type."""

    over: float
    needed: float
    usable: int
    device_type: str


def shortage(problem: Problem, chains: Chains, search: Callable[[Problem], Found | None]) -> InfeasibleError:
    """The error for a problem without a plan. The change that it names was tried: `search` found a plan
    with it."""
    workload = problem.workload
    numbers = chains.costs.pools.of_types(problem.types)
    text = f"{workload.model.name} does not fit on {problem.cluster.name}"
    needs = [_least_need(chains, *spread) for spread in _spread_out(chains, numbers)]
    if not needs:
        return InfeasibleError(
            f"{text}: no tensor-parallel group can be formed. Give nodes at least one device."
        )
    need = min(needs)
    text += (
        f": with every device in one pipeline, full recomputation and micro-batches of 1 row, a "
        f"{need.device_type} needs {_size(need.needed)} and has {_size(need.usable)}, "
        f"{_size(need.over)} short. Recomputation, smaller micro-batches and a smaller global batch do "
        "not help."
    )
    more = _more_devices(problem, search)
    if more is None:
        return InfeasibleError(
            f"{text} Nor do more nodes of any one group (up to {_MOST_NODES} were tried). "
            "Use devices with more memory, a shorter sequence_length or a smaller model."
        )
    nodes, group, devices, device_type = more
    many = "nodes" if nodes > 1 else "node"
    return InfeasibleError(
        f"{text} {devices} more {device_type} ({nodes} more {many} in group {group}) would fit."
    )


def fits_at_all(chains: Chains, numbers: tuple[int, ...], batch: int) -> bool:
    """Whether the splits that need the least memory fit."""
    for crew, copies in _spread_out(chains, numbers):
        setting = Setting(copies, 0, _pools_of(crew), max(1, batch // copies))
        if copies <= batch and chains.chain(crew, 1, setting):
            return True
    return False


def _spread_out(chains: Chains, numbers: tuple[int, ...]) -> Iterator[tuple[Crew, int]]:
    """One pipeline over all units (or as few alike ones as the layers allow), for each choice of degrees."""
    costs = chains.costs
    for combination in _combinations(costs, numbers):
        units = {pool: costs.pools[pool].unit_count(degree) for pool, degree in combination.items()}
        copies = -(-sum(units.values()) // (chains.layers + 2))
        crew = tuple(
            ((Seat(p, d, 1),), units[p] // copies) for p, d in combination.items() if units[p] >= copies
        )
        if crew:
            yield crew, copies


def _combinations(costs: SeatCosts, numbers: tuple[int, ...]) -> Iterator[dict[int, int]]:
    """Tensor-parallel degree of each pool: all combinations where they are few, else alike as far as possible."""
    kv_heads = costs.compute.workload.model.kv_heads
    each = [degrees(costs.pools[n], kv_heads) for n in numbers]
    if math.prod(map(len, each)) <= _COMBINATIONS:
        picks: Iterable[tuple[int, ...]] = product(*each)
    else:
        steps = sorted({d for options in each for d in options})
        picks = dict.fromkeys(
            tuple(max(d for d in options if d <= step) for options in each) for step in steps
        )
    for pick in picks:
        yield dict(zip(numbers, pick, strict=True))


def _pools_of(crew: Crew) -> tuple[int, ...]:
    return tuple(sorted({seat.pool for slot, _ in crew for seat in slot}))


def _least_need(chains: Chains, crew: Crew, copies: int) -> _Need:
    """Hand out the decoders so that the device that is most over its memory is least over it."""
    costs = [chains.costs.cost(slot[0].pool, slot[0].degree, 1) for slot in crew_slots(crew)]
    last = len(costs) - 1
    decoders = [0 if i in (0, last) else 1 for i in range(len(costs))]

    def needed(i: int, count: int) -> float:
        place = (i == 0, i == last)
        full = count > costs[i].most_decoders(place, 1, copies, full=False)
        return costs[i].bytes(place, count, 1, copies, full=full)

    queue = [(needed(i, n + 1) - costs[i].usable, i) for i, n in enumerate(decoders)]
    heapq.heapify(queue)
    for _ in range(chains.layers - sum(decoders)):
        _, i = queue[0]
        decoders[i] += 1
        heapq.heapreplace(queue, (needed(i, decoders[i] + 1) - costs[i].usable, i))
    return max(_need(chains, cost, needed(i, decoders[i])) for i, cost in enumerate(costs))


def _need(chains: Chains, cost: SeatCost, needed: float) -> _Need:
    name = chains.costs.pools[cost.pool].type.name
    return _Need(needed - cost.usable, needed, cost.usable, name)


def _more_devices(
    problem: Problem, search: Callable[[Problem], Found | None]
) -> tuple[int, str, int, str] | None:
    """(nodes, group, devices, device type) of the fewest devices to add to one group, found by trying."""
    options = []
    for number, group in enumerate(problem.cluster.node_groups):
        if problem.types is not None and group.device_type not in problem.types:
            continue
        nodes = _fewest_nodes(problem, number)
        if nodes is not None:
            options.append((nodes * group.devices_per_node, number, nodes))
    for _, number, fewest in sorted(options):
        # Nearly always the first; the search knows splits that need less, and memory that the closed form does not.
        for nodes in range(fewest, fewest + _SLIPS):
            if _found_with(problem, search, number, nodes):
                while nodes > 1 and _found_with(problem, search, number, nodes - 1):
                    nodes -= 1
                group = problem.cluster.node_groups[number]
                return nodes, group.name, nodes * group.devices_per_node, group.device_type
    return None


def _found_with(problem: Problem, search: Callable[[Problem], Found | None], number: int, nodes: int) -> bool:
    cluster = _enlarged(problem.cluster, number, nodes)
    compute = problem.compute.on(CostGraph(cluster))
    # without time a search ends with the first plan that fits: no better one is asked for
    return search(replace(problem, cluster=cluster, compute=compute, finalists=1, seconds=0.0)) is not None


def _fewest_nodes(problem: Problem, number: int) -> int | None:
    """Doubling, then bisection."""
    high = 1
    while not _fits_with(problem, number, high):
        high *= 2
        if high > _MOST_NODES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if _fits_with(problem, number, middle):
            high = middle
        else:
            low = middle
    return high


def _fits_with(problem: Problem, number: int, nodes: int) -> bool:
    graph = CostGraph(_enlarged(problem.cluster, number, nodes))
    reserve = problem.constraints.memory_reserve_bytes
    chains = Chains(SeatCosts(problem.compute.on(graph), Pools(graph), reserve))
    return fits_at_all(chains, chains.costs.pools.of_types(problem.types), problem.workload.global_batch)


def _enlarged(cluster: Cluster, number: int, nodes: int) -> Cluster:
    groups = list(cluster.node_groups)
    groups[number] = replace(groups[number], nodes=groups[number].nodes + nodes)
    return replace(cluster, node_groups=tuple(groups))


def _size(size_bytes: float) -> str:
    """GiB, or MiB for the small devices of emulated clusters."""
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB else f"{size_bytes / _MIB:.2f} MiB"
