"""Our search under a published cost model: unlike pipelines side by side, each with its own micro-batches.

Published searches give all replicas equal rows and one number of micro-batches, so the step is the straggler's. Here
pipelines of several shapes share one cut of the layers. For a deadline every shape has a number of rows that it
finishes, whole micro-batches only; which shapes to use, and how often, is then an integer knapsack over the devices of
each kind, solved exactly by dynamic programming over counts, and the least deadline by which the whole batch is done is
found by bisection. Gradients are reduced over all replicas of a stage, whose time depends on which groups stand there
(`Prices.reduce_seconds`): so each knapsack is over the shapes that reduce no slower than one of them, the seed, alone.
Seeds are tried in the order of a lower bound, until that is above the best found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from hethub.planners.baselines import least
from hethub.planners.baselines.columns import Columns, Ints, Shapes, Tables, cuts, finished, worth
from hethub.planners.baselines.prices import Floats, Prices, price_split
from hethub.planners.baselines.split import Group, Split

__all__ = ["Answer", "deadline_search", "least_seconds"]

_SLACK = {
    1: 0.0,
    2: 12.0,
    3: 6.0,
}  # layers by which a stage may differ from the mean, by the number of stages
_SEEDS = 400  # tried at most
_SEEDS_OF_A_CUT = 3
_TILTS = (1e-3, 0.3, 0.6, 0.8, 1.0, 1.25, 1.6, 3.0, 1e3)  # of the exchange rate of kinds, tried for the bound
_MORE = 1.02  # the reduction may take so much longer than a seed's
_STEPS = 12  # of the bisection for the deadline


@dataclass(frozen=True, slots=True)
class Answer:
    """The best split found, its seconds, how many pipelines were priced, and the least that any mix of them in one cut
    could take were devices exchangeable and micro-batches divisible."""

    split: Split
    step_seconds: float
    considered: int
    bound_seconds: float


@dataclass(frozen=True, slots=True)
class _Seed:
    """A column, and what the gradients' reduction may take: as where all pipelines are like it, or where other kinds
    join its stages. `copies` is how many pipelines stand there then."""

    bound_seconds: float
    number: int
    shapes: Shapes
    columns: Columns
    reduce_seconds: float
    copies: int

    @property
    def after_seconds(self) -> float:
        """From the last pipeline's end to the step's."""
        return self.reduce_seconds + float(self.columns.update[self.number])


def deadline_search(prices: Prices) -> Answer | None:
    """Find a split; None where no pipeline of up to three stages fits."""
    tables = Tables(prices)
    counts = [kind.count for kind in prices.kinds]
    seeds: list[_Seed] = []
    considered = 0
    speeds = _speeds(prices)
    for stages, slack in _SLACK.items():
        if stages > prices.decoders:
            break
        shapes = tables.shapes(stages)
        if not len(shapes.rows):
            break  # fewer devices than stages
        fleet = worth(speeds, shapes.use, counts)
        for bounds in cuts(tables.layers, stages, slack):
            columns = tables.columns(shapes, bounds)
            alone = columns.alone_seconds(shapes, fleet, prices.batch)
            considered += int(np.isfinite(alone).sum())
            seeds += _seeds(alone, shapes, columns)
    seeds = sorted(seeds, key=lambda seed: seed.bound_seconds)[:_SEEDS]
    seeds = [settled for seed in seeds for settled in _settled(prices, seed, counts)]
    seeds.sort(key=lambda seed: seed.bound_seconds)
    best: tuple[float, Split] | None = None
    for seed in seeds:
        if best is not None and seed.bound_seconds >= best[0]:
            break
        found = _mix(prices, seed, counts, math.inf if best is None else best[0])
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    return None if best is None else Answer(best[1], best[0], considered, seeds[0].bound_seconds)


def least_seconds(prices: Prices, step_seconds: float) -> float:
    """No mix of pipelines of this search's cuts takes less, nor as long as `step_seconds` where it is quicker than
    that."""
    return least.least_seconds(prices, step_seconds, _SLACK)


def _speeds(prices: Prices) -> list[float]:
    """Rows per second of one device of each kind, at its best."""
    speeds = []
    for number, kind in enumerate(prices.kinds):
        tried = [(rows, degree) for rows in prices.priced_rows for degree in kind.degrees]
        seconds = [float(prices.layer_seconds(Group(number, d), rows)[-1]) * d / rows for rows, d in tried]
        speeds.append(1 / min(seconds))
    return speeds


def _seeds(alone: Floats, shapes: Shapes, columns: Columns) -> Iterator[_Seed]:
    """The best few columns of a cut that reduce unlike each other, quickest first."""
    order = np.argsort(alone)[: 40 * _SEEDS_OF_A_CUT]
    reductions: list[float] = []
    for number in order:
        reduce = float(columns.reduce[number])
        if math.isinf(alone[number]) or len(reductions) == _SEEDS_OF_A_CUT:
            return
        if all(abs(reduce - other) > 0.05 * other for other in reductions):
            reductions.append(reduce)
            copies = int(shapes.copies[number])
            yield _Seed(float(alone[number]), int(number), shapes, columns, reduce, copies)


def _settled(prices: Prices, seed: _Seed, counts: Sequence[int]) -> Iterator[_Seed]:
    """The seed with the reduction of just as many pipelines; and where groups of all kinds, of its degrees, stand in
    its stages, if that takes longer."""
    alone = _reduce_seconds(prices, seed, seed.copies, join=False)
    yield _with_reduce(seed, alone, seed.copies)
    copies = sum(counts) // int(seed.shapes.use[seed.number].sum())
    together = _reduce_seconds(prices, seed, copies, join=True)
    if together > alone * _MORE:
        yield _with_reduce(seed, together, copies)


def _with_reduce(seed: _Seed, seconds: float, copies: int) -> _Seed:
    bound = seed.bound_seconds - seed.reduce_seconds + seconds
    return replace(seed, bound_seconds=bound, reduce_seconds=seconds, copies=copies)


def _reduce_seconds(prices: Prices, seed: _Seed, copies: int, *, join: bool) -> float:
    shapes = seed.shapes
    slowest = 0.0
    for seat, span in zip(shapes.chains[seed.number], pairwise(seed.columns.bounds), strict=True):
        own, replicas = shapes.seats[seat]
        alike = {group for group, _ in shapes.seats if group.degree == own.degree} if join else {own}
        slowest = max(slowest, prices.reduce_seconds(tuple(alike), replicas * copies, span))
    return slowest


def _mix(prices: Prices, seed: _Seed, counts: Sequence[int], limit: float) -> tuple[float, Split] | None:
    """The best mix of shapes that may stand beside the seed's, with its seconds, if quicker than `limit`."""
    columns, shapes = seed.columns, seed.shapes
    after = seed.after_seconds
    allowed = np.flatnonzero(_beside(prices, seed) & np.isfinite(columns.slowest))
    bound = max(seed.bound_seconds, _bound(prices, seed, allowed, counts))
    if bound >= limit:
        return None
    knapsack = _Knapsack(shapes.use[allowed], counts)
    low = max(0.0, bound - after)
    high = limit - after if math.isfinite(limit) else 2 * low
    chosen = None
    for step in range(_STEPS):
        middle = high if step == 0 else (low + high) / 2
        micro_batches = finished(columns, allowed, middle)
        taken = knapsack.fill(micro_batches * shapes.rows[allowed], prices.batch)
        if taken is None:
            if step == 0:
                return None
            low = middle
        else:
            high, chosen = middle, (taken, micro_batches)
    if chosen is None:
        return None
    taken, micro_batches = chosen
    bands = tuple(
        shapes.band(int(allowed[place]), int(micro_batches[place]), repeat) for place, repeat in taken
    )
    split = Split(columns.bounds, bands)
    return price_split(prices, split).step_seconds, split


