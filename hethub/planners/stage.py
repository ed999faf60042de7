"""Stages of a pipeline that is being planned: who works there, for how long, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hethub.planners.seats import Seat, SeatCost

__all__ = ["Setting", "Staff", "Stage"]

_ANY = 1 << 30


class Setting(NamedTuple):
    """What surrounds a pipeline: `copies` alike ones, `others` unlike ones, the `pools` of all of them,
    most micro-batches of one, how units are dealt out (`stage_major`: a stage's replicas next to each
    other, else a pipeline's stages), how deep stages run ahead: `reach` 0 as 1F1B does without latency,
    1 as latency asks, 2 twice as deep as 0, and which of the `pools` have all their devices in use `near` each
    other, on one node."""

    copies: int
    others: int
    pools: tuple[int, ...]
    micro_batches: int
    stage_major: bool = False
    reach: int = 1
    near: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staff:
    """A slot with its rows dealt out."""

    seats: tuple[tuple[Seat, int], ...]
    costs: tuple[SeatCost, ...]


class Stage:
    """A staffed slot in its place: its seconds as a function of its decoders, and its memory limits.

    `held` micro-batches are in flight, `untold` more in the stage before, at least `holders` devices share the update
    of its layers, and `units` is the half-open span of its groups among those of its pool in the pipeline. At most
    `cap_none` decoders fit without recomputation, and `cap` with it.
    """

    def __init__(
        self,
        staff: Staff,
        *,
        first: bool,
        last: bool,
        held: int,
        holders: int,
        units: tuple[int, int],
        untold: int = 0,
    ) -> None:
        self.staff = staff
        self.first = first
        self.last = last
        self.holders = holders
        self.untold = untold
        self.units = units
        kept, recomputed = (
            min(c.most_decoders((first, last), held, holders, full=full, untold=untold) for c in staff.costs)
            for full in (False, True)
        )
        self.cap_none = kept
        self.cap = max(kept, recomputed)

    @property
    def replicas(self) -> int:
        """Tensor-parallel groups that share the micro-batch."""
        return self.units[1] - self.units[0]

    def seconds(self, decoders: int) -> float:
        """Forward and backward of a micro-batch on the slowest replica, with recomputation where it must
        be."""
        forward, backward = self._work(decoders)
        return forward + backward

    def backward_seconds(self, decoders: int) -> float:
        """The backward's part of `seconds`, recomputation included."""
        return self._work(decoders)[1]

    def _work(self, decoders: int) -> tuple[float, float]:
        """Seconds of the forward, and of the backward with recomputation."""
        forward = backward = again = 0.0
        for cost in self.staff.costs:
            f, b = decoders * cost.decoder[0], decoders * cost.decoder[1]
            if self.first:
                f, b = f + cost.embedding[0], b + cost.embedding[1]
            a = f
            if self.last:
                f, b, a = f + cost.head[0], b + cost.head[1], a + cost.head_again
            forward, backward, again = max(forward, f), max(backward, b), max(again, a)
        return forward, backward + (again if decoders > self.cap_none else 0.0)

    def most_in_flight(self, decoders: int) -> int:
        """How many micro-batches fit beside `decoders` decoders."""
        full = decoders > self.cap_none
        given = ((self.first, self.last), decoders, self.holders)
        return min(c.most_in_flight(*given, full=full, untold=self.untold) for c in self.staff.costs)

    def most_untold(self, decoders: int, held: int) -> int:
        """How many more micro-batches than `held` the stage before may have in flight; on a host alone that takes
        memory here."""
        full = decoders > self.cap_none
        given = ((self.first, self.last), decoders, held, self.holders)
        rooms = ((c.usable - c.bytes(*given, full=full)) // c.boundary for c in self.staff.costs if c.host)
        return int(max(0, min(rooms, default=_ANY)))

    def elements(self, cost: SeatCost, decoders: int) -> int:
        """Parameter elements of the most loaded rank."""
        return cost.ends[self.first, self.last].elements + decoders * cost.decoder_elements
