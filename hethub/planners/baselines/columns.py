"""All pipelines of one sort of group a stage, priced at once: the columns that the deadline search chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.planners.baselines.prices import Floats, Prices
from hethub.planners.baselines.split import Band, Group, Side
from hethub.simulate.sailor import moving_seconds

__all__ = ["Columns", "Ints", "Shapes", "Tables", "cuts", "finished", "worth"]

_REPLICAS = (1, 2)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Pipelines without a cut. `seats` are (group, replicas), which `chains` refers to: [shapes, stages].

    `rows` are those of a micro-batch [shapes], `use` devices of each kind [shapes, kinds], `copies` how many stand side
    by side where all are alike [shapes].
    """

    seats: tuple[tuple[Group, int], ...]
    chains: Ints
    rows: Ints
    use: Ints
    copies: Ints

    def band(self, number: int, micro_batches: int, repeat: int) -> Band:
        """One of them as it stands in a split."""
        rows = int(self.rows[number])
        seats = (self.seats[seat] for seat in self.chains[number])
        stages = tuple((Side(group, rows // replicas, replicas),) for group, replicas in seats)
        return Band(stages, micro_batches, repeat)


@dataclass(frozen=True, slots=True)
class Columns:
    """Shapes with a cut. Seconds [shapes] of the slowest stage with its messages, of all stages and messages, of the
    update, and of the gradients' reduction where all pipelines are alike; infinite where it does not fit."""

    bounds: tuple[int, ...]
    slowest: Floats
    total: Floats
    update: Floats
    reduce: Floats

    def alone_seconds(self, shapes: Shapes, fleet: Floats, batch: int) -> Floats:
        """The step were the devices exchangeable at their worth (`fleet`: how many pipelines that makes) and
        micro-batches divisible: no less than any mix of pipelines that reduces as quickly can take."""
        with np.errstate(invalid="ignore"):
            pipeline = batch / (fleet * shapes.rows) * self.slowest - self.slowest + self.total
            found = np.maximum(pipeline, self.total) + self.reduce + self.update
        return np.where(np.isfinite(found), found, math.inf)


class Tables:
    """Shapes of a problem, and prices of stages that many columns share."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.layers = prices.decoders + 2
        groups = [Group(k, degree) for k, kind in enumerate(prices.kinds) for degree in kind.degrees]
        self.seats = tuple(product(groups, _REPLICAS))
        self.rows = sorted(set(map(math.prod, product(prices.priced_rows, _REPLICAS))))
        self._summed = np.full((len(self.seats), len(self.rows), self.layers + 1), math.inf)
        for s, (group, replicas) in enumerate(self.seats):
            for r, rows in enumerate(self.rows):
                if rows % replicas == 0 and rows // replicas in prices.priced_rows:
                    self._summed[s, r] = prices.layer_seconds(group, rows // replicas)
        self._stage = lru_cache(maxsize=None)(self._price_stage)
        self._hop = lru_cache(maxsize=None)(self._price_hop)
        self._ring = lru_cache(maxsize=None)(self._price_ring)

    def shapes(self, stages: int) -> Shapes:
        """All pipelines of so many stages; those that are several side by side are left out, and those too large."""
        counts = np.array([kind.count for kind in self.prices.kinds])
        seat_use = np.zeros((len(self.seats), len(counts)), dtype=np.int64)
        for s, (group, replicas) in enumerate(self.seats):
            seat_use[s, group.kind] = group.degree * replicas
        chains = np.array(list(product(range(len(self.seats)), repeat=stages)))
        replicas = np.array([replicas for _, replicas in self.seats])[chains]
        use = seat_use[chains].sum(axis=1)
        kept = (np.gcd.reduce(replicas, axis=1) == 1) & (use <= counts).all(axis=1)
        chains, use = chains[kept], use[kept]
        with np.errstate(divide="ignore"):
            copies = np.where(use > 0, counts // np.maximum(use, 1), counts.max()).min(axis=1)
        each = len(self.rows)
        return Shapes(
            self.seats,
            np.repeat(chains, each, axis=0),
            np.tile(np.array(self.rows), len(chains)),
            np.repeat(use, each, axis=0),
            np.repeat(copies, each),
        )

    def columns(self, shapes: Shapes, bounds: tuple[int, ...]) -> Columns:
        """The shapes with this cut."""
        stages = len(bounds) - 1
        row_numbers = np.arange(len(shapes.rows)) % len(self.rows)
        layers = list(pairwise(bounds))
        compute, update, reduce = [], np.zeros(len(shapes.rows)), np.zeros(len(shapes.rows))
        level = np.ceil(np.log2(shapes.copies)).astype(np.int64)
        for number, span in enumerate(layers):
            chosen = shapes.chains[:, number]
            seconds, updates = self._stage(span, stages - 1 - number)
            compute.append(seconds[chosen, row_numbers])
            update = np.maximum(update, updates[chosen, row_numbers])
            reduce = np.maximum(reduce, self._rings(span, int(level.max()))[chosen, level])
        forth: list[Any] = []  # arrays where `moving_seconds` says numbers: it adds and doubles only
        back: list[Any] = []
        for number, bound in enumerate(bounds[1:-1]):
            there, again = self._hop(bound)
            ends = (shapes.chains[:, number], shapes.chains[:, number + 1], row_numbers)
            forth.append(there[ends])
            back.append(again[ends])
        moving: list[Any] = list(moving_seconds(forth, back))
        with_messages = [c + m for c, m in zip(compute, moving, strict=True)]
        return Columns(bounds, np.maximum.reduce(with_messages), np.add.reduce(with_messages), update, reduce)

    def _price_stage(self, span: tuple[int, int], later: int) -> tuple[Floats, Floats]:
        """Compute and update seconds [seats, rows] of a stage."""
        with np.errstate(invalid="ignore"):
            seconds = self._summed[:, :, span[1]] - self._summed[:, :, span[0]]
        seconds = np.where(np.isnan(seconds), math.inf, seconds)
        updates = np.zeros_like(seconds)
        for s, r in zip(*np.nonzero(np.isfinite(seconds)), strict=True):
            group, replicas = self.seats[s]
            rows = self.rows[r] // replicas
            if self.prices.fits(group, rows, span, later):
                updates[s, r] = self.prices.update_seconds(group, rows, span)
            else:
                seconds[s, r] = math.inf
        return seconds, updates

    def _price_hop(self, bound: int) -> tuple[Floats, Floats]:
        """Messages over a boundary [seats before, seats after, rows], each replica sending its own rows."""
        shape = (len(self.seats), len(self.seats), len(self.rows))
        forth, back = np.full(shape, math.inf), np.full(shape, math.inf)
        finite = np.isfinite(self._summed[:, :, -1])
        for (a, (one, first)), (b, (other, second)) in product(enumerate(self.seats), enumerate(self.seats)):
            for r in np.nonzero(finite[a] & finite[b])[0]:
                rows = self.rows[r]
                forth[a, b, r] = self.prices.forth_seconds(one, other, bound - 1, rows // first)
                back[a, b, r] = self.prices.back_seconds(other, one, bound, rows // second)
        return forth, back

    def _rings(self, span: tuple[int, int], levels: int) -> Floats:
        """Reduction seconds [seats, levels] of a stage in which all groups are alike, 2^level pipelines."""
        return np.array(
            [[self._ring(seat, 1 << level, span) for level in range(levels + 1)] for seat in self.seats]
        )

    def _price_ring(self, seat: tuple[Group, int], copies: int, span: tuple[int, int]) -> float:
        return self.prices.reduce_seconds((seat[0],), seat[1] * copies, span)


def cuts(layers: int, stages: int, slack: float) -> Iterable[tuple[int, ...]]:
    """All cuts into `stages`, none of whose stages is longer or shorter than the mean by more than `slack` layers."""
    mean = layers / stages

    def grow(bounds: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        if len(bounds) == stages:
            if abs(layers - bounds[-1] - mean) <= slack and bounds[-1] < layers:
                yield (*bounds, layers)
            return
        first = bounds[-1] + max(1, math.ceil(mean - slack))
        for bound in range(first, bounds[-1] + math.floor(mean + slack) + 1):
            if bound < layers:
                yield from grow((*bounds, bound))

    return grow((0,))


def worth(speeds: Sequence[float], use: Ints, counts: Sequence[int]) -> Floats:
    """How many pipelines [shapes] all devices would make, exchanged at their speeds."""
    weights = np.asarray(speeds)
    found: Floats = (weights * np.asarray(counts)).sum() / (use * weights).sum(axis=1)
    return found


def finished(columns: Columns, allowed: Ints, deadline: float) -> Ints:
    """Whole micro-batches that a pipeline ends by the deadline."""
    room = (deadline - columns.total[allowed]) / columns.slowest[allowed]
    return np.where(room >= 0, np.floor(np.maximum(room, 0.0) + 1e-9) + 1, 0).astype(np.int64)
