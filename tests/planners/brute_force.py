"""Every plan of a small space, priced one by one, from the space's definition alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations, product

from hypothesis import strategies as st

from hethub.planners.candidate import Part, price
from hethub.planners.chain import Chains
from hethub.planners.interface import Problem
from hethub.planners.pools import Pools
from hethub.planners.seats import Crew, SeatCosts, crew_size
from hethub.planners.space import Space, space_of
from hethub.specs.cluster import Cluster
from hethub.specs.constraints import FREE, Constraints
from tests.plan_strategies import clusters, models
from tests.planners.examples import with_memory, workload

__all__ = ["best_of_all", "set_up", "tiny_problems"]


def set_up(problem: Problem, constraints: Constraints = FREE) -> tuple[Chains, Space]:
    chains = Chains(SeatCosts(problem.compute, Pools(problem.compute.graph)))
    numbers = chains.costs.pools.of_types(None)
    return chains, space_of(chains.costs, numbers, problem.workload.global_batch, constraints)


def _crews(chains: Chains, space: Space) -> Iterator[tuple[Crew, dict[int, int]]]:
    """Every pipeline, and the groups that it takes of each (pool, degree): by itself, from the space's definition."""
    for length in range(1, space.most_pools + 1):
        for slots in permutations(space.slots, length):
            pools = [seat.pool for slot in slots for seat in slot]
            groups = all(len(slot) == 1 and slot[0].replicas == 1 for slot in slots)
            if len(set(pools)) < len(pools) or (length > 1 and not groups):
                continue
            limits = [
                min(chains.costs.pools[s.pool].unit_count(s.degree) // s.replicas for s in slot)
                for slot in slots
            ]
            for counts in product(*(range(1, limit + 1) for limit in limits)):
                crew = tuple(zip(slots, counts, strict=True))
                if crew_size(crew) <= space.most_stages:
                    used: dict[int, int] = {}
                    for slot, count in crew:
                        for seat in slot:
                            used[seat.pool] = used.get(seat.pool, 0) + seat.degree * seat.replicas * count
                    yield crew, used


def best_of_all(chains: Chains, space: Space, batch: int, *, unlike: bool = False) -> float:
    """The least closed form of all choices of pipelines (of all `unlike` ones: of two sorts or more), each priced as it
    stands beside the others."""
    entries = [(crew, rows, used) for crew, used in _crews(chains, space) for rows in space.rows]
    available = dict(zip(space.pools, space.available, strict=True))
    best = math.inf

    def further(start: int, left: dict[int, int], parts: tuple[Part, ...]) -> None:
        nonlocal best
        if len(parts) > unlike:
            # pipelines that are all single ones are dealt out alike in both ways
            for stage_major in {False, any(part.copies > 1 for part in parts)}:
                candidate = price(chains, parts, batch, stage_major=stage_major)
                if candidate is not None:
                    best = min(best, candidate.seconds)
        for place in range(start, len(entries)):
            crew, rows, used = entries[place]
            copies = 1
            while all(left[pool] >= copies * n for pool, n in used.items()) and copies <= batch:
                rest = {pool: n - copies * used.get(pool, 0) for pool, n in left.items()}
                further(place + 1, rest, (*parts, Part(crew, rows, copies)))
                copies += 1

    further(0, available, ())
    return best


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    """Few enough devices and rows to try everything."""
    cluster: Cluster = draw(clusters().filter(lambda c: len(c.devices()) <= 3))
    memory = draw(st.integers(30, 600)) * 1024
    return Problem.of(with_memory(cluster, memory), workload(draw(models()), batch=draw(st.integers(1, 5))))
