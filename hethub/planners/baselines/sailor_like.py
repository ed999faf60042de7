"""The search idea of Sailor, written anew from the paper: "Sailor: Automating Distributed Training over Dynamic,
Heterogeneous, and Geo-distributed Clusters" (SOSP 2025, arXiv 2504.17096), section on the planner. Where the paper
leaves it open (equal stages, the order and choice of degrees) it does what the public artifact was seen to do.

For every number of stages (equal layers) and every micro-batch, from the largest data-parallel degree down: dynamic
programming over the stages, first to last, chooses for each what its replicas stand on, with what is left of each kind;
a candidate's step is that of its slowest stage times the micro-batches, plus all stages and the slowest reduction.
Its heuristics: tensor parallelism stays in a node; of the degrees of a type the least that fits, or wider ones alike in
all stages; data-parallel degrees only where the number of micro-batches changes, largest first, until they get no
better; zones of a region count as one, replicas of a stage stay in one region. All replicas of a plan take equal rows.

Simplified: where a stage stands on two types, its replicas are shared out by what is left of each (the paper tries all
counts; the step depends on which types are there, not on how many); of partial plans only the best few are kept (beam);
budgets and costs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

from hethub.planners.baselines.prices import Late, Prices, never, price_split
from hethub.planners.baselines.split import Band, Group, Side, Split

__all__ = ["equal_layers", "sailor_like"]

_BEAM = 16  # partial plans that are followed from stage to stage
_PATIENCE = 4  # smaller data-parallel degrees in a row that may be worse
_MOST_STAGES = 12
_FEW_TYPES = 2
_Stage = tuple[Side, ...]


class _Partial(NamedTuple):
    """Stages chosen so far, what is left of each kind, and the estimate so far."""

    estimate: float
    left: tuple[int, ...]
    stages: tuple[_Stage, ...]
    slowest: float
    total: float
    reduce: float


def sailor_like(prices: Prices, keep: int = 1, late: Late = never) -> list[tuple[float, Split]]:
    """The best few splits with their estimated seconds, best first."""
    found: dict[Split, float] = {}
    for stages in range(1, min(_MOST_STAGES, prices.decoders) + 1):
        bounds = equal_layers(prices.decoders + 2, stages)
        for rows, widening in product(prices.priced_rows, _widenings(prices)):
            menus = [_menu(prices, bounds, stage, rows, widening) for stage in range(stages)]
            if not all(menus) or late():
                continue
            worse, best = 0, math.inf
            for replicas in _degrees(prices, menus, rows):
                split = _search(prices, bounds, menus, rows, replicas)
                if split is None:
                    continue
                seconds = price_split(prices, split).step_seconds
                found[split] = seconds
                worse, best = (0, seconds) if seconds < best else (worse + 1, best)
                if worse == _PATIENCE or late():
                    break
    ranked = sorted(((seconds, split) for split, seconds in found.items()), key=lambda entry: entry[0])
    return ranked[:keep]


def equal_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Bounds of equal ranges, the earlier ones larger by one where it does not divide."""
    each, more = divmod(layers, stages)
    return tuple(stage * each + min(stage, more) for stage in range(stages + 1))


def _widenings(prices: Prices) -> Iterator[dict[str, int]]:
    """How often the least degree that fits is doubled, by device type; of many types, alike for all."""
    types = sorted({kind.device_type for kind in prices.kinds})
    steps = max(len(kind.degrees) for kind in prices.kinds)
    if len(types) > _FEW_TYPES:
        yield from (dict.fromkeys(types, doublings) for doublings in range(steps))
        return
    for doublings in product(range(steps), repeat=len(types)):
        yield dict(zip(types, doublings, strict=True))


def _menu(
    prices: Prices, bounds: tuple[int, ...], stage: int, rows: int, widening: dict[str, int]
) -> dict[int, Group]:
    """By kind, the group that a replica of this stage would be."""
    layers, later = (bounds[stage], bounds[stage + 1]), len(bounds) - 2 - stage
    menu = {}
    for number, kind in enumerate(prices.kinds):
        groups = [Group(number, degree) for degree in kind.degrees]
        fitting = [group for group in groups if prices.fits(group, rows, layers, later)]
        wanted = fitting[widening[kind.device_type] :]
        if wanted and math.isfinite(float(prices.layer_seconds(wanted[0], rows)[-1])):
            menu[number] = wanted[0]
    return menu


