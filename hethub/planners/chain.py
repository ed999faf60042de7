"""Layers to the stages of one pipeline: exact for the slowest stage, within the memory of every device."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import add
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.planners.links import LinkCosts
from hethub.planners.seats import Crew, Seat, SeatCosts, Slot, crew_size, crew_slots
from hethub.planners.stage import Setting, Staff, Stage
from hethub.planners.steady import round_trips, settle

__all__ = ["Chain", "Chains", "StageDraft", "StageSeconds"]

# Micro-batches in flight that a division makes room for, of those that 1F1B holds.
_HELD = (1.0, 1.5, 0.5, 0.0)
_BOUND = 1.01  # of the slowest stage's seconds: a period no longer needs no more in flight


class StageDraft(NamedTuple):
    """One stage: `seats` are (seat with its number of replicas, rows of each); `at_limit` where not one more
    micro-batch fits in flight."""

    seats: tuple[tuple[Seat, int], ...]
    decoders: int
    full: bool
    in_flight: int
    at_limit: bool


class StageSeconds(NamedTuple):
    """Of a micro-batch on a stage: its forward, the part of its backward that the stage before waits for, the other
    part, and the hops to the next stage and back."""

    forward: float
    backward: float
    weight: float
    hop: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """A priced pipeline. One of M micro-batches takes `fill + (M - 1) * period` seconds, then all take
    `tail`.

    The period is `slowest_seconds`, the slowest stage's, or more where links or memory hold it up. Where backwards are
    split, the fill is shorter by `split_seconds`: of the weight parts only the first stage's is waited for.
    """

    crew: Crew
    rows: int
    stages: tuple[StageDraft, ...]
    slowest_seconds: float
    fill_seconds: float
    period_seconds: float
    tail_seconds: float
    split_seconds: float
    works: tuple[StageSeconds, ...]

    def seconds(self, micro_batches: int) -> float:
        """Closed form of the pipeline's part of the step."""
        return self.fill_seconds + (micro_batches - 1) * self.period_seconds

    def least_seconds(self, micro_batches: int) -> float:
        """Less than which no schedule takes: a stage does all that it has behind the first forward of those before it,
        and these have its last backward to pass on."""
        return max(
            max(
                way.forward + way.hop / 2 + micro_batches * sum(own[:3]),
                way.forward + way.backward + way.hop + micro_batches * (own.forward + own.backward),
            )
            for way, own in self._ways()
        )

    def unblocked_seconds(self, micro_batches: int) -> float:
        """As if no stage ever waited for one behind it, but for the last backward's way: about what good schedules
        reach where memory allows."""
        return max(
            way.forward + way.backward + way.hop + micro_batches * sum(own[:3]) for way, own in self._ways()
        )

    def _ways(self) -> Iterator[tuple[StageSeconds, StageSeconds]]:
        """Each stage with the sum of those before it."""
        way = StageSeconds(0.0, 0.0, 0.0, 0.0)
        for own in self.works:
            yield way, own
            way = StageSeconds(*map(add, way, own))