def _bound(prices: Prices, seed: _Seed, allowed: Ints, counts: Sequence[int]) -> float:
    """As `seed.bound_seconds`, of these shapes only, at the best exchange rate."""
    return _least_pipeline(prices, seed.shapes, seed.columns, allowed, counts) + seed.after_seconds


def _least_pipeline(
    prices: Prices, shapes: Shapes, columns: Columns, allowed: Ints, counts: Sequence[int]
) -> float:
    """What some pipeline of any mix of these shapes takes, at the exchange rate of the kinds that makes it largest: the
    dual of the knapsack without whole numbers."""
    speeds = np.array(_speeds(prices))
    best = 0.0
    for tilts in product(_TILTS, repeat=len(counts) - 1):
        fleet = worth(speeds * np.array([1.0, *tilts]), shapes.use[allowed], counts)
        pipeline = prices.batch / (fleet * shapes.rows[allowed]) - 1
        least = float((pipeline * columns.slowest[allowed] + columns.total[allowed]).min())
        best = max(best, least)
    return best


def _beside(prices: Prices, seed: _Seed) -> npt.NDArray[np.bool_]:
    """Shapes that alone, and whose groups beside the seed's in a stage, reduce no slower than the seed."""
    shapes, columns = seed.shapes, seed.columns
    limit = seed.reduce_seconds * _MORE
    found = columns.reduce <= max(limit, float(columns.reduce[seed.number]) * _MORE)
    for number, span in enumerate(pairwise(columns.bounds)):
        own, replicas = shapes.seats[shapes.chains[seed.number, number]]
        good = [
            prices.reduce_seconds(tuple({own, group}), replicas * seed.copies, span) <= limit
            for group, _ in shapes.seats
        ]
        found &= np.array(good)[shapes.chains[:, number]]
    return found


