"""Rules of thumb: rows by speed, layers by speed, and the cut that balances given stages."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import numpy as np

from hethub.apportion import apportion
from hethub.planners.baselines.prices import Floats, Late, Prices, never, price_split, split_fits
from hethub.planners.baselines.split import Band, Group, Side, Split
from hethub.planners.candidate import divisors

__all__ = ["balanced_bounds", "data_parallel_by_speed", "pipeline_by_speed", "rows_by_speed"]

_HALVINGS = 14  # of the bisection for the slowest stage's seconds
Ranked = list[tuple[float, Split]]


def data_parallel_by_speed(prices: Prices, keep: int = 1, late: Late = never) -> Ranked:
    """Every replica holds the whole model, on the least degree that fits, and takes rows by its speed."""
    whole = (0, prices.decoders + 2)
    splits = []
    for micro_batches in divisors(prices.batch):
        if late():
            break
        rows = prices.batch // micro_batches
        for most in prices.priced_rows:
            groups = [_least(prices, number, most, whole) for number in range(len(prices.kinds))]
            replicas = [(g, prices.kinds[g.kind].groups(g.degree)) for g in groups if g is not None]
            sides = rows_by_speed(prices, replicas, rows)
            if sides and max(side.rows for side in sides) <= most:
                splits.append(Split(whole, (Band((sides,), micro_batches),)))
                break
    return _ranked(prices, splits, keep)


def _least(prices: Prices, kind: int, rows: int, layers: tuple[int, int]) -> Group | None:
    groups = (Group(kind, degree) for degree in prices.kinds[kind].degrees)
    return next((group for group in groups if prices.fits(group, rows, layers, 0)), None)


def pipeline_by_speed(prices: Prices, keep: int = 1, late: Late = never) -> Ranked:
    """Every stage is a node of one kind, with layers by its speed; alike pipelines, as many as divide all nodes."""
    nodes = [kind.count // kind.node_size for kind in prices.kinds]
    splits = []
    for repeat in divisors(reduce(math.gcd, nodes)):
        if late():
            break
        each = [count // repeat for count in nodes]
        for rows in prices.priced_rows:
            split = _layers_by_speed(prices, each, rows, repeat)
            if split is not None:
                splits.append(split)
    return _ranked(prices, splits, keep)


def _layers_by_speed(prices: Prices, nodes: list[int], rows: int, repeat: int) -> Split | None:
    stages: list[tuple[Side, ...]] = []
    speeds: list[float] = []
    width = max(kind.node_size // kind.degrees[-1] for kind in prices.kinds)
    for number, kind in enumerate(prices.kinds):
        group, replicas = Group(number, kind.degrees[-1]), kind.node_size // kind.degrees[-1]
        own = rows * width // replicas
        seconds = float(prices.layer_seconds(group, own)[-1])
        if rows * width % replicas or not math.isfinite(seconds):
            return None
        stages += [(Side(group, own, replicas),)] * nodes[number]
        speeds += [1 / seconds] * nodes[number]
    batch = rows * width * repeat
    if len(stages) > prices.decoders or prices.batch % batch:
        return None
    decoders = apportion(prices.decoders, speeds, 1)
    bounds = (0, *(1 + end for end in accumulate(decoders[:-1])), prices.decoders + 2)
    return Split(bounds, (Band(tuple(stages), prices.batch // batch, repeat),))


def _ranked(prices: Prices, splits: Sequence[Split], keep: int) -> Ranked:
    fitting = [split for split in splits if split_fits(prices, split)]
    ranked = [(price_split(prices, split).step_seconds, split) for split in fitting]
    return sorted((entry for entry in ranked if math.isfinite(entry[0])), key=lambda entry: entry[0])[:keep]


def rows_by_speed(prices: Prices, replicas: Sequence[tuple[Group, int]], rows: int) -> tuple[Side, ...]:
    """A micro-batch's rows over (group, how many), by each one's speed at its even share; nobody with 0 is kept."""
    total = sum(count for _, count in replicas)
    if not total:
        return ()
    near = max((r for r in prices.priced_rows if r <= rows / total), default=prices.priced_rows[0])
    weights, groups = [], []
    for group, count in replicas:
        seconds = float(prices.layer_seconds(group, near)[-1])
        if math.isfinite(seconds):
            weights += [1 / seconds] * count
            groups += [group] * count
    if not groups:
        return ()
    shares = Counter(zip(groups, apportion(rows, weights), strict=True))
    return tuple(Side(group, own, count) for (group, own), count in shares.items() if own)


def balanced_bounds(prices: Prices, stages: Sequence[tuple[Side, ...]]) -> tuple[int, ...] | None:
    """The cut whose slowest stage is quickest, within memory, or None where nothing fits. Every stage has a layer."""
    summed = [[(side, prices.layer_seconds(side.group, side.rows)) for side in stage] for stage in stages]
    high = max(float(times[-1]) for stage in summed for _, times in stage)
    if not math.isfinite(high) or len(stages) > prices.decoders + 2:
        return None
    best = _filled(prices, summed, high)
    low = 0.0
    for _ in range(_HALVINGS if best else 0):
        middle = (low + high) / 2
        found = _filled(prices, summed, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _filled(
    prices: Prices, summed: Sequence[Sequence[tuple[Side, Floats]]], limit: float
) -> tuple[int, ...] | None:
    """Every stage takes as many layers as fit and last at most `limit` seconds, and leaves one to each later stage."""
    end = prices.decoders + 2
    bounds = [0]
    for number, stage in enumerate(summed):
        later = len(summed) - 1 - number
        first, last = bounds[-1], end - later
        for side, times in stage:
            last = min(last, int(np.searchsorted(times, times[first] + limit, side="right")) - 1)
            last = _most_that_fit(prices, side, first, last, later)
        if last <= first:
            return None
        bounds.append(last)
    return tuple(bounds) if bounds[-1] == end else None


def _most_that_fit(prices: Prices, side: Side, first: int, last: int, later: int) -> int:
    """The end, at most `last`, of the longest stage from `first` that fits; more layers never take less memory."""
    if last <= first or prices.fits(side.group, side.rows, (first, last), later):
        return last
    ends = range(first + 1, last)
    return first + bisect_left(
        ends, True, key=lambda end: not prices.fits(side.group, side.rows, (first, end), later)
    )
