"""Pipelines as arrays, with bounds of their speed.

A column is a pipeline in counts: runs of slots, and the rows of a micro-batch. Its period may be the least one or any
longer one, which lies in one of a few segments. In each of them it takes with M micro-batches at least
`fill + (M - 1) * period + tail` seconds, whatever surrounds it, where

- the period is the least p at which the stages together can hold all decoders: a stage holds as many as it does in p
  seconds and as its memory takes. From a forward to its backward a stage waits for all stages behind it, so that it has
  at least (their seconds) / p micro-batches in flight, without which a step at p is not possible; the stages are
  filled from the last one on, each with as many decoders as it takes, which leaves the least to the others;
- the fill is every decoder once, on the quickest devices, a stage at most as many as the segment's longest period and
  its memory take; and every hop over an idle link;
- the tail is the update and the new weights of the stage that has most to do there, decoders going where they are
  updated soonest, again as many as the longest period takes; and before that the first stage's gradients: it has at
  least the decoders that the others cannot hold at the longest period, and what hides its exchange is at most the last
  backwards of the stages on its node.

Left out, and so the looseness of the bound: links that hops share, the embedding, recomputation in the fill, and stages
that wait for each other though each alone is quick enough.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from hethub.planners.periods import DECODER, EPS, HEAD, MOST, compiled_periods, least_periods
from hethub.planners.seats import Crew, Slot

__all__ = ["BY_COLUMN", "BY_SEGMENT", "MANY", "SEGMENTS", "Columns", "Tails", "least_fills", "least_firsts"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEGMENTS = (1.0, 1.01, 1.04, 1.12, 1.4, np.inf)  # of periods, in least periods
_COUNT = len(SEGMENTS) - 1
_NEVER = np.inf
_MOST = 1 << 30  # micro-batches
_LONG = 1e200  # seconds; infinity times no micro-batch would be no number
MANY = 30_000  # columns whose updates are bounded more roughly


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tails:
    """Of every column in every segment, seconds [segments, columns] of update and new weights, and of gradients."""

    update: Floats
    gradients: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """Pipelines, one an entry: `runs[i]` are slot numbers from the last stage to the first (-1: none), `counts[i]` how
    many stages each has; `usage[i]` devices of each pool of the space. Seconds as above.

    A period is in segment k where it is SEGMENTS[k] to SEGMENTS[k + 1] times the least `period`. The first stage then
    has at least `first[k]` decoders, and the `fill[k]` is at least so long; `hidden` are the periods that may hide the
    first stage's gradients. Fewer micro-batches than are in flight at that period need less memory: with these a period
    may be as short as `quick`, and the first stage may have no decoder. `places` are rows of `table` (see
    `periods.py`), by run.
    """

    slots: tuple[Slot, ...]
    table: Floats
    layers: int
    runs: Ints
    counts: Ints
    places: Ints
    rows: Ints
    usage: Ints
    hops: Floats
    period: Floats
    quick: Floats
    hidden: Floats
    fill: Floats
    first: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def crew(self, number: int) -> Crew:
        """The pipeline, first stage first."""
        pairs = zip(self.runs[number], self.counts[number], strict=True)
        return tuple((self.slots[slot], int(count)) for slot, count in pairs if count)[::-1]

    def refined(self, *, compiled: bool = False) -> Columns:
        """With periods that count memory too, infinite where the model does not fit."""
        given = (self.table, self.places, self.counts, self.period, self.layers)
        ends = np.array(SEGMENTS[1:-1])
        if compiled:
            period, others = np.empty(len(self)), np.empty((len(ends), len(self)))
            compiled_periods()(*given, ends, period, others)
        else:
            period, others = least_periods(*given, ends)
        first = np.zeros((_COUNT, len(self)))
        first[:-1] = np.maximum(0.0, self.layers - others)
        known = np.where(np.isfinite(period), period, 1.0)
        fill = least_fills(self.table, self.places, self.counts, self.layers, known) + self.hops
        return replace(self, period=period, first=first, fill=fill)

    def tails(self, update: Floats, gradients: Floats) -> Tails:
        """From the seconds that a decoder's update and its gradients take on each slot."""
        used = self.counts > 0
        front = self.runs[np.arange(len(self)), used.sum(axis=1) - 1]
        late = np.zeros((_COUNT, len(self)))
        for k, end in enumerate(SEGMENTS[1:-1]):
            late[k] = gradients[front] * self.first[k] - self.hidden * self.period * end
        return Tails(
            update=self._updates(np.where(used, update[self.runs], 1.0)), gradients=np.maximum(0.0, late)
        )

    def _updates(self, each: Floats) -> Floats:
        """Seconds [segments, columns] of the longest update, `each` of a decoder on every run. Of very many columns as
        if stages could hold any number."""
        each = np.maximum(each, 1e-300)
        if len(self) > MANY:
            spread: Floats = self.layers / np.maximum((self.counts / each).sum(axis=1), 1e-300)
            return np.broadcast_to(spread, (_COUNT, len(self)))
        found = np.empty((_COUNT, len(self)))
        for k, end in enumerate(SEGMENTS[1:]):
            room = _room(self.table, self.places, self.counts, self.period * end)
            full = np.zeros(each.shape, dtype=bool)
            for _ in range(
                each.shape[1]
            ):  # runs with all that they can hold before the others have as long to do
                held = np.where(full, self.counts * room, 0.0).sum(axis=1)
                speed = np.where(full, 0.0, self.counts / each).sum(axis=1)
                found[k] = np.maximum(0.0, self.layers - held) / np.maximum(speed, 1e-300)
                more = (room * each < found[k][:, None]) & (self.counts > 0) & ~full
                if not more.any() or (more | full | (self.counts == 0)).all(axis=1).any():
                    break
                full |= more
        return found

    def rows_within(
        self, seconds: float, tails: Tails, least_tail: float = 0.0, most_tail: float = np.inf
    ) -> Ints:
        """Rows that each pipeline can do within `seconds`, at most, where the longest tail of all that stand side
        by side is at least `least_tail` and at most `most_tail`."""
        most = np.zeros(len(self))
        # where memory counts, few micro-batches may be quicker
        own = np.flatnonzero((self.quick < self.period * (1 - EPS)) | (tails.gradients[0] > 0))
        for k, start in enumerate(SEGMENTS[:-1]):
            tail = tails.update[k] + tails.gradients[k]
            left = seconds * (1 + EPS) - self.fill[k] - np.maximum(tail, least_tail)
            done = np.minimum(np.floor(np.maximum(left, 0.0) / (self.period * start) + 1 + EPS), _MOST)
            most = np.maximum(most, np.where((left >= 0) & (tail <= most_tail * (1 + EPS)), done, 0.0))
            fill, update = self.fill[k, own], tails.update[k, own]
            left = seconds * (1 + EPS) - fill - np.maximum(update, least_tail)
            done = np.floor(np.maximum(left, 0.0) / self.quick[own] + 1 + EPS)
            done = np.minimum(done, np.ceil(fill / self.period[own]))
            most[own] = np.maximum(most[own], np.where((left >= 0) & (update <= most_tail), done, 0.0))
        return most.astype(np.int64) * self.rows

    def seconds(self, micro_batches: Floats, tails: Tails) -> Floats:
        """Least seconds with so many micro-batches."""
        found = []
        period, quick = np.minimum(self.period, _LONG), np.minimum(self.quick, _LONG)
        for k, start in enumerate(SEGMENTS[:-1]):
            filled = self.fill[k] + tails.update[k]
            few = micro_batches <= np.ceil(self.fill[k] / self.period)
            found.append(filled + (micro_batches - 1) * period * start + tails.gradients[k])
            found.append(np.where(few, filled + (micro_batches - 1) * quick, np.inf))
        least: Floats = np.minimum.reduce(found)
        return least

    def taken(self, chosen: npt.NDArray[np.bool_] | Ints) -> Columns:
        """Some of them."""
        return replace(
            self,
            **{name: getattr(self, name)[..., chosen] for name in BY_SEGMENT},
            **{name: getattr(self, name)[chosen] for name in BY_COLUMN},
        )


