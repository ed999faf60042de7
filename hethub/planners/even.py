"""The baseline: the best even split, as a planner that knows no device types would make it.

Pipeline x tensor x data parallel degree = all devices, in spec order with tensor-parallel ranks next to
each other, then data parallel, then stages (Megatron's order); equal layers (plus or minus one decoder;
embedding in the first stage, head in the last), equal tensor-parallel shares, equal rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.cost.compute import ComputeModel
from hethub.cost.memory import device_memory, usable_bytes
from hethub.cost.shapes import layer_parameters, parameter_span
from hethub.errors import InfeasibleError
from hethub.planners.candidate import divisors
from hethub.planners.finalists import simulate_plan
from hethub.planners.interface import Found, Problem
from hethub.planners.kept import broken_constraints
from hethub.planners.placement import name_ranks
from hethub.planners.shares import even_shares, rank_entries
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, Share, Span, StagePlace
from hethub.specs.plan import Pipeline, Plan, Replica, Stage
from hethub.specs.workload import Model
from hethub.timeline.record import Kind

__all__ = ["EvenPlanner"]

_SIMULATED = 4  # of the best by closed form; fewer where programs are big
_BIG = 200_000  # actions of a program of which only one is simulated


class _Shape(NamedTuple):
    """Degrees of pipeline, tensor and data parallelism; their product is the number of devices."""

    stages: int
    degree: int
    copies: int

    def group(self, stage: int, copy: int) -> tuple[int, ...]:
        """Devices of one tensor-parallel group."""
        start = (stage * self.copies + copy) * self.degree
        return tuple(range(start, start + self.degree))


class _Split(NamedTuple):
    """One even split; `seconds` is the closed form of its step."""

    shape: _Shape
    rows: int
    micro_batches: int
    full: bool
    seconds: float


class EvenPlanner:
    """The best even split over all devices, degrees and micro-batch sizes, of those that keep the constraints."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def plan(self, problem: Problem) -> Found:
        """Find it. Raises InfeasibleError when no even split fits."""
        found = self.search(problem)
        if found is None:
            raise InfeasibleError(
                f"no even split of {problem.workload.model.name} over all devices of {problem.cluster.name} "
                "fits. Use an uneven one: hethub plan."
            )
        return found

    def search(self, problem: Problem) -> Found | None:
        """Find it, or None when no even split fits."""
        end = self._clock() + problem.seconds
        pricing = _Pricing(problem)
        splits = sorted(pricing.splits(), key=lambda split: split.seconds)
        best: Found | None = None
        simulated = 0
        for split in splits:
            if best is not None and self._clock() >= end:
                break
            if not pricing.may_fit(split):
                continue
            plan = pricing.plan(split)
            if broken_constraints(plan, problem.compute.graph, problem.constraints):
                continue
            reserve = problem.constraints.memory_reserve_bytes
            done = simulate_plan(plan, problem.compute, reserve_bytes=reserve)
            if done is None:
                continue
            simulated += 1
            found = Found(plan=plan, modelled=done, considered=len(splits), runners_up=())
            if best is None or found.step_seconds < best.step_seconds:
                best = found
            big = 6 * split.micro_batches * len(pricing.compute.graph.devices) > _BIG
            if simulated == (1 if big else _SIMULATED):
                break
        return None if best is None else replace(best, modelled=best.modelled.steady())


@lru_cache(maxsize=4096)
def _shared_elements(model: Model, share: Share, layers: Span) -> int:
    """Elements of a rank that nobody but its copies holds: not the norms, which all of its group have, and not a tied
    table with its other end in another stage."""
    held = {
        parameter: parameter_span(parameter, share)
        for layer in range(*layers)
        for parameter in layer_parameters(model, layer)
        if parameter.cut != "none" and all(layers[0] <= place < layers[1] for place in parameter.layers)
    }
    return sum((stop - start) * parameter.elements_per_index for parameter, (start, stop) in held.items())


