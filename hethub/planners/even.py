"""The baseline: the best even split, as a planner that knows no device types would make it.

Pipeline x tensor x data parallel degree = all devices, in spec order with tensor-parallel ranks next to each other, then
data parallel, then stages (Megatron's order); equal layers (plus or minus one decoder; embedding in the first stage,
head in the last), equal tensor-parallel shares, equal rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hethub.apportion import apportion
from hethub.cost.compute import ComputeModel
from hethub.cost.memory import device_memory, usable_bytes
from hethub.errors import InfeasibleError
from hethub.planners.candidate import divisors
from hethub.planners.finalists import simulate_plan
from hethub.planners.interface import Found, Problem
from hethub.planners.shares import even_shares, rank_entries
from hethub.specs.devices import format_devices
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, Span, StagePlace
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage

__all__ = ["EvenPlanner"]

_SIMULATED = 4  # of the best by closed form; fewer where programs are big
_BIG = 200_000  # actions of a program of which only one is simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """One even split; `seconds` is the closed form."""

    stages: int
    degree: int
    copies: int
    rows: int
    micro_batches: int
    full: bool
    seconds: float


class EvenPlanner:
    """The best even split over all devices, degrees and micro-batch sizes."""

    def plan(self, problem: Problem) -> Found:
        """Find it. Raises InfeasibleError when no even split fits."""
        found = self.search(problem)
        if found is None:
            raise InfeasibleError(
                f"no even split of {problem.workload.model.name} over all devices of {problem.cluster.name} fits. "
                "Use an uneven one: hethub plan."
            )
        return found

    def search(self, problem: Problem) -> Found | None:
        """Find it, or None when no even split fits."""
        pricing = _Pricing(problem)
        splits = sorted(pricing.splits(), key=lambda split: split.seconds)
        best: Found | None = None
        simulated = 0
        for split in splits:
            if not pricing.may_fit(split):
                continue
            plan = pricing.plan(split)
            done = simulate_plan(plan, problem.compute)
            if done is None:
                continue
            simulated += 1
            found = Found(
                plan=plan, program=done[0], simulation=done[1], considered=len(splits), runners_up=()
            )
            if best is None or found.step_seconds < best.step_seconds:
                best = found
            big = 6 * split.micro_batches * len(pricing.compute.graph.devices) > _BIG
            if simulated == (1 if big else _SIMULATED):
                break
        return best


class _Pricing:
    """Closed-form prices of even splits of one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.compute: ComputeModel = problem.compute
        self.model = problem.workload.model
        self.count = len(self.compute.graph.devices)
        self._times: dict[tuple[object, ...], tuple[float, float]] = {}

    def splits(self) -> Iterator[_Split]:
        """All even splits, priced."""
        batch = self.problem.workload.global_batch
        for stages in divisors(self.count):
            if stages > self.model.layers:
                break
            for degree in divisors(self.count // stages):
                copies = self.count // stages // degree
                if self.model.kv_heads % degree or self.model.ffn_size % degree or batch % copies:
                    continue
                for rows in divisors(batch // copies):
                    for full in (False, True):
                        yield self._split(stages, degree, copies, rows, batch // copies // rows, full)

    def _split(
        self, stages: int, degree: int, copies: int, rows: int, micro_batches: int, full: bool
    ) -> _Split:
        """1F1B: the sum of all stages, then the slowest stage for every further micro-batch; the slowest copy."""
        worst = 0.0
        for chain in self._distinct_chains(stages, degree, copies):
            times = []
            for stage, devices in enumerate(chain):
                forward, backward = self._seconds(devices, self._layers(stage, stages), rows)
                times.append(forward * (2 if full else 1) + backward)
            hops = sum(
                2 * self.compute.graph.path(one[0], other[0]).seconds(self._boundary(rows))
                for one, other in zip(chain, chain[1:], strict=False)
            )
            worst = max(worst, sum(times) + hops + (micro_batches - 1) * max(times))
        worst += self._reduction(degree, copies, stages)
        return _Split(
            stages=stages,
            degree=degree,
            copies=copies,
            rows=rows,
            micro_batches=micro_batches,
            full=full,
            seconds=worst,
        )

    def _group(self, stage: int, copy: int, degree: int, copies: int) -> tuple[int, ...]:
        start = (stage * copies + copy) * degree
        return tuple(range(start, start + degree))

    def _distinct_chains(self, stages: int, degree: int, copies: int) -> list[list[tuple[int, ...]]]:
        """One pipeline of each sequence of device types."""
        devices = self.compute.graph.devices
        found: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for copy in range(copies):
            chain = [self._group(stage, copy, degree, copies) for stage in range(stages)]
            found.setdefault(tuple(devices[d].type.name for group in chain for d in group), chain)
        return list(found.values())

    def _layers(self, stage: int, stages: int) -> Span:
        counts = apportion(self.model.layers, [1.0] * stages)
        start = 1 + sum(counts[:stage])
        return (0 if stage == 0 else start, start + counts[stage] + (stage == stages - 1))

    def _seconds(self, group: tuple[int, ...], layers: Span, rows: int) -> tuple[float, float]:
        """Forward and backward of a micro-batch; groups of the same types on the same path price alike."""
        graph = self.compute.graph
        types = tuple(graph.devices[d].type.name for d in group)
        apart = tuple(graph.path(a, b) for a, b in zip(group, group[1:], strict=False))
        slowest = min((p.bandwidth_bytes_per_second for p in apart), default=0.0)
        key = (types, slowest, layers, rows)
        found = self._times.get(key)
        if found is None:
            shares = even_shares(self.model, len(group))
            ranks = tuple(RankPlace(d, s) for d, s in zip(group, shares, strict=True))
            found = self._times[key] = (
                self.compute.group_price(ranks, layers, rows, backward=False).seconds,
                self.compute.group_price(ranks, layers, rows, backward=True).seconds,
            )
        return found

    def _boundary(self, rows: int) -> int:
        workload = self.problem.workload
        return rows * workload.sequence_length * workload.model.hidden_size * 4

    def _reduction(self, degree: int, copies: int, stages: int) -> float:
        """Gradients to their updaters and weights back, over the slowest path among a stage's copies."""
        if copies == 1:
            return 0.0
        share = even_shares(self.model, degree)[0]
        elements = max(self.compute.stage_parameters(share, self._layers(s, stages)) for s in {0, stages - 1})
        first = self._group(0, 0, degree, copies)[0]
        last = self._group(0, copies - 1, degree, copies)[0]
        path = self.compute.graph.path(first, last)
        return 2 * path.seconds(4.0 * elements * (copies - 1) / copies)

    def may_fit(self, split: _Split) -> bool:
        """Whether every stage fits when its copies share the updates evenly; the exact count comes later."""
        return all(
            self._stage_fits(split, stage, device_type)
            for stage in range(split.stages)
            for device_type in self._types_of(split, stage)
        )

    def _types_of(self, split: _Split, stage: int) -> dict[str, int]:
        """Device types in a stage, each with one of its devices."""
        size = split.copies * split.degree
        devices = self.compute.graph.devices
        return {devices[d].type.name: d for d in range(stage * size, (stage + 1) * size)}

    def _stage_fits(self, split: _Split, stage: int, device_type: str) -> bool:
        device = self._types_of(split, stage)[device_type]
        share = even_shares(self.model, split.degree)[0]
        place = StagePlace(
            stage,
            self._layers(stage, split.stages),
            "full" if split.full else "none",
            split.stages - stage,
            (ReplicaPlace((0, split.rows), (RankPlace(device, share),)),),
        )
        pipeline = PipelinePlace(0, "1f1b", split.micro_batches, split.rows, 0, (place,))
        owned = self.compute.stage_parameters(share, place.layers) // split.copies
        use = device_memory(self.compute, Layout(self.model, (pipeline,)), {device: owned})[device]
        return use.total <= usable_bytes(self.compute.graph.devices[device].type)

    def plan(self, split: _Split) -> Plan:
        """The split as a plan file's content."""
        names = [device.name for device in self.compute.graph.devices]
        stages = []
        for stage in range(split.stages):
            layers = self._layers(stage, split.stages)
            ends = stage in (0, split.stages - 1)
            groups = [
                names[(stage * split.copies + copy) * split.degree :][: split.degree] for copy in range(split.copies)
            ]
            ranks = _ranks(groups, rank_entries(self.model, split.degree, True, ends))
            stages.append(
                Stage(
                    layers=layers,
                    recompute="full" if split.full else "none",
                    in_flight=min(split.stages - stage, split.micro_batches),
                    replicas=[Replica(rows=split.rows, ranks=ranks)],
                )
            )
        pipeline = Pipeline(
            repeat=split.copies,
            micro_batches=split.micro_batches,
            micro_batch_rows=split.rows,
            stages=stages,
        )
        return Plan(
            name="even", pipelines=[pipeline], cluster=self.problem.cluster, workload=self.problem.workload
        )


def _ranks(groups: list[list[str]], entries: tuple[tuple[int, int, int, int], ...]) -> list[Rank]:
    """The rank entries of a stage; the vocabulary may leave the first ranks a word more."""
    ranks = []
    start = 0
    for count, heads, ffn, vocab in entries:
        devices = [name for group in groups for name in group[start : start + count]]
        start += count
        ranks.append(Rank(devices=format_devices(devices), count=count, heads=heads, ffn=ffn, vocab=vocab))
    return ranks
