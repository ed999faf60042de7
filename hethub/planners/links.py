"""What links cost a pipeline, roughly: hops between its stages, and the tail in which gradients are
reduced."""

from __future__ import annotations

from typing import NamedTuple

from hethub.cost.graph import Path
from hethub.planners.seats import SeatCost, SeatCosts, Slot
from hethub.planners.stage import Setting, Stage

__all__ = ["Hop", "LinkCosts"]


class Hop(NamedTuple):
    """To the next stage and back: `seconds` of both ways, and how long one way keeps a node's link busy."""

    seconds: float
    load: float


class LinkCosts:
    """Closed forms over the paths between pools; tail rates are kept."""

    def __init__(self, costs: SeatCosts) -> None:
        self.costs = costs
        self._tail_rates: dict[tuple[object, ...], tuple[float, float]] = {}

    def hop(self, one: Stage, other: Stage, setting: Setting) -> Hop:
        """To the next stage and back, over the slowest pair of seats."""
        worst = Hop(0.0, 0.0)
        for source in one.staff.costs:
            for target in other.staff.costs:
                path, shared = self._path(one, source, other, target, setting)
                if path is None:
                    continue
                size = min(source.boundary, target.boundary)
                if not shared:
                    worst = max(worst, Hop(2 * path.seconds(size), 0.0))
                    continue
                # Every rank of the receiving group gets the whole activation over the one link of its
                # node, and groups that share the link wait for half of the others on average.
                load = size * (source.degree + target.degree) / path.bandwidth_bytes_per_second
                seconds = 2 * path.latency_seconds + load * (1 + shared) / 2
                worst = max(worst, Hop(seconds, load / 2 * shared))
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
            apart = setting.copies * one.replicas * degree >= size
        else:
            each = max(1, size // degree)
            apart = one.units[0] // each != (other.units[1] - 1) // each
        path = pools.path(source.pool, target.pool, within_node=not apart)
        return (path, groups) if apart else (path, 0)

    def tail_seconds(self, stage: Stage, decoders: int, setting: Setting) -> float:
        """Reduce, update and gather of the stage's most loaded rank."""
        worst = 0.0
        for cost in stage.staff.costs:
            latency, each = self._tail_rate(cost.pool, cost.degree, stage.holders, setting)
            worst = max(worst, latency + each * stage.elements(cost, decoders))
        return worst

    def least_tail_seconds(self, slot: Slot, setting: Setting) -> float:
        """Least seconds of the tail for each decoder."""
        holders = setting.copies * sum(seat.replicas for seat in slot) + setting.others
        worst = 0.0
        for seat in slot:
            elements = self.costs.cost(seat.pool, seat.degree, 1).decoder_elements
            ways = [setting._replace(stage_major=stage_major) for stage_major in (False, True)]
            worst = max(
                worst,
                elements * min(self._tail_rate(seat.pool, seat.degree, holders, way)[1] for way in ways),
            )
        return worst

    def _tail_rate(self, pool: int, degree: int, holders: int, setting: Setting) -> tuple[float, float]:
        """(latency, seconds for each element that a rank holds) of reduce, update and gather, roughly:
        messages of all devices of a node share its link, and every holder exchanges all that it does not
        update itself."""
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