class Chains:
    """Prices crews; results are kept, since a search asks for the same ones again."""

    def __init__(self, costs: SeatCosts) -> None:
        self.costs = costs
        self.layers = costs.compute.workload.model.layers
        self._staffs: dict[tuple[Slot, int], Staff | None] = {}
        self._chains: dict[tuple[Crew, int, Setting], Chain | None] = {}
        self.links = LinkCosts(costs)

    def staff(self, slot: Slot, rows: int) -> Staff | None:
        """Deal the rows of a micro-batch to a slot's replicas by speed; None when there are too few."""
        key = (slot, rows)
        if key not in self._staffs:
            self._staffs[key] = self._deal(slot, rows)
        return self._staffs[key]

    def _deal(self, slot: Slot, rows: int) -> Staff | None:
        places = [seat for seat in slot for _ in range(seat.replicas)]
        if len(places) > rows:
            return None
        weights = [1.0] * len(places)
        if len(slot) > 1:
            typical = max(1, round(rows / len(places)))
            weights = [1.0 / sum(self.costs.cost(s.pool, s.degree, typical).decoder) for s in places]
        kinds: dict[tuple[int, int, int], int] = {}
        for seat, own in zip(places, apportion(rows, weights, 1), strict=True):
            kind = (seat.pool, seat.degree, own)
            kinds[kind] = kinds.get(kind, 0) + 1
        seats = tuple((Seat(pool, degree, count), own) for (pool, degree, own), count in kinds.items())
        costs = tuple(self.costs.cost(s.pool, s.degree, own) for s, own in seats)
        return Staff(
            seats=seats,
            costs=costs,
        )

    def chain(self, crew: Crew, rows: int, setting: Setting) -> Chain | None:
        """The best division of the layers over the crew, or None when it does not fit."""
        # Deeper than this a stage never runs ahead, so that more micro-batches price alike.
        most = 4 * crew_size(crew)
        setting = setting if setting.micro_batches <= most else setting._replace(micro_batches=most)
        key = (crew, rows, setting)
        if key not in self._chains:
            self._chains[key] = self._price(crew, rows, setting)
        return self._chains[key]

    def _price(self, crew: Crew, rows: int, setting: Setting) -> Chain | None:
        """Divide with as many micro-batches in flight as 1F1B holds, and with more, which long hops ask
        for; where that does not fit, with fewer: slower, and it fits."""
        staffs = [self.staff(slot, rows) for slot in crew_slots(crew)]
        if len(staffs) > self.layers + 2 or None in staffs:
            return None
        known = [staff for staff in staffs if staff is not None]
        best: Chain | None = None
        for factor in _HELD:
            if best is not None and (factor < 1.0 or best.period_seconds <= _BOUND * best.slowest_seconds):
                break
            stages = self._stages(known, setting, factor)
            decoders = divide(self.layers, stages)
            if decoders is not None:
                chain = self._finish(crew, rows, setting, stages, decoders)
                if best is None or chain.seconds(setting.micro_batches) < best.seconds(setting.micro_batches):
                    best = chain
        return best

    def _stages(self, staffs: list[Staff], setting: Setting, factor: float) -> list[Stage]:
        """The slots in their places, with `factor` times as many micro-batches in flight as 1F1B holds."""
        count = len(staffs)
        units: dict[int, int] = {}
        stages = []
        ahead = 0
        for i, staff in enumerate(staffs):
            held = max(1, min(math.ceil(factor * (count - i)), setting.micro_batches))
            pool, replicas = staff.costs[0].pool, sum(seat.replicas for seat, _ in staff.seats)
            holders = setting.copies * replicas + setting.others
            place = units.get(pool, 0)
            units[pool] = place + replicas
            stages.append(
                Stage(
                    staff,
                    first=i == 0,
                    last=i == count - 1,
                    held=held,
                    holders=holders,
                    units=(place, place + replicas),
                    untold=max(0, ahead - held),
                )
            )
            ahead = held
        return stages

    def _finish(
        self, crew: Crew, rows: int, setting: Setting, stages: list[Stage], decoders: list[int]
    ) -> Chain:
        times = [stage.seconds(n) for stage, n in zip(stages, decoders, strict=True)]
        hops = [self.links.hop(one, other, setting) for one, other in pairwise(stages)]
        loads = [0.0, *(hop.load for hop in hops), 0.0]
        # a node takes activations from the stage before and gradients from the one after over one link
        least = max([*times, *(one + other for one, other in pairwise(loads))])
        trips = round_trips(times, [hop.seconds for hop in hops])
        limits = [s.most_in_flight(n) for s, n in zip(stages, decoders, strict=True)]
        memory = limits
        if setting.reach == 0:
            limits = [min(limit, len(stages) - i) for i, limit in enumerate(limits)]
        period, in_flight = settle(times, trips, limits, setting.micro_batches, least)
        told = _told(stages, decoders, in_flight)
        if told != in_flight:
            period, in_flight = settle(times, trips, told, setting.micro_batches, least)
        if setting.reach == 2:
            wide = [
                min(limit, 2 * (len(stages) - i), setting.micro_batches) for i, limit in enumerate(limits)
            ]
            in_flight = [max(pair) for pair in zip(in_flight, wide, strict=True)]
        in_flight = _told(stages, decoders, in_flight)
        drafts = tuple(
            StageDraft(stage.staff.seats, n, n > stage.cap_none, held, held >= most)
            for stage, n, held, most in zip(stages, decoders, in_flight, memory, strict=True)
        )
        tail = self.links.tail_seconds(stages, decoders, setting)
        works = []
        for stage, n, hop in zip(stages, decoders, [*(hop.seconds for hop in hops), 0.0], strict=True):
            whole, weight = stage.backward_seconds(n), stage.weight_seconds(n)
            works.append(StageSeconds(stage.seconds(n) - whole, whole - weight, weight, hop))
        return Chain(
            crew=crew,
            rows=rows,
            stages=drafts,
            slowest_seconds=max(times),
            fill_seconds=trips[0],
            period_seconds=period,
            tail_seconds=tail,
            split_seconds=sum(work.weight for work in works[1:]),
            works=tuple(works),
        )


def _told(stages: Sequence[Stage], decoders: Sequence[int], in_flight: Sequence[int]) -> list[int]:
    """As many micro-batches in flight, less where the next stage has no memory for the gradients that it sends and is
    not told of."""
    found = list(in_flight)
    for i in range(len(stages) - 1, 0, -1):
        found[i - 1] = min(found[i - 1], found[i] + stages[i].most_untold(decoders[i], found[i]))
    return found


def divide(layers: int, stages: Sequence[Stage]) -> list[int] | None:
    """Decoders of each stage such that the slowest stage is as quick as can be; None when they do not fit.

    Every stage's seconds rise with its decoders, so handing out one decoder at a time to the stage that
    would then be the quickest is exact for the slowest (the usual exchange argument). Stages between the
    ends hold at least one.
    """
    counts = [0 if stage.first or stage.last else 1 for stage in stages]
    if any(count > stage.cap for count, stage in zip(counts, stages, strict=True)):
        return None
    queue = [(s.seconds(n + 1), i) for i, (n, s) in enumerate(zip(counts, stages, strict=True)) if n < s.cap]
    heapq.heapify(queue)
    for _ in range(layers - sum(counts)):
        if not queue:
            return None
        _, i = queue[0]
        counts[i] += 1
        if counts[i] < stages[i].cap:
            heapq.heapreplace(queue, (stages[i].seconds(counts[i] + 1), i))
        else:
            heapq.heappop(queue)
    return counts