BY_SEGMENT = ("fill", "first")  # [segments, columns]
BY_COLUMN = tuple(f.name for f in fields(Columns) if f.name not in ("slots", "table", "layers", *BY_SEGMENT))


def _room(table: Floats, places: Ints, counts: Ints, period: Floats) -> Floats:
    """Decoders that a stage of each run has at most [columns, runs]: by its memory, and within `period`."""
    decoder = np.where(counts > 0, table[places, DECODER], 1.0)
    by_time = np.minimum(np.floor(period[:, None] / decoder + EPS), _MOST)
    return np.where(counts > 0, np.minimum(table[places, MOST], by_time), 0.0)


def least_firsts(table: Floats, places: Ints, counts: Ints, layers: int, period: Floats) -> Floats:
    """Decoders [segments, columns] that the other stages cannot hold, as if memory were plenty."""
    found = np.zeros((_COUNT, len(places)))
    last = np.arange(len(places)), (counts > 0).sum(axis=1) - 1
    decoder = np.where(counts > 0, table[places, DECODER], _NEVER)
    for k, end in enumerate(SEGMENTS[1:-1]):
        each = np.floor(period[:, None] * end / decoder + EPS)
        found[k] = np.maximum(0.0, layers - ((each * counts).sum(axis=1) - each[last]))
    return found


def least_fills(table: Floats, places: Ints, counts: Ints, layers: int, period: Floats) -> Floats:
    """Seconds [segments, columns] of every decoder once, on the quickest run as far as it goes, then on the next."""
    found = np.empty((_COUNT, len(places)))
    decoder = np.where(counts > 0, table[places, DECODER], _NEVER)
    order = np.argsort(decoder, axis=1, kind="stable")
    for k, end in enumerate(SEGMENTS[1:]):
        room = _room(table, places, counts, period * end) * counts
        left, total = np.full(len(places), float(layers)), np.zeros(len(places))
        for j in range(places.shape[1]):
            run = order[:, [j]]
            done = np.minimum(left, np.take_along_axis(room, run, axis=1)[:, 0])
            total += done * np.where(done > 0, np.take_along_axis(decoder, run, axis=1)[:, 0], 0.0)
            left -= done
        found[k] = total
    found += table[places[:, 0], HEAD]
    return found
