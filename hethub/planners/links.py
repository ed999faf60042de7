"""What links cost a pipeline, roughly: hops between its stages, and the tail in which gradients are reduced and new
weights sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hethub.cost.graph import Path
from hethub.planners.seats import SeatCost, SeatCosts, Slot
from hethub.planners.stage import Setting, Stage

__all__ = ["Hop", "LinkCosts"]


class Hop(NamedTuple):
    """To the next stage and back: `seconds` of both ways, and how long one way keeps a node's link busy."""

    seconds: float
    load: float


class _Rates(NamedTuple):
    """What follows a stage's last backward, for each element that a rank holds, seconds: the exchange of gradients, and
    behind the last one everywhere the update and the new weights. Each also takes a latency."""

    gradients: float
    update: float
    latency: float


class _Holders(NamedTuple):
    """Groups that hold a stage's layers: of `all` pipelines, and at least `beside` on one node."""

    all: int
    beside: int


class LinkCosts:
    """Closed forms over the paths between pools; tail rates are kept."""

    def __init__(self, costs: SeatCosts) -> None:
        self.costs = costs
        self._tail_rates: dict[tuple[object, ...], _Rates] = {}

    def hop(self, one: Stage, other: Stage, setting: Setting) -> Hop:
        """To the next stage and back, over the slowest pair of seats."""
        worst = Hop(0.0, 0.0)
        for source in one.staff.costs:
            for target in other.staff.costs:
                path, shared = self._path(one, source, other, target, setting)
                if path is None:
                    continue
                size = min(source.boundary, target.boundary)
                # Every rank gets its own rows and tokens, so that a byte travels once each way.
                load = size / path.bandwidth_bytes_per_second
                if not shared:  # every rank of a node has a way of its own
                    load /= min(source.degree, target.degree)
                    worst = max(worst, Hop(2 * (path.latency_seconds + load), 0.0))
                    continue
                # Groups that share the link of a node wait for half of the others on average.
                seconds = 2 * path.latency_seconds + load * (1 + shared)
                worst = max(worst, Hop(seconds, load * shared))
        return worst

    def _path(
        self, one: Stage, source: SeatCost, other: Stage, target: SeatCost, setting: Setting
    ) -> tuple[Path | None, int]:
        """The path between neighbours, and how many groups of a node use its link (0: none is shared)."""
        pools = self.costs.pools
        size, degree = pools[target.pool].node_size, target.degree
        groups = max(1, min(size // degree, setting.copies)) if setting.stage_major else 1
        if source.pool != target.pool:
            return pools.path(source.pool, target.pool), groups
        if setting.stage_major:
            apart = setting.copies * one.replicas >= max(1, size // degree)
        else:
            each = max(1, size // degree)
            apart = one.units[0] // each != (other.units[1] - 1) // each
        path = pools.path(source.pool, target.pool, within_node=not apart)
        return (path, groups) if apart else (path, 0)

    def tail_seconds(self, stages: Sequence[Stage], decoders: Sequence[int], setting: Setting) -> float:
        """Reduce, update and new weights behind the last backward of the first stage, where the pipeline ends.

        Later stages end earlier: their gradients travel while the others' last backwards drain, and those of all
        stages of a node are under way when its first one ends. The updates wait for the last gradient of all.
        """
        drained, gradients, update = 0.0, 0.0, 0.0
        ends = []
        for stage, count in zip(stages, decoders, strict=True):
            drained += stage.backward_seconds(count)
            ends.append(drained)
        margins = self._margins(stages, ends, setting)
        used = {stage.staff.costs[0].pool: stage.units[1] for stage in stages}  # the last of a pool ends them
        for stage, count, margin in zip(stages, decoders, margins, strict=True):
            for cost in stage.staff.costs:
                mates = tuple(sorted({other.pool for other in stage.staff.costs} - {cost.pool}))
                beside = 1 if mates else self._beside(stage, cost, used[cost.pool], setting)
                holders = _Holders(stage.holders, beside)
                rates = self._tail_rate(cost.pool, cost.degree, holders, setting, mates)
                elements = stage.elements(cost, count)
                gradients = max(gradients, rates.latency + rates.gradients * elements - margin)
                update = max(update, rates.latency + rates.update * elements)
        return gradients + update

    def _beside(self, stage: Stage, cost: SeatCost, used: int, setting: Setting) -> int:
        """Groups of a node that hold a stage's layers, at least; a pipeline has `used` groups of the pool."""
        groups = self.costs.pools[cost.pool].node_size // cost.degree
        if setting.stage_major:
            return max(1, min(groups, setting.copies * stage.replicas))
        return max(1, min(groups // used, setting.copies))

    def _margins(self, stages: Sequence[Stage], ends: Sequence[float], setting: Setting) -> list[float]:
        """Seconds from the last backward of the last stage on a node, which begins to fill its link, to the
        pipeline's end."""
        if setting.stage_major:  # a node has one stage of many pipelines
            return list(ends)
        latest: dict[tuple[int, int], float] = {}
        nodes = []
        for stage, end in zip(stages, ends, strict=True):
            cost = stage.staff.costs[0]
            each = max(1, self.costs.pools[cost.pool].node_size // cost.degree)
            node = (cost.pool, stage.units[0] // each)
            nodes.append(node)
            latest[node] = end
        return [latest[node] for node in nodes]

    def least_rates(
        self, slot: Slot, copies: int, pools: Sequence[int], *, alike: bool, must: Sequence[int] = ()
    ) -> tuple[float, float]:
        """Least (update, gradients) seconds of a decoder of a slot in one of `copies` pipelines: all alike, or unlike
        ones on `pools`, of which all `must` work."""
        holders = copies * sum(seat.replicas for seat in slot) if alike else copies
        worst = (0.0, 0.0)
        for seat in slot:
            elements = self.costs.cost(seat.pool, seat.degree, 1).decoder_elements
            mates = tuple(sorted({other.pool for other in slot} - {seat.pool}))
            groups = self.costs.pools[seat.pool].node_size // seat.degree
            found = [
                self._tail_rate(seat.pool, seat.degree, _Holders(number, min(groups, number)), setting, mates)
                for setting, number in self._surroundings(
                    seat.pool, groups, copies, holders, pools, alike, must
                )
            ]
            update, gradients = min(r.update for r in found), min(r.gradients for r in found)
            worst = (max(worst[0], elements * update), max(worst[1], elements * gradients))
        return worst

    def _surroundings(
        self,
        pool: int,
        groups: int,
        copies: int,
        holders: int,
        pools: Sequence[int],
        alike: bool,
        must: Sequence[int],
    ) -> list[tuple[Setting, int]]:
        """Whatever may stand beside a pipeline, with the holders of its layers: alike ones, dealt out in both ways, or
        unlike ones on the pools that must work, else on one other pool (the slowest path counts, so that more pools are
        never quicker). All of this pool may stand on one node, if there are not more unlike pipelines than that has
        devices; as many there are the most that may. Of a pool alone, as many holders as a node has `groups` share its
        way out the best: more send more, fewer leave some of it to one of them."""
        if alike:
            settings = [Setting(copies, 0, (pool,), 1, stage_major) for stage_major in (False, True)]
            return [(setting, holders) for setting in settings]
        others: list[tuple[int, ...]] = [(pool, other) for other in pools if other != pool] or [(pool,)]
        if set(must) - {pool}:
            others = [tuple(sorted({pool, *must}))]
        found = []
        for used in others:
            apart = Setting(1, copies - 1, used, 1)
            close = Setting(1, copies - 1, used, 1, near=(pool,))
            most = self.costs.pools[pool].node_size
            found.append((apart, holders))
            if len(used) > 1:
                found.append((close, holders))
            elif copies <= most:
                found += [(close, holders), (close, most)]
                found += [(apart, groups)] if copies <= groups else []
        return found

    def least_hop(self, one: Slot, other: Slot, rows: int) -> Hop:
        """To the next stage and back over idle links, between the nearest pair of seats with as many rows as may be."""
        pools = self.costs.pools
        best = Hop(math.inf, math.inf)
        for source in one:
            for target in other:
                inside = source.pool == target.pool and 2 * source.degree <= pools[source.pool].node_size
                ways = [pools.path(source.pool, target.pool, within_node=True)] if inside else []
                if source.pool != target.pool or not inside or len(pools[source.pool].nodes) > 1:
                    ways.append(pools.path(source.pool, target.pool))
                for number, path in enumerate(ways):
                    if path is None:
                        continue
                    # of several replicas the one with the fewest rows
                    share = max(1, rows // max(sum(s.replicas for s in slot) for slot in (one, other)))
                    share = 0 if len(one) > 1 or len(other) > 1 else share
                    each = [self.costs.cost(s.pool, s.degree, 1).boundary for s in (source, target)]
                    load = share * min(each) / path.bandwidth_bytes_per_second
                    if inside and number == 0:
                        load /= min(source.degree, target.degree)
                        hop = Hop(2 * (path.latency_seconds + load), 0.0)
                    else:
                        hop = Hop(2 * (path.latency_seconds + load), load)
                    best = Hop(min(best.seconds, hop.seconds), min(best.load, hop.load))
        return best if best.seconds < math.inf else Hop(0.0, 0.0)

    def _tail_rate(
        self, pool: int, degree: int, holders: _Holders, setting: Setting, mates: tuple[int, ...]
    ) -> _Rates:
        """Roughly: messages of all devices of a node share its link, and every holder exchanges all that it does not
        update itself, gradients in the accumulators' width and weights in their own. Replicas of the stage may stand on
        other pools, its `mates`."""
        around = (setting.copies, setting.others, setting.pools, setting.stage_major, pool in setting.near)
        key = (pool, degree, holders, *around, mates)
        if key not in self._tail_rates:
            self._tail_rates[key] = self._find_tail_rate(pool, degree, holders, setting, mates)
        return self._tail_rates[key]

    def _find_tail_rate(
        self, pool: int, degree: int, holders: _Holders, setting: Setting, mates: tuple[int, ...]
    ) -> _Rates:
        compute, pools = self.costs.compute, self.costs.pools
        cost = self.costs.cost(pool, degree, 1)
        owned, moved = 1.0 / holders.all, 1.0 - 1.0 / holders.all

        def touch(each: float) -> float:
            return compute.touch_seconds(pools[pool].type, each)

        # the update also clears all gradients
        written = owned * (2 * cost.gradient + 2 * cost.state + 2 * cost.width) + cost.gradient
        reduced, update = touch(3 * moved * cost.gradient), touch(written + 2 * moved * cost.width)
        if holders.all == 1:
            return _Rates(0.0, update, 0.0)
        each, latency = self._moved_seconds(pool, degree, holders, setting, mates)
        return _Rates(reduced + each * cost.gradient, update + each * cost.width, latency)

    def _moved_seconds(
        self, pool: int, degree: int, holders: _Holders, setting: Setting, mates: tuple[int, ...]
    ) -> tuple[float, float]:
        """Seconds for each byte of a holder that all holders exchange one way, and a latency. Where collectives join
        them all, each byte enters a node once for those that stand there."""
        pools = self.costs.pools
        near = pool in setting.near or len(pools[pool].nodes) == 1
        near = near or (
            setting.stage_major and setting.copies * degree <= pools[pool].node_size and not setting.others
        )
        elsewhere = {*mates, *(setting.pools if setting.others else ())} - {pool}
        paths = [pools.path(pool, pool, within_node=near)] if not mates or setting.others else []
        paths += [pools.path(pool, other) for other in sorted(elsewhere)]
        known = [path for path in paths if path is not None]
        if not known:
            return 0.0, 0.0
        slowest = min(known, key=lambda path: path.bandwidth_bytes_per_second)
        shared = 1.0 if near and not elsewhere else float(pools[pool].node_size)
        if shared > 1.0 and not elsewhere and pools.joined(pool):
            shared /= holders.beside
        moved = (1.0 - 1.0 / holders.all) * shared
        return moved / slowest.bandwidth_bytes_per_second, slowest.latency_seconds
