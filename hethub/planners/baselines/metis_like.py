"""The search idea of Metis, from the paper: "Metis: Fast Automatic Distributed Training on Heterogeneous GPUs" (USENIX
ATC 2024). Where the paper leaves it open it does what the public artifact was seen to do, and the wrapper with which
Sailor's authors ran it for the figures that they report.

Devices stand in a line, type by type, in every order of the types. For every number of stages the line is cut into
device groups whose sizes are powers of two, none below half of the mean (the paper's group scale variance), in every
order of the sizes. For every number of micro-batches that divides the batch, largest first, a stage starts with data
parallelism alone; where a replica would have no row, or the layers do not fit, the stage of the largest data-parallel
degree doubles its tensor-parallel degree, until a division fits: that one is kept, others are not looked at. A stage on
several types shares the rows out by speed (data balance); layers go to stages so that the slowest is quickest, within
memory (layer balance). Plans are ranked by Metis's own estimate, in which a message between two stages counts once a
step, not once a micro-batch, and gradients are reduced in a ring at what whole nodes reach, whatever the message; the
first in that order that fits is the answer.

Their evaluation ended the search after 300 seconds; here it ends after MOST_PLANS pairs of device groups and numbers
of micro-batches. Where the nodes of a kind were no power of two, it gave Metis as many nodes of every kind as the
largest power of two that the smallest kind has; `cut_nodes` does so here.

Simplified: layers are divided exactly, where Metis has a heuristic; it stops at MOST_STAGES stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

from hethub.planners.baselines.by_speed import Ranked, balanced_bounds, rows_by_speed
from hethub.planners.baselines.prices import Late, Prices, never, price_split, split_fits
from hethub.planners.baselines.split import Band, Group, Kind, Side, Split
from hethub.planners.candidate import divisors

__all__ = ["metis_like"]

MOST_PLANS = 6_000
MOST_STAGES = 10
_VARIANCE = 0.5  # groups are at least the mean size times this
_Slice = tuple[tuple[int, int], ...]  # (kind, devices)


def metis_like(prices: Prices, keep: int = 1, late: Late = never, *, cut_nodes: bool = False) -> Ranked:
    """The best few splits by Metis's estimate that fit, best first, with their seconds by the cost model's own rule."""
    found: dict[Split, float] = {}
    counts = _cut_nodes(prices.kinds) if cut_nodes else [kind.count for kind in prices.kinds]
    for number, (slices, micro_batches) in enumerate(_inter_stage_plans(prices, counts)):
        if number == MOST_PLANS or late():
            break
        split = _intra_stage_plan(prices, slices, micro_batches)
        if split is not None and split not in found:
            found[split] = _estimate(prices, split)
    ranked: Ranked = []
    for split in sorted((s for s in found if math.isfinite(found[s])), key=lambda s: found[s]):
        if len(ranked) == keep:
            break
        if split_fits(prices, split):
            ranked.append((price_split(prices, split).step_seconds, split))
    return ranked


def _estimate(prices: Prices, split: Split) -> float:
    """Metis's cost of a step: messages between stages once, the slowest reduction, the longest update."""
    band = split.bands[0]
    works, update, reduce = [], 0.0, 0.0
    for layers, stage in zip(split.layers, band.stages, strict=True):
        summed = [prices.layer_seconds(side.group, side.rows) for side in stage]
        works.append(max(float(times[layers[1]] - times[layers[0]]) for times in summed))
        groups = tuple(dict.fromkeys(side.group for side in stage))
        reduce = max(reduce, prices.node_ring_seconds(groups, sum(side.replicas for side in stage), layers))
        update = max(update, *(prices.update_seconds(side.group, side.rows, layers) for side in stage))
    messages = sum(
        max(prices.forth_seconds(a.group, b.group, bound - 1, a.rows) for a in before for b in after)
        for bound, (before, after) in zip(split.bounds[1:-1], pairwise(band.stages), strict=True)
    )
    return (band.micro_batches - 1) * max(works) + sum(works) + messages + reduce + update


# -- which devices a stage stands on ------------------------------------------------------------------------------