def _degrees(prices: Prices, menus: Sequence[dict[int, Group]], rows: int) -> Iterator[int]:
    """Data-parallel degrees, largest first, each the least with its number of micro-batches."""
    total = math.ceil(prices.batch / rows)
    room = sum(
        kind.count // min((menu[number].degree for menu in menus if number in menu), default=kind.count + 1)
        for number, kind in enumerate(prices.kinds)
    )
    most = min(total, room // len(menus))
    counts = sorted({math.ceil(total / math.ceil(total / replicas)) for replicas in range(1, most + 1)})
    yield from reversed(counts)


def _search(
    prices: Prices, bounds: tuple[int, ...], menus: list[dict[int, Group]], rows: int, replicas: int
) -> Split | None:
    """Stage by stage, the best few partial plans."""
    micro_batches = math.ceil(prices.batch / (rows * replicas))
    partials = [_Partial(0.0, tuple(kind.count for kind in prices.kinds), (), 0.0, 0.0, 0.0)]
    for stage in range(len(menus)):
        grown: dict[tuple[tuple[int, ...], _Stage], _Partial] = {}
        for partial in partials:
            for sides in _choices(prices, menus[stage], partial.left, rows, replicas):
                longer = _grow(prices, partial, sides, bounds, stage, micro_batches)
                key = (longer.left, sides)
                if key not in grown or longer.estimate < grown[key].estimate:
                    grown[key] = longer
        partials = sorted(grown.values(), key=lambda partial: partial.estimate)[:_BEAM]
    if not partials:
        return None
    return Split(bounds, (Band(partials[0].stages, micro_batches),))


def _choices(
    prices: Prices, menu: dict[int, Group], left: tuple[int, ...], rows: int, replicas: int
) -> Iterator[_Stage]:
    """One kind, or two of a region."""
    rooms = {number: left[number] // group.degree for number, group in menu.items()}
    for number, room in rooms.items():
        if room >= replicas:
            yield (Side(menu[number], rows, replicas),)
    for one, other in combinations(rooms, 2):
        if prices.kinds[one].region == prices.kinds[other].region:
            first = _shared(rooms[one], rooms[other], replicas)
            if 0 < first < replicas:
                yield (Side(menu[one], rows, first), Side(menu[other], rows, replicas - first))


def _shared(room: int, other: int, replicas: int) -> int:
    """Replicas on the first of two kinds, by room; 0 where there is too little."""
    if room + other < replicas:
        return 0
    return min(room, max(replicas - other, round(replicas * room / (room + other))))


def _grow(
    prices: Prices, partial: _Partial, sides: _Stage, bounds: tuple[int, ...], stage: int, micro_batches: int
) -> _Partial:
    layers = (bounds[stage], bounds[stage + 1])
    seconds = 0.0
    for side in sides:
        summed = prices.layer_seconds(side.group, side.rows)
        seconds = max(seconds, float(summed[layers[1]] - summed[layers[0]]))
    if partial.stages:
        before, after = partial.stages[-1][0], sides[0]
        seconds += prices.forth_seconds(before.group, after.group, layers[0] - 1, after.rows)
        seconds += prices.back_seconds(after.group, before.group, layers[0], after.rows)
    slowest, total = max(partial.slowest, seconds), partial.total + seconds
    groups = tuple(side.group for side in sides)
    count = sum(side.replicas for side in sides)
    reduce = max(partial.reduce, prices.reduce_seconds(groups, count, layers))
    left = list(partial.left)
    for side in sides:
        left[side.group.kind] -= side.replicas * side.group.degree
    estimate = (micro_batches - 1) * slowest + total + reduce
    return _Partial(estimate, tuple(left), (*partial.stages, sides), slowest, total, reduce)
