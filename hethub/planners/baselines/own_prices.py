"""Our own cost model as `Prices`, so that the published searches can run under it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from hethub.cost.compute import gradient_bytes, state_bytes
from hethub.cost.graph import Path
from hethub.cost.memory import device_memory, usable_bytes
from hethub.planners.baselines.prices import Floats
from hethub.planners.baselines.split import Group, Kind
from hethub.planners.interface import Problem
from hethub.planners.pools import Pool, Pools
from hethub.planners.shares import even_shares
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, StagePlace
from hethub.timeline.record import Kind as Work

__all__ = ["OwnPrices"]

_MOST_ROWS = 16


class OwnPrices:
    """Implements `Prices` for a planning problem; kinds are its pools. No recomputation: the published searches know
    none. A gradient ring runs over the slowest path among its kinds. Degrees and memory keep the user's constraints."""

    def __init__(self, problem: Problem) -> None:
        compute = problem.compute
        self.problem = problem
        self.pools = Pools(compute.graph)
        known = {number: self._kind(number) for number in self.pools.of_types(problem.types)}
        self._numbers = tuple(number for number, kind in known.items() if kind.degrees)
        self.kinds = tuple(known[number] for number in self._numbers)
        self.decoders = problem.workload.model.layers
        self.batch = problem.workload.global_batch
        self.priced_rows = tuple(
            1 << power for power in range(_MOST_ROWS.bit_length()) if self.batch % (1 << power) == 0
        )
        self._compute = compute
        for cached in ("layer_seconds", "_parameters", "_path", "_ranks", "_most_decoders"):
            setattr(self, cached, lru_cache(maxsize=None)(getattr(self, cached)))

    def _kind(self, number: int) -> Kind:
        pool, model = self.pools[number], self.problem.workload.model
        device = self.problem.compute.graph.devices[pool.nodes[0][0]]
        zone = next(g.zone for g in self.problem.cluster.node_groups if g.name == device.group)
        size = min(len(node) for node in pool.nodes)
        degrees = (1 << power for power in range(size.bit_length()))
        allowed = self.problem.constraints.tensor_parallel.get(pool.known_name)
        return Kind(
            name=pool.type.name,
            device_type=pool.type.name,
            region=zone,
            count=pool.unit_count(1),
            node_size=size,
            degrees=tuple(
                d
                for d in degrees
                if model.kv_heads % d == 0 and model.ffn_size % d == 0 and (allowed is None or d in allowed)
            ),
        )

    def layer_seconds(self, group: Group, rows: int) -> Floats:
        """Forward and backward of a micro-batch, summed up to each layer: [layers + 1]."""
        ranks, last = self._ranks(group), self.decoders + 1

        def seconds(layer: int) -> float:
            works = (Work.FORWARD, Work.BACKWARD)
            prices = (self._compute.group_price(ranks, (layer, layer + 1), rows, work) for work in works)
            return sum(price.seconds for price in prices)

        each = [seconds(0), *[seconds(1)] * self.decoders, seconds(last)]
        return np.concatenate(([0.0], np.cumsum(each)))

    def _ranks(self, group: Group) -> tuple[RankPlace, ...]:
        """The first group of its kind stands for all."""
        devices = self.pool(group.kind).units(group.degree)[0]
        shares = even_shares(self.problem.workload.model, group.degree)
        return tuple(RankPlace(device, share) for device, share in zip(devices, shares, strict=True))

    def pool(self, kind: int) -> Pool:
        """The pool of a kind."""
        return self.pools[self._numbers[kind]]

    def update_seconds(self, group: Group, rows: int, layers: tuple[int, int]) -> float:
        """Reading and writing gradients and optimizer state once."""
        size = self._parameters(group.degree, layers) * state_bytes(self.problem.workload.precision)
        return self._compute.touch_seconds(self.pool(group.kind).type, size)

    def _parameters(self, degree: int, layers: tuple[int, int]) -> int:
        return self._compute.stage_parameters(even_shares(self.problem.workload.model, degree)[0], layers)

    def forth_seconds(self, sender: Group, receiver: Group, last_layer: int, rows: int) -> float:
        """The whole activation over one path between the pools."""
        workload = self.problem.workload
        size = rows * workload.sequence_length * workload.model.hidden_size
        path = self._path(sender.kind, receiver.kind)
        return 0.0 if path is None else path.seconds(size * gradient_bytes(workload.precision))

    def back_seconds(self, sender: Group, receiver: Group, first_layer: int, rows: int) -> float:
        """As much as forth."""
        return self.forth_seconds(sender, receiver, first_layer, rows)

    def _path(self, one: int, other: int) -> Path | None:
        """Between nodes; inside one where a pool has no second."""
        first, second = self._numbers[one], self._numbers[other]
        found = self.pools.path(first, second)
        return self.pools.path(first, second, within_node=True) if found is None else found

    def reduce_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """A ring among ranks with like shares, over its slowest path."""
        if count < 2:
            return 0.0
        degree = min(group.degree for group in groups)
        part = self._parameters(degree, layers) * gradient_bytes(self.problem.workload.precision) / count
        kinds = tuple(sorted({group.kind for group in groups}))
        ends = [*zip(kinds, kinds, strict=True), *pairwise(kinds)]
        paths = [path for path in (self._path(*pair) for pair in ends) if path is not None]
        return 2 * (count - 1) * max((path.seconds(part) for path in paths), default=0.0)

    def node_ring_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """The same: a path's bandwidth is that of its nodes, whatever the message."""
        return self.reduce_seconds(groups, count, layers)

    def fits(self, group: Group, rows: int, layers: tuple[int, int], later_stages: int) -> bool:
        """With all optimizer state on every replica, as those papers count."""
        ends = (layers[0] == 0, layers[1] == self.decoders + 2)
        return layers[1] - layers[0] - sum(ends) <= self._most_decoders(group, rows, ends, later_stages)

    def _most_decoders(self, group: Group, rows: int, ends: tuple[bool, bool], later_stages: int) -> int:
        """Decoders that fit beside the embedding (first of `ends`) and the head; -1 where not even those do."""
        ranks, pool = self._ranks(group), self.pool(group.kind)
        device = ranks[0].device
        reserve = self.problem.constraints.memory_reserve_bytes.get(pool.known_name, 0)
        usable = usable_bytes(pool.type) - reserve

        def fit(decoders: int) -> bool:
            first = 0 if ends[0] else self.decoders + 1 - decoders
            layers = (first, first + decoders + sum(ends)) if any(ends) else (1, 1 + decoders)
            place = StagePlace(0, layers, "none", later_stages + 1, (ReplicaPlace((0, rows), ranks),))
            pipeline = PipelinePlace(0, "1f1b", later_stages + 1, rows, 0, (place,))
            use = device_memory(self._compute, Layout(self.problem.workload.model, (pipeline,)))
            return use[device].total <= usable

        if ends == (True, True):
            return self.decoders if fit(self.decoders) else -1
        least = 0 if any(ends) else 1
        return bisect_left(range(least, self.decoders + 1), True, key=lambda n: not fit(n)) + least - 1
