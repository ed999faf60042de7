"""Which pipelines to build of which devices: the named families of splits that the first planner looks at.

chain: one pipeline shape over all pools, repeated; each pool gives whole stages.
beside: pipelines of one pool each, side by side.
mixed: every stage has replicas of every pool, which take rows by speed.
parts: on small clusters, pipelines of different devices side by side, in every way to share the devices out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import permutations, product

from hethub.planners.candidate import Team, divisors
from hethub.planners.pools import Pool
from hethub.planners.seats import Crew, Seat, SeatCosts

__all__ = ["combinations", "degrees", "orders", "teams"]

_SMALL = 16  # devices; up to here `parts` are enumerated
_THREE_PARTS = 10  # devices; up to here in three parts as well
_PRODUCT = 20  # most combinations of tensor-parallel degrees that are all tried
_MOST_REPLICAS = 4  # replicas of a stage within a pipeline; more are better placed as more pipelines


def degrees(pool: Pool, kv_heads: int) -> list[int]:
    """Tensor-parallel degrees worth trying: powers of two and the whole node, no more than key-value
    groups."""
    most = min(pool.node_size, kv_heads)
    powers = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
    return powers if pool.node_size > kv_heads or pool.node_size in powers else [*powers, pool.node_size]


def orders(costs: SeatCosts, pools: Iterable[int]) -> list[tuple[int, ...]]:
    """Orders of pools along a pipeline: most memory first, its reverse, and further ones: all where pools
    are few, else as in the spec, by speed, and their reverses."""
    numbers = tuple(pools)
    memory = tuple(sorted(numbers, key=lambda n: (-costs.pools[n].type.memory_bytes, n)))
    found = [memory, memory[::-1]]
    if len(numbers) <= 3:
        found += permutations(memory)
    else:
        speed = tuple(sorted(numbers, key=lambda n: (sum(costs.cost(n, 1, 1).decoder), n)))
        found += [numbers, numbers[::-1], speed, speed[::-1]]
    return list(dict.fromkeys(found))


def teams(costs: SeatCosts, numbers: tuple[int, ...], batch: int) -> Iterator[Team]:
    """All teams of all families over the pools `numbers`; the same team may come twice."""
    pools, layers = costs.pools, costs.compute.workload.model.layers
    for chosen in _choices(numbers):
        for combination in combinations(costs, chosen):
            units = {n: pools[n].unit_count(d) for n, d in combination.items()}
            if not all(units.values()):
                continue
            yield from _chain(combination, units, batch)
            if len(chosen) > 1:
                yield from _mixed(combination, units, layers, batch)
                yield from _beside(combination, units, layers, batch)
            if sum(pools[n].count for n in chosen) <= _SMALL:
                yield from _parts(combination, units, batch)


def _choices(numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Pools in use: all of them, all but one, and each alone."""
    found = [numbers]
    if len(numbers) > 1:
        found += [tuple(n for n in numbers if n != left) for left in numbers]
        found += [(n,) for n in numbers]
    return list(dict.fromkeys(found))


def combinations(costs: SeatCosts, chosen: Sequence[int]) -> Iterator[dict[int, int]]:
    """Tensor-parallel degree of each pool: all combinations where they are few, else alike as far as
    possible."""
    kv_heads = costs.compute.workload.model.kv_heads
    each = [degrees(costs.pools[n], kv_heads) for n in chosen]
    count = 1
    for options in each:
        count *= len(options)
    if count <= _PRODUCT:
        picks: Iterable[tuple[int, ...]] = product(*each)
    else:
        steps = sorted({d for options in each for d in options})
        alike = [tuple(max(d for d in options if d <= step) for options in each) for step in steps]
        picks = dict.fromkeys(alike)
    for pick in picks:
        yield dict(zip(chosen, pick, strict=True))


def _repeats(units: dict[int, int], batch: int) -> list[int]:
    """Numbers of alike pipelines: all up to 16, and beyond those that leave no unit of some pool over."""
    most = min(batch, max(units.values()))
    beyond = {d for count in (*units.values(), sum(units.values())) for d in divisors(count)}
    return [p for p in range(1, most + 1) if p <= _SMALL or p in beyond]


def _chain(combination: dict[int, int], units: dict[int, int], batch: int) -> Iterator[Team]:
    for copies in _repeats(units, batch):
        for replicas in _replica_choices(combination, units, copies):
            crew = tuple(
                ((Seat(pool, degree, replicas[pool]),), units[pool] // (copies * replicas[pool]))
                for pool, degree in combination.items()
            )
            if all(count for _, count in crew):
                yield Team("chain", ((crew, copies),))


def _replica_choices(
    combination: dict[int, int], units: dict[int, int], copies: int
) -> Iterator[dict[int, int]]:
    """Replicas of each pool's stages: one everywhere, or more in one pool."""
    yield dict.fromkeys(combination, 1)
    for pool in combination:
        for count in range(2, min(_MOST_REPLICAS, units[pool] // copies) + 1):
            yield {**dict.fromkeys(combination, 1), pool: count}


def _mixed(combination: dict[int, int], units: dict[int, int], layers: int, batch: int) -> Iterator[Team]:
    for copies in _repeats(units, batch):
        for stages in range(1, min(min(units.values()) // copies, layers + 2) + 1):
            slot = tuple(Seat(pool, d, units[pool] // (copies * stages)) for pool, d in combination.items())
            if sum(seat.replicas for seat in slot) * copies <= batch:
                yield Team("mixed", ((((slot, stages),), copies),))


def _beside(combination: dict[int, int], units: dict[int, int], layers: int, batch: int) -> Iterator[Team]:
    """One pool's pipelines beside the others'; all pools cut into the same number of stages, or nearly."""
    for stages in range(1, min(max(units.values()), layers + 2) + 1):
        crews = []
        for pool, degree in combination.items():
            own = min(stages, units[pool])
            crews.append(((((Seat(pool, degree, 1),), own),), units[pool] // own))
        if sum(copies for _, copies in crews) <= batch:
            yield Team("beside", tuple(crews))


def _parts(combination: dict[int, int], units: dict[int, int], batch: int) -> Iterator[Team]:
    """Two or three pipelines of any of the units; a single one is a chain already."""
    pools = tuple(combination)
    for parts in (2, 3) if sum(units.values()) <= _THREE_PARTS else (2,):
        if parts > batch:
            break
        for division in _divisions(tuple(units.values()), parts):
            crews: dict[Crew, int] = {}
            for counts in division:
                crew = tuple(
                    ((Seat(pool, combination[pool], 1),), count)
                    for pool, count in zip(pools, counts, strict=True)
                    if count
                )
                crews[crew] = crews.get(crew, 0) + 1
            if len(crews) > 1:  # alike parts are a chain
                yield Team("parts", tuple(crews.items()))


@cache
def _divisions(counts: tuple[int, ...], parts: int) -> list[tuple[tuple[int, ...], ...]]:
    """Ways to share counts out into so many parts that hold something, the parts in falling order."""
    if parts == 1:
        return [(counts,)] if any(counts) else []
    found = []
    for first in product(*(range(count + 1) for count in counts)):
        if any(first):
            rest = tuple(count - own for count, own in zip(counts, first, strict=True))
            found += [(first, *others) for others in _divisions(rest, parts - 1) if others[0] <= first]
    return found