class _Pricing:
    """Closed-form prices of even splits of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.compute: ComputeModel = problem.compute
        self.model = problem.workload.model
        self.count = len(self.compute.graph.devices)
        self._times: dict[tuple[object, ...], tuple[float, float]] = {}
        self._cuts: dict[int, list[int]] = {}  # stages -> first decoder of each, and the end
        self._kinds: dict[tuple[int, ...], tuple[object, ...]] = {}

    def splits(self) -> Iterator[_Split]:
        """All even splits, priced."""
        batch = self.problem.workload.global_batch
        for shape in self._shapes():
            for rows in divisors(batch // shape.copies):
                micro_batches = batch // shape.copies // rows
                for full in (False, True):
                    seconds = self._step_seconds(shape, rows, micro_batches, full)
                    yield _Split(shape, rows, micro_batches, full, seconds)

    def _shapes(self) -> Iterator[_Shape]:
        """All that divide the devices, the key-value groups, the columns and the batch."""
        model, batch = self.model, self.problem.workload.global_batch
        for stages in divisors(self.count):
            if stages > model.layers:
                break
            for degree in divisors(self.count // stages):
                copies = self.count // stages // degree
                if model.kv_heads % degree == 0 and model.ffn_size % degree == 0 and batch % copies == 0:
                    yield _Shape(stages, degree, copies)

    def _step_seconds(self, shape: _Shape, rows: int, micro_batches: int, full: bool) -> float:
        """1F1B: the sum of all stages, then the slowest for every further micro-batch; the slowest copy."""
        worst = 0.0
        for chain in self._distinct_chains(shape):
            times = []
            for stage, group in enumerate(chain):
                once, again = self._seconds(group, self._layers(stage, shape.stages), rows)
                times.append(once + again if full else once)
            hops = sum(
                2 * self.compute.graph.path(one[0], other[0]).seconds(self._boundary(rows))
                for one, other in pairwise(chain)
            )
            worst = max(worst, sum(times) + hops + (micro_batches - 1) * max(times))
        return worst + self._reduction(shape)

    def _distinct_chains(self, shape: _Shape) -> list[list[tuple[int, ...]]]:
        """One pipeline of each sequence of device types."""
        devices = self.compute.graph.devices
        found: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for copy in range(shape.copies):
            chain = [shape.group(stage, copy) for stage in range(shape.stages)]
            found.setdefault(tuple(devices[d].type.name for group in chain for d in group), chain)
        return list(found.values())

    def _layers(self, stage: int, stages: int) -> Span:
        if stages not in self._cuts:
            counts = apportion(self.model.layers, [1.0] * stages)
            self._cuts[stages] = [1, *(1 + n for n in accumulate(counts))]
        start, stop = self._cuts[stages][stage : stage + 2]
        return (0 if stage == 0 else start, stop + (stage == stages - 1))

    def _seconds(self, group: tuple[int, ...], layers: Span, rows: int) -> tuple[float, float]:
        """(forward and backward, what full recomputation adds: a forward without the head's gradients) of a
        micro-batch; groups of the same types on the same path price alike."""
        ends = (layers[0] == 0, layers[1] == self.model.layers + 2)
        key = (self._kind(group), layers[1] - layers[0], ends, rows)
        found = self._times.get(key)
        if found is None:
            shares = even_shares(self.model, len(group))
            ranks = tuple(RankPlace(d, s) for d, s in zip(group, shares, strict=True))
            price = self.compute.group_price
            found = self._times[key] = (
                price(ranks, layers, rows, Kind.FORWARD).seconds
                + price(ranks, layers, rows, Kind.BACKWARD).seconds,
                price(ranks, layers, rows, Kind.FORWARD, training=False).seconds,
            )
        return found

    def _kind(self, group: tuple[int, ...]) -> tuple[object, ...]:
        """Equal for groups that price alike: their types and slowest path."""
        if group not in self._kinds:
            graph = self.compute.graph
            paths = (graph.path(a, b) for a, b in pairwise(group))
            slowest = min((p.bandwidth_bytes_per_second for p in paths), default=0.0)
            self._kinds[group] = (*(graph.devices[d].type.name for d in group), slowest)
        return self._kinds[group]

    def _boundary(self, rows: int) -> int:
        workload = self.problem.workload
        return rows * workload.sequence_length * workload.model.hidden_size * 4

    def _reduction(self, shape: _Shape) -> float:
        """Gradients to their updaters and weights back, over the slowest path among a stage's copies."""
        if shape.copies == 1:
            return 0.0
        share = even_shares(self.model, shape.degree)[0]
        ends = {0, shape.stages - 1}
        elements = max(self.compute.stage_parameters(share, self._layers(s, shape.stages)) for s in ends)
        path = self.compute.graph.path(shape.group(0, 0)[0], shape.group(0, shape.copies - 1)[0])
        return 2 * path.seconds(4.0 * elements * (shape.copies - 1) / shape.copies)

    def may_fit(self, split: _Split) -> bool:
        """Whether every stage fits however well its copies share the updates; the exact count comes later."""
        devices = self.compute.graph.devices
        size = split.shape.copies * split.shape.degree
        for stage in range(split.shape.stages):
            # the first ranks of a group have the most
            first_of_type = {
                devices[d].type.name: d for d in reversed(range(stage * size, (stage + 1) * size))
            }
            alike = len(first_of_type) == 1
            if not all(self._stage_may_fit(split, stage, d, alike=alike) for d in first_of_type.values()):
                return False
        return True

    def _stage_may_fit(self, split: _Split, stage: int, device: int, *, alike: bool) -> bool:
        """Whether a device fits that updates an even share, or where the copies are not `alike` nothing."""
        copies, degree = split.shape.copies, split.shape.degree
        first, member = device - device % degree, device % degree
        shares = even_shares(self.model, degree)
        place = StagePlace(
            stage,
            self._layers(stage, split.shape.stages),
            "full" if split.full else "none",
            split.shape.stages - stage,
            (ReplicaPlace((0, split.rows), tuple(RankPlace(first + n, s) for n, s in enumerate(shares))),),
        )
        pipeline = PipelinePlace(0, "1f1b", split.micro_batches, split.rows, 0, (place,))
        owned = 0
        if alike or copies == 1:
            owned = _shared_elements(self.model, shares[member], place.layers) // copies
        layout = Layout(self.model, (pipeline,))
        updates = {device: owned}, {device: owned * (copies - 1)}
        use = device_memory(self.compute, layout, *updates, apart_elements={device: 0})[device]
        return use.total <= usable_bytes(self.compute.graph.devices[device].type)

    def plan(self, split: _Split) -> Plan:
        """The split as a plan file's content."""
        shape = split.shape
        pipeline = Pipeline(
            repeat=shape.copies,
            micro_batches=split.micro_batches,
            micro_batch_rows=split.rows,
            stages=[self._stage(split, stage) for stage in range(shape.stages)],
        )
        return Plan(
            name="even", pipelines=[pipeline], cluster=self.problem.cluster, workload=self.problem.workload
        )

    def _stage(self, split: _Split, stage: int) -> Stage:
        shape = split.shape
        names = [device.name for device in self.compute.graph.devices]
        entries = rank_entries(self.model, shape.degree, True, stage in (0, shape.stages - 1))
        groups = [shape.group(stage, copy) for copy in range(shape.copies)]
        return Stage(
            layers=self._layers(stage, shape.stages),
            recompute="full" if split.full else "none",
            in_flight=min(shape.stages - stage, split.micro_batches),
            replicas=[Replica(rows=split.rows, ranks=name_ranks(groups, entries, names))],
        )