class _Knapsack:
    """Most rows from devices of each kind: exact dynamic programming over counts, in steps that divide all shapes."""

    def __init__(self, use: Ints, counts: Sequence[int]) -> None:
        self._unit = int(np.gcd.reduce(use, axis=None))
        self._shape = tuple(count // self._unit + 1 for count in counts)
        keys, self._sort = np.unique(use // self._unit, axis=0, return_inverse=True)
        self._keys = [tuple(int(n) for n in key) for key in keys]

    def fill(self, rows: Ints, wanted: int) -> list[tuple[int, int]] | None:
        """(place in `rows`, how often) of a choice with at least `wanted` rows, or None."""
        best = np.full(len(self._keys), -1)
        order = np.argsort(rows, kind="stable")
        best[self._sort[order]] = order  # the last one written has the most rows
        gains = rows[best]
        table = np.zeros(self._shape, dtype=np.int64)
        steps: list[tuple[int, int, npt.NDArray[np.bool_]]] = []
        for item in self._worthy(gains):
            times, key = 1, self._keys[item]
            while all(times * n < size for n, size in zip(key, self._shape, strict=True)):
                steps.append((item, times, _shifted_max(table, key, times, int(gains[item]))))
                times *= 2
        if table.max() < wanted:
            return None
        place = [int(n) for n in np.unravel_index(int(table.argmax()), self._shape)]
        taken: dict[int, int] = {}
        for item, times, better in reversed(steps):
            if better[tuple(place)]:
                taken[item] = taken.get(item, 0) + times
                place = [p - times * n for p, n in zip(place, self._keys[item], strict=True)]
        return [(int(best[item]), repeat) for item, repeat in taken.items()]

    def _worthy(self, gains: Ints) -> list[int]:
        """Items that another does not beat with no more of any device."""
        keys = np.array(self._keys)
        kept: list[int] = []
        for item in np.argsort(-gains / np.maximum(1, keys.sum(axis=1)), kind="stable"):
            if gains[item] <= 0:
                continue
            beaten = any(
                (keys[other] * (gains[item] / gains[other]) <= keys[item]).all()
                and (keys[other] <= keys[item]).all()
                and gains[other] * int((keys[item] // np.maximum(keys[other], 1)).min()) >= gains[item]
                for other in kept
            )
            if not beaten:
                kept.append(int(item))
        return kept


def _shifted_max(table: Ints, key: tuple[int, ...], times: int, gain: int) -> npt.NDArray[np.bool_]:
    """Take an item `times` where that gives more rows; where it did."""
    target = tuple(slice(times * n, None) for n in key)
    source = tuple(slice(0, size - times * n) for n, size in zip(key, table.shape, strict=True))
    offered = table[source] + times * gain
    better = np.zeros(table.shape, dtype=bool)
    better[target] = offered > table[target]
    table[target] = np.maximum(table[target], offered)
    return better
