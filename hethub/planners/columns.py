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

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from hethub.planners.periods import DECODER, EPS, HEAD, MOST, compiled_periods, least_periods
from hethub.planners.seats import Crew, Slot

__all__ = ["BY_COLUMN", "BY_SEGMENT", "MANY", "SEGMENTS", "Columns", "Tails", "least_fills", "least_firsts"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SEGMENTS = (1.0, 1.01, 1.04, 1.12, 1.4, np.inf)  # of periods, in least periods
_STARTS, _ENDS = np.array(SEGMENTS[:-1])[:, None], np.array(SEGMENTS[1:])[:, None]
_COUNT = len(SEGMENTS) - 1
_NEVER = np.inf
_MOST = 1 << 30  # micro-batches
_LONG = 1e200  # seconds; infinity times no micro-batch would be no number
_BLOCK = 4096  # columns at a time
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
        late = np.zeros((_COUNT, len(self)))
        longest = np.empty((1 if len(self) > MANY else _COUNT, len(self)))
        for some in _blocks(len(self)):
            runs, used = self.runs[some], self.counts[some] > 0
            front = gradients[runs[np.arange(len(runs)), used.sum(axis=1) - 1]]
            hidden = _ENDS[:-1] * (self.hidden[some] * self.period[some])
            late[:-1, some] = np.maximum(0.0, front * self.first[:-1, some] - hidden)
            longest[:, some] = self._updates(some, np.where(used, np.maximum(update[runs], 1e-300), 1.0))
        return Tails(update=np.broadcast_to(longest, late.shape), gradients=late)

    def _updates(self, some: slice, each: Floats) -> Floats:
        """Seconds [segments, columns] of the longest update of some columns, `each` of a decoder on every run. Of very
        many columns as if stages could hold any number."""
        counts, layers = self.counts[some].T, self.layers
        speeds = counts / each.T
        if len(self) > MANY:
            spread: Floats = layers / np.maximum(speeds.sum(axis=0), 1e-300)
            return spread[None]
        # [runs, segments, columns]: sums over a few runs are of whole rows
        room = _room(self.table, self.places[some], self.counts[some], self.period[some])
        counts, each, speeds = counts[:, None], each.T[:, None], speeds[:, None]
        none, full = counts == 0, np.zeros(room.shape, dtype=bool)
        found = np.empty(room.shape[1:])
        # runs with all that they can hold before the others have as long to do
        for _ in range(len(room)):
            held = np.where(full, counts * room, 0.0).sum(axis=0)
            speed = np.where(full, 0.0, speeds).sum(axis=0)
            found = np.maximum(0.0, layers - held) / np.maximum(speed, 1e-300)
            more = (room * each < found) & ~none & ~full
            more &= ~(more | full | none).all(axis=0)  # some run takes what is left
            if not more.any():
                break
            full |= more
        return found

    def rows_within(
        self, seconds: float, tails: Tails, least_tail: float = 0.0, most_tail: float = np.inf
    ) -> Ints:
        """Rows that each pipeline can do within `seconds`, at most, where the longest tail of all that stand side
        by side is at least `least_tail` and at most `most_tail`."""
        most = np.empty(len(self), dtype=np.int64)
        for some in _blocks(len(self)):
            period, quick, fill = self.period[some], self.quick[some], self.fill[:, some]
            update, gradients = tails.update[:, some], tails.gradients[:, some]
            spare, tail = seconds * (1 + EPS) - fill, update + gradients
            left = spare - np.maximum(tail, least_tail)
            done = np.minimum(np.floor(np.maximum(left, 0.0) / (_STARTS * period) + (1 + EPS)), _MOST)
            found = np.where((left >= 0) & (tail <= most_tail * (1 + EPS)), done, 0.0).max(axis=0)
            # where memory counts, few micro-batches may be quicker
            own = np.flatnonzero((quick < period * (1 - EPS)) | (gradients[0] > 0))
            if len(own):
                update = update[:, own]
                left = spare[:, own] - np.maximum(update, least_tail)
                done = np.floor(np.maximum(left, 0.0) / quick[own] + (1 + EPS))
                done = np.minimum(done, np.ceil(fill[:, own] / period[own]))
                done = np.where((left >= 0) & (update <= most_tail), done, 0.0)
                found[own] = np.maximum(found[own], done.max(axis=0))
            most[some] = found
        rows: Ints = most * self.rows
        return rows

    def seconds(self, micro_batches: Floats, tails: Tails) -> Floats:
        """Least seconds with so many micro-batches."""
        further = micro_batches - 1
        period, quick = np.minimum(self.period, _LONG), np.minimum(self.quick, _LONG)
        filled = self.fill + tails.update
        whole = filled + _STARTS * (further * period) + tails.gradients
        few = np.where(micro_batches <= np.ceil(self.fill / self.period), filled + further * quick, np.inf)
        least: Floats = np.minimum(whole, few).min(axis=0)
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


def _blocks(count: int) -> Iterator[slice]:
    """So many columns in parts that the processor's caches hold."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _room(table: Floats, places: Ints, counts: Ints, period: Floats) -> Floats:
    """Decoders that a stage of each run has at most [runs, segments, columns]: by its memory, and within the segment's
    longest period."""
    used = counts.T > 0
    decoder = np.where(used, table[places.T, DECODER], 1.0)
    by_time = np.minimum(np.floor(_ENDS * period / decoder[:, None] + EPS), _MOST)
    return np.where(used[:, None], np.minimum(table[places.T, MOST][:, None], by_time), 0.0)


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
    for some in _blocks(len(places)):
        own, number = places[some], counts[some].T
        decoder = table[own.T, DECODER]
        order = np.argsort(np.where(number > 0, decoder, _NEVER), axis=0, kind="stable")
        room = _room(table, own, counts[some], period[some]) * number[:, None]
        room = np.take_along_axis(room, order[:, None], axis=0)
        # where there is no run nothing is done
        decoder = np.take_along_axis(np.where(number > 0, decoder, 0.0), order, axis=0)
        left, total = np.full(room.shape[1:], float(layers)), np.zeros(room.shape[1:])
        for run in range(len(room)):
            done = np.minimum(left, room[run])
            total += done * decoder[run]
            left -= done
        found[:, some] = total + table[own[:, 0], HEAD]
    return found
