"""Layers to the stages of one pipeline: exact for the slowest stage, under the memory limit of every device."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.cost.graph import Path
from hethub.planners.seats import Crew, Seat, SeatCost, SeatCosts, Slot, crew_size, crew_slots

__all__ = ["Chain", "Chains", "Setting", "StageDraft"]

_NEVER = float("inf")


class Setting(NamedTuple):
    """What surrounds a pipeline: `copies` alike ones, `others` unlike ones, the `pools` of all of them, most
    micro-batches of one, how units are dealt out (`stage_major`: a stage's replicas next to each other, else a
    pipeline's stages), and how deep stages run ahead: `reach` 0 as 1F1B does without latency, 1 as latency asks,
    2 twice as deep as 0."""

    copies: int
    others: int
    pools: tuple[int, ...]
    micro_batches: int
    stage_major: bool = False
    reach: int = 1


class StageDraft(NamedTuple):
    """One stage: `seats` are (seat with its number of replicas, rows of each)."""

    seats: tuple[tuple[Seat, int], ...]
    decoders: int
    full: bool
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """A priced pipeline. One of M micro-batches takes `fill + (M - 1) * period` seconds, then all take `tail`."""

    crew: Crew
    rows: int
    stages: tuple[StageDraft, ...]
    fill_seconds: float
    period_seconds: float
    tail_seconds: float

    def seconds(self, micro_batches: int) -> float:
        """Closed form of the pipeline's part of the step."""
        return self.fill_seconds + (micro_batches - 1) * self.period_seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Staff:
    """A slot with its rows dealt out.

    `decoder_seconds` is one decoder's forward and backward on the slowest seat, `again_seconds` its forward; without
    and with recomputation at most `most_kept` and `most_recomputed` decoders fit, whatever surrounds the slot.
    """

    seats: tuple[tuple[Seat, int], ...]
    costs: tuple[SeatCost, ...]
    decoder_seconds: float
    again_seconds: float
    most_kept: int
    most_recomputed: int

    def least_seconds(self, decoders: int) -> float:
        """Seconds of a micro-batch over so many decoders in the best of surroundings."""
        if decoders <= self.most_kept:
            return decoders * self.decoder_seconds
        if decoders <= self.most_recomputed:
            return decoders * (self.decoder_seconds + self.again_seconds)
        return _NEVER


class Chains:
    """Prices crews; results are kept, since a search asks for the same ones again."""

    def __init__(self, costs: SeatCosts) -> None:
        self.costs = costs
        self.layers = costs.compute.workload.model.layers
        self._staffs: dict[tuple[Slot, int], _Staff | None] = {}
        self._chains: dict[tuple[Crew, int, Setting], Chain | None] = {}
        self._periods: dict[tuple[Crew, int], tuple[float, float]] = {}
        self._tails: dict[tuple[Crew, Setting], float] = {}
        self._tail_rates: dict[tuple[object, ...], tuple[float, float]] = {}

    def bound(self, crew: Crew, rows: int) -> tuple[float, float]:
        """(least period, least fill) in seconds of any division of the layers, memory and links ignored.

        Infinite when the crew cannot run `rows` rows at all.
        """
        key = (crew, rows)
        found = self._periods.get(key)
        if found is None:
            found = self._periods[key] = self._bound(crew, rows)
        return found

    def _bound(self, crew: Crew, rows: int) -> tuple[float, float]:
        """Whole decoders to the slots, the slowest slot as quick as can be. The ends and the links are left out, and of
        memory only what a single micro-batch needs counts."""
        if crew_size(crew) > self.layers + 2:
            return _NEVER, _NEVER
        runs = []
        for slot, count in crew:
            staff = self.staff(slot, rows)
            if staff is None:
                return _NEVER, _NEVER
            runs.append((staff, count))
        levels = [0] * len(runs)
        queue = [(staff.least_seconds(1), i) for i, (staff, _) in enumerate(runs)]
        heapq.heapify(queue)
        left, period = self.layers, 0.0
        while left > 0:
            period, i = queue[0]
            staff, count = runs[i]
            left -= count  # alike slots take one decoder each
            levels[i] += 1
            heapq.heapreplace(queue, (staff.least_seconds(levels[i] + 1), i))
        return period, max(period, self.layers * min(staff.decoder_seconds for staff, _ in runs))

    def staff(self, slot: Slot, rows: int) -> _Staff | None:
        """Deal the rows of a micro-batch to a slot's replicas by speed; None when there are too few."""
        key = (slot, rows)
        if key not in self._staffs:
            self._staffs[key] = self._deal(slot, rows)
        return self._staffs[key]

    def _deal(self, slot: Slot, rows: int) -> _Staff | None:
        places = [seat for seat in slot for _ in range(seat.count)]
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
        # no end, one micro-batch in flight, updates shared by very many: the least that memory can ask
        most = [min(c.most_decoders(False, False, 1, 1 << 30, full) for c in costs) for full in (False, True)]
        return _Staff(
            seats=seats,
            costs=costs,
            decoder_seconds=max(sum(cost.decoder) for cost in costs),
            again_seconds=max(cost.decoder[0] for cost in costs),
            most_kept=most[0],
            most_recomputed=max(most),
        )

    def chain(self, crew: Crew, rows: int, setting: Setting) -> Chain | None:
        """The best division of the layers over the crew, or None when it does not fit."""
        # Deeper than this a stage never runs ahead, so that more micro-batches price alike.
        setting = setting._replace(micro_batches=min(setting.micro_batches, 4 * crew_size(crew)))
        key = (crew, rows, setting)
        if key not in self._chains:
            self._chains[key] = self._price(crew, rows, setting)
        return self._chains[key]

    def _price(self, crew: Crew, rows: int, setting: Setting) -> Chain | None:
        staffs = [self.staff(slot, rows) for slot in crew_slots(crew)]
        if len(staffs) > self.layers + 2 or None in staffs:
            return None
        known = [staff for staff in staffs if staff is not None]
        count = len(known)
        # As 1F1B holds them; where that does not fit, fewer: slower, and it fits.
        for held in ([count - i for i in range(count)], [(count - i + 1) // 2 for i in range(count)], [1] * count):
            shown = [min(h, setting.micro_batches) for h in held]
            stages = [
                _Stage(staff, i == 0, i == count - 1, shown[i], self._holders(staff, setting))
                for i, staff in enumerate(known)
            ]
            decoders = divide(self.layers, stages)
            if decoders is not None:
                return self._finish(crew, rows, setting, stages, decoders)
        return None

    def _holders(self, staff: _Staff, setting: Setting) -> int:
        """At least so many devices share the update of the stage's layers."""
        return setting.copies * sum(seat.count for seat, _ in staff.seats) + setting.others

    def _finish(
        self, crew: Crew, rows: int, setting: Setting, stages: list[_Stage], decoders: list[int]
    ) -> Chain:
        times = [stage.seconds(n) for stage, n in zip(stages, decoders, strict=True)]
        hops = [self._hop(one, other, setting) for one, other in zip(stages, stages[1:], strict=False)]
        period = max([*times, *(load for _, load in hops)])
        in_flight = self._depths(setting, stages, decoders, times, [hop for hop, _ in hops], period)
        round_trips = _round_trips(times, [hop for hop, _ in hops])
        for trip, held in zip(round_trips, in_flight, strict=True):
            if held < setting.micro_batches:
                period = max(period, trip / held)
        drafts = tuple(
            StageDraft(stage.staff.seats, n, n > stage.cap_none, held)
            for stage, n, held in zip(stages, decoders, in_flight, strict=True)
        )
        tail = max(self._tail(stage, n, setting) for stage, n in zip(stages, decoders, strict=True))
        return Chain(
            crew=crew,
            rows=rows,
            stages=drafts,
            fill_seconds=round_trips[0],
            period_seconds=period,
            tail_seconds=tail,
        )

    def _depths(
        self,
        setting: Setting,
        stages: list[_Stage],
        decoders: list[int],
        times: list[float],
        hops: list[float],
        period: float,
    ) -> list[int]:
        """In-flight micro-batches: enough to bridge the round trip to the last stage, as memory allows."""
        depths = []
        for i, (stage, trip) in enumerate(zip(stages, _round_trips(times, hops), strict=True)):
            wanted = stage.held
            if setting.reach == 1:
                wanted = max(wanted, math.ceil(trip / period - 1e-9))
            elif setting.reach == 2:
                wanted = 2 * (len(stages) - i)
            room = stage.most_in_flight(decoders[i])
            depths.append(min(setting.micro_batches, max(stage.held, min(wanted, room))))
        return depths

    def _hop(self, one: _Stage, other: _Stage, setting: Setting) -> tuple[float, float]:
        """(seconds of a transfer to the next stage, seconds that it and its neighbours take from a node's link)."""
        worst = load = 0.0
        for source in one.staff.costs:
            for target in other.staff.costs:
                path, shared = self._path(source, target, setting)
                if path is None:
                    continue
                size = min(source.boundary, target.boundary)
                # Every rank of the receiving group gets the whole activation over the one link of its node.
                copies = target.degree if shared else 1
                worst = max(worst, path.seconds(size * copies))
                load = max(load, size * copies * shared / path.bandwidth_bytes_per_second)
        return worst, load

    def _path(self, source: SeatCost, target: SeatCost, setting: Setting) -> tuple[Path | None, int]:
        """The path between neighbours, and how many groups of a node use its link (0 where none is shared)."""
        pools = self.costs.pools
        if source.pool != target.pool:
            groups = max(1, pools[target.pool].node_size // target.degree)
            return pools.path(source.pool, target.pool), groups if setting.stage_major else 1
        size = pools[source.pool].node_size
        apart = setting.stage_major and setting.copies * source.degree >= size
        if not apart and size >= 2 * source.degree:
            return pools.path(source.pool, source.pool, within_node=True), 0
        return pools.path(source.pool, source.pool), max(1, size // source.degree) if apart else 1

    def _tail(self, stage: _Stage, decoders: int, setting: Setting) -> float:
        """Reduce, update and gather of the stage's most loaded rank."""
        worst = 0.0
        for cost in stage.staff.costs:
            latency, each = self._tail_rate(cost.pool, cost.degree, stage.holders, setting)
            worst = max(worst, latency + each * stage.elements(cost, decoders))
        return worst

    def tail_bound(self, crew: Crew, setting: Setting) -> float:
        """The least `tail_seconds` of any division of the layers: decoders only, fractions allowed."""
        key = (crew, setting)
        found = self._tails.get(key)
        if found is None:
            found = self._tails[key] = self.layers / sum(
                count / self._slot_tail(slot, setting) for slot, count in crew
            )
        return found

    def _slot_tail(self, slot: Slot, setting: Setting) -> float:
        """Least seconds of the tail for each decoder."""
        holders = setting.copies * sum(seat.count for seat in slot) + setting.others
        worst = 0.0
        for seat in slot:
            elements = self.costs.cost(seat.pool, seat.degree, 1).decoder_elements
            ways = [setting._replace(stage_major=stage_major) for stage_major in (False, True)]
            worst = max(
                worst, elements * min(self._tail_rate(seat.pool, seat.degree, holders, way)[1] for way in ways)
            )
        return worst

    def _tail_rate(self, pool: int, degree: int, holders: int, setting: Setting) -> tuple[float, float]:
        """(latency, seconds for each element that a rank holds) of reduce, update and gather, roughly: messages of all
        devices of a node share its link, and every holder exchanges all that it does not update itself."""
        key = (pool, degree, holders, setting.copies, setting.others, setting.pools, setting.stage_major)
        if key not in self._tail_rates:
            self._tail_rates[key] = self._find_tail_rate(pool, degree, holders, setting)
        return self._tail_rates[key]

    def _find_tail_rate(self, pool: int, degree: int, holders: int, setting: Setting) -> tuple[float, float]:
        compute, pools = self.costs.compute, self.costs.pools
        cost = self.costs.cost(pool, degree, 1)
        owned, moved = 1.0 / holders, 1.0 - 1.0 / holders
        traffic = owned * (2 * cost.gradient + 2 * cost.state + 2 * cost.width)
        traffic += moved * (3 * cost.gradient + 2 * cost.width)
        each = compute.touch_seconds(pools[pool].type, traffic)
        if holders == 1:
            return 0.0, each
        size = pools[pool].node_size
        inside = setting.stage_major and not setting.others and setting.copies * degree <= size
        paths = [pools.path(pool, pool, within_node=inside)]
        if setting.others:
            paths += [pools.path(pool, other) for other in setting.pools if other != pool]
        known = [path for path in paths if path is not None]
        if not known:
            return 0.0, each
        slowest = min(known, key=lambda path: path.bandwidth_bytes_per_second)
        shared = 1 if inside else size
        each += moved * (cost.gradient + cost.width) * shared / slowest.bandwidth_bytes_per_second
        return 2 * slowest.latency_seconds, each


class _Stage:
    """A staffed slot in its place: its seconds as a function of its decoders, and its memory limits."""

    def __init__(self, staff: _Staff, first: bool, last: bool, held: int, holders: int) -> None:
        self.staff = staff
        self.first = first
        self.last = last
        self.held = held
        self.holders = holders
        costs = staff.costs
        self.cap_none = min(c.most_decoders(first, last, held, holders, False) for c in costs)
        self.cap = max(self.cap_none, min(c.most_decoders(first, last, held, holders, True) for c in costs))

    def seconds(self, decoders: int) -> float:
        """Forward and backward of a micro-batch on the slowest replica, with recomputation where it must be."""
        forward = backward = 0.0
        for cost in self.staff.costs:
            f, b = decoders * cost.decoder[0], decoders * cost.decoder[1]
            if self.first:
                f, b = f + cost.embedding[0], b + cost.embedding[1]
            if self.last:
                f, b = f + cost.head[0], b + cost.head[1]
            forward, backward = max(forward, f), max(backward, b)
        return 2 * forward + backward if decoders > self.cap_none else forward + backward

    def most_in_flight(self, decoders: int) -> int:
        """How many micro-batches fit beside `decoders` decoders."""
        full = decoders > self.cap_none
        return min(
            c.most_in_flight(self.first, self.last, decoders, self.holders, full) for c in self.staff.costs
        )

    def elements(self, cost: SeatCost, decoders: int) -> int:
        """Parameter elements of the most loaded rank."""
        return cost.ends[self.first, self.last].elements + decoders * cost.decoder_elements


def _round_trips(times: Sequence[float], hops: Sequence[float]) -> list[float]:
    """Seconds from a stage's forward to its backward's end, for every stage, nobody waiting."""
    trips = [times[-1]]
    for seconds, hop in zip(reversed(times[:-1]), reversed(hops), strict=True):
        trips.append(trips[-1] + seconds + 2 * hop)
    return trips[::-1]


def divide(layers: int, stages: Sequence[_Stage]) -> list[int] | None:
    """Decoders of each stage such that the slowest stage is as quick as can be; None when they do not fit.

    Every stage's seconds rise with its decoders, so handing out one decoder at a time to the stage that would then be
    the quickest is exact for the slowest (the usual exchange argument). Stages between the ends hold at least one.
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