def _inter_stage_plans(prices: Prices, counts: Sequence[int]) -> Iterator[tuple[tuple[_Slice, ...], int]]:
    """(Every stage's devices, micro-batches) in Metis's order; `counts` devices of each kind are in use."""
    total = sum(counts)
    for order in permutations(range(len(prices.kinds))):
        line = [(kind, counts[kind]) for kind in order]
        for stages in range(1, min(MOST_STAGES, total, prices.decoders) + 1):
            for sizes in _sizes(total, stages):
                slices = _cut(line, sizes)
                for micro_batches in reversed(divisors(prices.batch)):
                    yield slices, micro_batches


def _cut_nodes(kinds: Sequence[Kind]) -> list[int]:
    """Devices of each kind in use where nodes are cut; see above."""
    nodes = [max(1, kind.count // kind.node_size) for kind in kinds]
    if all(count & (count - 1) == 0 for count in nodes):
        return [kind.count for kind in kinds]
    most = 1 << (min(nodes).bit_length() - 1)
    return [most * kind.node_size for kind in kinds]


def _sizes(total: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Powers of two that add up to `total`, none below the variance times the mean, in all distinct orders."""
    least = total // stages * _VARIANCE

    def grow(left: int, count: int, smallest: int) -> Iterator[tuple[int, ...]]:
        if count == 0:
            if left == 0:
                yield ()
            return
        size = smallest
        while size * count <= left:
            for rest in grow(left - size, count - 1, size):
                yield (size, *rest)
            size *= 2

    first = 1
    while first < least:
        first *= 2
    for sizes in grow(total, stages, first):
        yield from _orders(sizes)


def _orders(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All distinct orders, one after the other."""
    if not sizes:
        yield ()
    for size in dict.fromkeys(sizes):
        place = sizes.index(size)
        for rest in _orders((*sizes[:place], *sizes[place + 1 :])):
            yield (size, *rest)


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


# -- what each stage does -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Strategy:
    """Data- and tensor-parallel degree of a stage."""

    data: int
    tensor: int


def _intra_stage_plan(prices: Prices, slices: tuple[_Slice, ...], micro_batches: int) -> Split | None:
    """The first division that fits, from data parallelism alone on."""
    rows = prices.batch // micro_batches
    widest = min(max(kind.degrees) for kind in prices.kinds)
    most_rows = min(_profiled_rows(prices, number) for number in range(len(prices.kinds)))
    strategies = [_Strategy(sum(count for _, count in part), 1) for part in slices]
    while True:
        if any(strategy.tensor > widest for strategy in strategies):
            return None
        if all(1 <= rows // strategy.data <= most_rows for strategy in strategies):
            stages = [_sides(prices, *pair, rows) for pair in zip(slices, strategies, strict=True)]
            known = [stage for stage in stages if stage is not None]
            bounds = balanced_bounds(prices, known) if len(known) == len(stages) else None
            if bounds is not None:
                return Split(bounds, (Band(tuple(known), micro_batches),))
        widened = max(range(len(strategies)), key=lambda i: strategies[i].data)
        if strategies[widened].data == 1:
            return None
        strategies[widened] = _Strategy(strategies[widened].data // 2, strategies[widened].tensor * 2)


def _profiled_rows(prices: Prices, kind: int) -> int:
    """The most rows of a micro-batch that were profiled without tensor parallelism."""
    group = Group(kind, min(prices.kinds[kind].degrees))
    known = [
        rows for rows in prices.priced_rows if math.isfinite(float(prices.layer_seconds(group, rows)[-1]))
    ]
    return max(known, default=0)


def _sides(prices: Prices, part: _Slice, strategy: _Strategy, rows: int) -> tuple[Side, ...] | None:
    """All devices of the stage, or None where groups of its degree do not divide them or get no row."""
    replicas = []
    for kind, count in part:
        if strategy.tensor not in prices.kinds[kind].degrees or count % strategy.tensor:
            return None
        replicas.append((Group(kind, strategy.tensor), count // strategy.tensor))
    sides = rows_by_speed(prices, replicas, rows)
    return sides if sum(side.replicas for side in sides) == strategy.data else None
