"""The plan space of a search, in counts of interchangeable devices: which stages there can be, and how many rows.

A pipeline is a sequence of *runs*; a run is one *slot* (who works in a stage) repeated. Runs of one pipeline use
different pools. A slot is a tensor-parallel group of one pool, a few alike ones that share the rows, or, on small
clusters, groups of several pools that share the rows by speed. What the devices hold (layers, recomputation,
micro-batches in flight) follows from the sequence, see `chain.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from hethub.planners.pools import Pool
from hethub.planners.seats import Seat, SeatCosts, Slot
from hethub.specs.constraints import FREE, Constraints

__all__ = ["WORTH", "Space", "degrees", "space_of"]

_SMALL = 16  # devices; up to here stages of several replicas and of several pools are part of the space
_SMALL_POOLS = 10  # with more there are too many pipelines to enumerate, however few devices
_FEW_POOLS = 6  # of which any may share a stage
_REPLICAS = 2  # of one pool in one stage; more are as good as more pipelines
_STAGES = 64  # of a pipeline, on large clusters
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a micro-batch
WORTH = 0.98  # of the best seconds a row so far: a larger micro-batch must be quicker than that


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """`available[i]` devices of pool `pools[i]` may be used (all must, with `use_all`); pipelines of at most
    `most_stages` stages on at most `most_pools` pools each, micro-batches of `rows`. `small`: all is enumerated."""

    pools: tuple[int, ...]
    available: tuple[int, ...]
    slots: tuple[Slot, ...]
    rows: tuple[int, ...]
    most_stages: int
    most_pools: int
    use_all: bool
    small: bool


def degrees(pool: Pool, kv_heads: int, constraints: Constraints = FREE) -> list[int]:
    """Tensor-parallel degrees worth trying: powers of two and the whole node, no more than key-value groups; where the
    user names degrees, those of them that the node and the model allow. Where every device must work, none whose groups
    spoil others, which count as taken."""
    found = _degrees(pool, kv_heads, constraints)
    return [d for d in found if not constraints.use_all or pool.unit_devices(d) == d]


def _degrees(pool: Pool, kv_heads: int, constraints: Constraints) -> list[int]:
    most = min(pool.node_size, kv_heads)
    named = constraints.tensor_parallel.get(pool.known_name)
    if named is not None:
        return sorted(d for d in set(named) if d <= most)
    powers = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
    return powers if pool.node_size > kv_heads or pool.node_size in powers else [*powers, pool.node_size]


def space_of(
    costs: SeatCosts,
    pools: Sequence[int],
    batch: int,
    constraints: Constraints = FREE,
    available: Mapping[int, int] | None = None,
) -> Space:
    """The space over these pools for a batch of `batch` rows; `available` devices of each (None: all)."""
    model = costs.compute.workload.model
    counts = {n: costs.pools[n].count for n in pools}
    if available is not None:
        counts = {n: min(count, available[n]) for n, count in counts.items()}
    total = sum(counts.values())
    small = total <= _SMALL and len(counts) <= _SMALL_POOLS
    each = {n: degrees(costs.pools[n], model.kv_heads, constraints) for n in pools}
    slots: list[Slot] = []
    for pool in pools:
        for degree in each[pool]:
            most = min(_REPLICAS if small else 1, costs.pools[pool].unit_count(degree), batch)
            slots += [(Seat(pool, degree, count),) for count in range(1, most + 1)]
    if small and constraints.same_stage:
        slots += _mixed(costs, pools, each, batch)
    most_stages = model.layers + 2 if small else min(model.layers + 2, _STAGES)
    if constraints.max_pipeline is not None:
        most_stages = min(most_stages, constraints.max_pipeline)
    return Space(
        pools=tuple(pools),
        available=tuple(counts.values()),
        slots=tuple(slots),
        rows=_rows(costs, slots, batch),
        most_stages=most_stages,
        most_pools=min(len(pools), 3 if small else 2),
        use_all=constraints.use_all,
        small=small,
    )


def _mixed(costs: SeatCosts, pools: Sequence[int], each: dict[int, list[int]], batch: int) -> list[Slot]:
    """Groups of several pools: all of them shared out evenly among one, two, ... stages. Of many pools any two, any
    three, and all."""
    found: dict[Slot, None] = {}
    counts = range(2, len(pools) + 1) if len(pools) <= _FEW_POOLS else (2, 3, len(pools))
    for count in counts:
        for chosen in combinations(pools, count):
            for pick in product(*(each[n] for n in chosen)):
                units = [costs.pools[n].unit_count(d) for n, d in zip(chosen, pick, strict=True)]
                for stages in range(1, min(units, default=0) + 1):
                    seats = [Seat(n, d, u // stages) for n, d, u in zip(chosen, pick, units, strict=True)]
                    if sum(seat.replicas for seat in seats) <= batch:
                        found[tuple(seats)] = None
    return list(found)


def _rows(costs: SeatCosts, slots: Sequence[Slot], batch: int) -> tuple[int, ...]:
    """One row, what stages of several replicas need, and more where some group is quicker for each row then."""
    groups = {(seat.pool, seat.degree) for slot in slots for seat in slot}
    needed = max((sum(seat.replicas for seat in slot) for slot in slots), default=1)
    best = {group: sum(costs.cost(*group, 1).decoder) for group in groups}
    kept = [1]
    for rows in _ROWS[1:]:
        if rows > batch:
            break
        each = {group: sum(costs.cost(*group, rows).decoder) / rows for group in groups}
        quicker = [group for group in groups if each[group] < WORTH * best[group]]
        if quicker or rows <= needed:
            kept.append(rows)
        best.update({group: each[group] for group in quicker})
    return tuple(kept)
