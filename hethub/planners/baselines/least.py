"""What no mix of pipelines of the deadline search can beat: a bound with whole micro-batches.

For a step of so many seconds: whatever a mix is, it has one cut, a number of pipelines, and in every stage some kinds
and a least degree of groups. These say how long gradients are reduced at least, and so by when pipelines must end, and
how many rows each can have done by then, whole micro-batches only. What is left is a knapsack over devices and the
number of pipelines, here with fractions of pipelines (`master.relax`, whose bound holds by its prices). Where that does
less than the batch for all cuts, numbers and sorts of stages, no mix takes so few seconds; the largest such time is
bisected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt

from hethub.planners.baselines.columns import Columns, Ints, Shapes, Tables, cuts, finished
from hethub.planners.baselines.prices import Floats, Prices
from hethub.planners.baselines.split import Group
from hethub.planners.master import relax

__all__ = ["least_seconds"]

_GROWTH = 1.2  # numbers of pipelines within this factor are bounded together
_STEPS = 11  # of the bisection
_SHOWN = 12  # prices that are tried before a linear program
_EPS = 1e-9
_Sort = tuple[tuple[int, ...], int]  # kinds of which a stage's groups are, and their least degree
_Flags = npt.NDArray[np.bool_]


def least_seconds(prices: Prices, step_seconds: float, slack: dict[int, float]) -> float:
    """No mix of pipelines of one cut takes less, nor as long as `step_seconds` where it is quicker than that. `slack`
    is by how many layers a stage may differ from the mean, by the number of stages.

    Reducing among more groups must not be quicker.
    """
    tables = Tables(prices)
    ring = lru_cache(maxsize=None)(_ring_of(prices))
    possible = list(_cuts(tables, slack, ring))
    low, high = 0.0, step_seconds
    for _ in range(_STEPS):
        middle = (low + high) / 2
        first = next((number for number, cut in enumerate(possible) if cut.may_end_within(middle)), None)
        if first is None:
            low = middle
        else:
            high = middle
            possible.insert(0, possible.pop(first))  # it is the likeliest for a shorter time
    return low


def _ring_of(prices: Prices) -> Callable[[_Sort, int, tuple[int, int]], float]:
    def seconds(sort: _Sort, count: int, span: tuple[int, int]) -> float:
        kinds, degree = sort
        return prices.reduce_seconds([Group(kind, degree) for kind in kinds], count, span)

    return seconds


def _cuts(
    tables: Tables, slack: dict[int, float], ring: Callable[[_Sort, int, tuple[int, int]], float]
) -> Iterator[_Cut]:
    for stages, most in slack.items():
        shapes = tables.shapes(stages) if stages <= tables.prices.decoders else None
        if shapes is None or not len(shapes.rows):
            return
        for bounds in cuts(tables.layers, stages, most):
            columns = tables.columns(shapes, bounds)
            if np.isfinite(columns.slowest).any():
                yield _Cut(tables.prices, shapes, columns, ring)


class _Cut:
    """All chains of groups of one cut, each with whatever rows of a micro-batch do most."""

    def __init__(
        self,
        prices: Prices,
        shapes: Shapes,
        columns: Columns,
        ring: Callable[[_Sort, int, tuple[int, int]], float],
    ) -> None:
        self.batch, self.columns, self.rows, self.ring = prices.batch, columns, shapes.rows, ring
        self.spans = tuple(pairwise(columns.bounds))
        self.fitting = np.isfinite(columns.slowest)
        self.update = float(columns.update[self.fitting].min())
        self.each = len(np.unique(shapes.rows))  # rows of a chain stand next to each other
        counts = [kind.count for kind in prices.kinds]
        self.counts, self.devices = np.array(counts), sum(counts)
        use = shapes.use[:: self.each]
        self.need = np.column_stack([use, np.ones(len(use), dtype=np.int64)])  # devices, and one pipeline
        # prices that showed it last, and each chain's worth at them
        self.shown: list[tuple[Floats, Floats]] = []
        degrees = sorted({degree for kind in prices.kinds for degree in kind.degrees})
        sets = [tuple(k for k in range(len(counts)) if bits >> k & 1) for bits in range(1, 1 << len(counts))]
        self.sorts = tuple(product(sets, degrees))
        chains = shapes.chains[:: self.each]
        self.stands = [
            {sort: self._of(shapes, sort)[chains[:, stage]] for sort in self.sorts}
            for stage in range(len(self.spans))
        ]

    @staticmethod
    def _of(shapes: Shapes, sort: _Sort) -> _Flags:
        """Seats whose group may stand in a stage of this sort."""
        return np.array([group.kind in sort[0] and group.degree >= sort[1] for group, _ in shapes.seats])

    def may_end_within(self, seconds: float) -> bool:
        """False where no mix does the batch in that time."""
        rows = self._finished(seconds - self.update)
        if not rows.any():
            return False
        pipelines = -(-self.batch // int(rows.max()))
        while pipelines <= self.devices:
            further = max(pipelines + 1, math.ceil(pipelines * _GROWTH))
            if self._may_end(seconds - self.update, pipelines, further - 1):
                return True
            pipelines = further
        return False

    def _may_end(self, seconds: float, least: int, most: int) -> bool:
        """With that many pipelines."""
        rings = [{sort: self.ring(sort, least, span) for sort in self.sorts} for span in self.spans]
        seen: set[tuple[_Sort, ...]] = set()
        for limit in sorted({ring for stage in rings for ring in stage.values()}):
            rows = self._finished(seconds - limit)
            if not self._enough(rows, most):
                return False
            for sorts in product(*(_widest(stage, limit) for stage in rings)):
                if sorts in seen:
                    continue
                seen.add(sorts)
                allowed = np.logical_and.reduce(
                    [stands[sort] for stands, sort in zip(self.stands, sorts, strict=True)]
                )
                if self._enough(np.where(allowed, rows, 0), most):
                    return True
        return False

    def _finished(self, seconds: float) -> Ints:
        """Rows [chains] that each does by then, at most."""
        found = np.zeros(len(self.rows), dtype=np.int64)
        if seconds > 0:
            fitting = np.flatnonzero(self.fitting)
            found[fitting] = finished(self.columns, fitting, seconds) * self.rows[fitting]
        most: Ints = found.reshape(-1, self.each).max(axis=1)
        return most

    def _enough(self, rows: Ints, most: int) -> bool:
        """Whether fractions of pipelines, up to `most` in all, do the batch."""
        busy = np.flatnonzero(rows)
        if not len(busy):
            return False
        supply, least = np.array([*self.counts, most]), self.batch * (1 - _EPS)
        rows = rows[busy]
        for number, (prices, worth) in enumerate(self.shown):  # most often one of these shows it again
            if float((rows / worth[busy]).max() * (supply @ prices)) < least:
                self.shown.insert(0, self.shown.pop(number))
                return False
        found = relax(self.need[busy], rows, supply)
        if found.rows >= least:
            return True
        # none is nothing: rows are divided by them
        prices = np.maximum(found.prices, 1e-9 * found.prices.max())
        self.shown = [(prices, self.need @ prices), *self.shown[: _SHOWN - 1]]
        return False


def _widest(rings: dict[_Sort, float], limit: float) -> Sequence[_Sort]:
    """Sorts of stages that reduce within the limit, without those that another contains."""
    within = [sort for sort, seconds in rings.items() if seconds <= limit * (1 + _EPS)]
    return [
        sort
        for sort in within
        if not any(o != sort and set(o[0]) >= set(sort[0]) and o[1] <= sort[1] for o in within)
    ]
