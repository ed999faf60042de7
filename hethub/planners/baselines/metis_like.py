"""The search idea of Metis, from the paper: "Metis: Fast Automatic Distributed Training on Heterogeneous GPUs" (USENIX
ATC 2024).

Devices stand in a line, type by type, in every order of the types (device placement). For every number of stages the
line is cut into device groups whose sizes are powers of two, in every order; groups much smaller than the mean are
pruned. A stage starts with data parallelism alone; where it does not fit, or in a further round, its tensor-parallel
degree doubles. A stage on several types shares the rows of a micro-batch out by their speed (data balance); layers go
to stages so that the slowest is quickest, within memory (layer balance). All is ranked by an estimate of the step.

Simplified: placements and group orders are tried up to a number, evenly picked; tensor-parallel degrees are the same in
all stages but where memory asks for more; all types of a stage have one degree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from typing import TypeVar

from hethub.planners.baselines.by_speed import Ranked, balanced_bounds, rows_by_speed
from hethub.planners.baselines.prices import Prices, price_split
from hethub.planners.baselines.split import Band, Group, Side, Split
from hethub.planners.candidate import divisors

__all__ = ["metis_like"]

_MOST_STAGES = 8
_ORDERS = 12  # of types, and of group sizes
_SMALLEST = 2  # groups are at least the mean size by this
_T = TypeVar("_T")
_Slice = tuple[tuple[int, int], ...]  # (kind, devices)


def metis_like(prices: Prices, keep: int = 1) -> Ranked:
    """The best few splits with their estimated seconds, best first."""
    found: dict[Split, float] = {}
    for slices in _placements(prices):
        for micro_batches in divisors(prices.batch):
            rows = prices.batch // micro_batches
            for degree in sorted({degree for kind in prices.kinds for degree in kind.degrees}):
                split = _strategy(prices, slices, degree, rows, micro_batches)
                if split is not None and split not in found:
                    found[split] = price_split(prices, split).step_seconds
    ranked = [(seconds, split) for split, seconds in found.items() if math.isfinite(seconds)]
    return sorted(ranked, key=lambda entry: entry[0])[:keep]


def _placements(prices: Prices) -> Iterator[tuple[_Slice, ...]]:
    """Every stage's devices, for all orders of kinds and of group sizes."""
    total = sum(kind.count for kind in prices.kinds)
    for stages in range(1, min(_MOST_STAGES, prices.decoders) + 1):
        for order in _some(list(permutations(range(len(prices.kinds))))):
            for sizes in _some(sorted(_sizes(total, stages))):
                yield _cut([(kind, prices.kinds[kind].count) for kind in order], sizes)


def _sizes(total: int, stages: int) -> set[tuple[int, ...]]:
    """Powers of two that add up to `total`, none much smaller than the mean, in all orders (up to a number)."""
    least = total / stages / _SMALLEST

    def grow(left: int, count: int, most: int) -> Iterator[tuple[int, ...]]:
        if count == 0:
            if left == 0:
                yield ()
            return
        size = most
        while size >= least:
            if size * count >= left >= size:
                for rest in grow(left - size, count - 1, size):
                    yield (size, *rest)
            size //= 2

    largest = 1 << (total.bit_length() - 1)
    return {order for sizes in grow(total, stages, largest) for order in _distinct_orders(sizes)}


def _distinct_orders(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Rotations of the falling and of the rising order: where the large groups stand."""
    for order in (sizes, sizes[::-1]):
        for start in range(len(order)):
            yield order[start:] + order[:start]


def _some(items: list[_T]) -> list[_T]:
    """At most _ORDERS of them, evenly picked."""
    step = max(1, math.ceil(len(items) / _ORDERS))
    return items[::step]


def _cut(line: list[tuple[int, int]], sizes: tuple[int, ...]) -> tuple[_Slice, ...]:
    left = list(reversed(line))
    slices = []
    for size in sizes:
        taken: list[tuple[int, int]] = []
        while size:
            kind, count = left.pop()
            part = min(size, count)
            taken.append((kind, part))
            size -= part
            if part < count:
                left.append((kind, count - part))
        slices.append(tuple(taken))
    return tuple(slices)


def _strategy(
    prices: Prices, slices: tuple[_Slice, ...], degree: int, rows: int, micro_batches: int
) -> Split | None:
    """Groups of `degree`, doubled stage by stage from the first until the layers find room."""
    degrees = [degree] * len(slices)
    widest = max(max(kind.degrees) for kind in prices.kinds)
    turn = 0
    while True:
        stages = [_sides(prices, part, own, rows) for part, own in zip(slices, degrees, strict=True)]
        if any(stage is None for stage in stages):
            return None
        known = [stage for stage in stages if stage is not None]
        bounds = balanced_bounds(prices, known)
        if bounds is not None:
            return Split(bounds, (Band(tuple(known), micro_batches),))
        if turn == len(degrees):
            if min(degrees) * 2 > widest:
                return None
            turn = 0
        degrees[turn] = min(widest, degrees[turn] * 2)
        turn += 1


def _sides(prices: Prices, part: _Slice, degree: int, rows: int) -> tuple[Side, ...] | None:
    """All devices of the stage in groups of `degree`, or None where they do not divide."""
    replicas = []
    for kind, count in part:
        if degree not in prices.kinds[kind].degrees or count % degree:
            return None
        replicas.append((Group(kind, degree), count // degree))
    if rows < sum(count for _, count in replicas):
        return None
    sides = rows_by_speed(prices, replicas, rows)
    return sides if sum(side.replicas for side in sides) == sum(count for _, count in replicas) else None
