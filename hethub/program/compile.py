"""Compile a layout into a program: schedule pipelines, join stages, reduce and update by ownership."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hethub.cost.compute import ComputeModel
from hethub.program.actions import Action, Price, Program, What
from hethub.program.exchange import GRADIENT_KINDS, plan_exchange
from hethub.program.hops import hop_seconds, rectangles
from hethub.program.islands import Islands, native_islands
from hethub.program.orders import Shape, Task, margins
from hethub.program.ownership import Ownership
from hethub.program.parameters import ParameterLists
from hethub.program.parts import Parts, cut_stages
from hethub.program.schedules import SCHEDULES, forward_only
from hethub.program.updaters import own_by_strength
from hethub.specs.layout import Layout, PipelinePlace, ReplicaPlace, StagePlace
from hethub.timeline.record import Kind

__all__ = ["compile_program", "pipeline_shape"]

_STAGE_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.RECOMPUTE)


class _Order(NamedTuple):
    """A pipeline's schedule: its tasks, and every stage's margin (see `orders.margins`)."""

    tasks: tuple[Task, ...]
    margins: tuple[float, ...]


def _orders(layout: Layout, compute: ComputeModel, training: bool) -> list[_Order]:
    """Every pipeline's; alike pipelines share one."""
    known: dict[tuple[str, Shape], _Order] = {}
    found = []
    for pipeline, hops in zip(layout.pipelines, hop_seconds(layout, compute), strict=True):
        key = (pipeline.schedule, pipeline_shape(compute, pipeline, hops))
        if key not in known:
            tasks = (SCHEDULES[key[0]] if training else forward_only)(key[1])
            known[key] = _Order(tuple(tasks), margins(tasks, key[1]))
        found.append(known[key])
    return found


class _Builder(ParameterLists):
    """Collects the lists while compiling; `build` freezes them."""

    def __init__(self, layout: Layout, compute: ComputeModel, ownership: Ownership, training: bool) -> None:
        super().__init__(layout, compute, ownership, training)
        self.groups: dict[tuple[int, int], tuple[int, ...]] = {}
        self.orders = _orders(layout, compute.by_figures, training)
        self.parts: Parts = self._cut_stages() if training else {}
        self.inbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)
        self.outbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)

    def _cut_stages(self) -> Parts:
        found = {
            (pipeline, stage): margin
            for pipeline, order in enumerate(self.orders)
            for stage, margin in enumerate(order.margins)
        }
        return cut_stages(self.layout, self.compute.by_figures, self.ownership, found)

    # -- between stages ---------------------------------------------------------------------------------------

    def join_stages(self, sender: StagePlace, receiver: StagePlace, what: What) -> None:
        """A transfer for every rectangle that passes from one stage to the other."""
        for giver, taker, rows, tokens, size in rectangles(self.compute, sender, receiver):
            source, target = (giver.device, sender.index), (taker.device, receiver.index)
            index = self.add_transfer(
                what, giver.device, taker.device, size, stage=receiver.index, rows=rows, tokens=tokens
            )
            self.inbound[(*target, what)].append(index)
            self.outbound[(*source, what)].append(index)

    # -- the pipelines ---------------------------------------------------------------------------------------

    def pipeline(self, pipeline: PipelinePlace) -> None:
        for one, other in pairwise(pipeline.stages):
            self.join_stages(one, other, What.ACTIVATION)
            if self.training:
                self.join_stages(other, one, What.GRADIENT)
        for stage in pipeline.stages:
            for replica in stage.replicas:
                self.price_replica(pipeline, stage, replica)
        order = self.orders[pipeline.index].tasks
        cut = self._cut_tasks(order)
        for task in order:
            self.task(pipeline, pipeline.stages[task.stage], task, task in cut)

    def _cut_tasks(self, order: Sequence[Task]) -> set[Task]:
        """The tasks that run part by part: each stage's first forward, into which weights arrive, and the last that
        completes gradients, out of which they leave."""
        first: dict[int, Task] = {}
        last: dict[int, Task] = {}
        for task in order:
            if task.kind == Kind.FORWARD:
                first.setdefault(task.stage, task)
            elif task.kind in GRADIENT_KINDS:
                last[task.stage] = task
        return {*first.values(), *last.values()} if self.training else set()

    def price_replica(self, pipeline: PipelinePlace, stage: StagePlace, replica: ReplicaPlace) -> None:
        """Prices of all actions of a stage's replica, whole and by part."""
        rows = replica.rows[1] - replica.rows[0]
        devices = tuple(rank.device for rank in replica.ranks)
        cut = self.parts.get((pipeline.index, stage.index), (stage.layers,))
        spans = {-1: stage.layers} | (dict(enumerate(cut)) if len(cut) > 1 else {})
        for device in devices:
            self.groups[device, stage.index] = devices
        for part, layers in spans.items():
            for kind in _STAGE_KINDS if self.training else (Kind.FORWARD,):
                price = self.compute.group_price(
                    replica.ranks, layers, rows, kind, recompute=stage.recompute, training=self.training
                )
                for member, device in enumerate(devices):
                    meets = any(segment.collective_seconds for segment in price.segments)
                    self.prices[device, stage.index, kind, part] = (
                        Price(price, member) if meets else Price(price.alone(member), 0)
                    )

    def task(self, pipeline: PipelinePlace, stage: StagePlace, task: Task, cut: bool) -> None:
        """One piece of work on every rank of the stage, with the messages around it."""
        what = What.ACTIVATION if task.kind == Kind.FORWARD else What.GRADIENT
        alone = task.kind == Kind.BACKWARD_WEIGHT  # nobody waits for it
        recomputes = stage.recompute != "none" and task.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        for device in stage.devices():
            if recomputes:
                # Before the gradient is waited for: what it takes hides in the wait.
                self.actions[device].append(Action(Kind.RECOMPUTE, stage.index, task.micro_batch, -1))
            for transfer in () if alone else self.inbound.get((device, stage.index, what), ()):
                if self.transfers[transfer].source != device:
                    self.receive(transfer, task.micro_batch)
            self.actions[device].extend(self._work(pipeline, task, cut))
        for device in stage.devices():
            for transfer in () if alone else self.outbound.get((device, stage.index, what), ()):
                if self.transfers[transfer].destination != device:
                    self.send(transfer, task.micro_batch)

    def _work(self, pipeline: PipelinePlace, task: Task, cut: bool) -> list[Action]:
        """A task as one action, or as one a part, backward from the last part on."""
        count = len(self.parts.get((pipeline.index, task.stage), ())) if cut else 1
        if count < 2:
            return [Action(task.kind, task.stage, task.micro_batch, -1)]
        order = range(count) if task.kind == Kind.FORWARD else reversed(range(count))
        return [Action(task.kind, task.stage, task.micro_batch, -1, part) for part in order]

    # -- the end ---------------------------------------------------------------------------------------------

    def build(self) -> Program:
        if self.unreceived:
            raise AssertionError(f"{len(self.unreceived)} messages are sent and never received")
        order = self.order()
        parts = {
            (device, stage.index): self.parts.get((pipeline.index, stage.index), (stage.layers,))
            for pipeline in self.layout.pipelines
            for stage in pipeline.stages
            for device in stage.devices()
        }
        return Program(
            layout=self.layout,
            ownership=self.ownership,
            devices=tuple(tuple(actions) for actions in self.actions),
            transfers=tuple(self.transfers),
            messages=tuple(self.messages),
            groups=self.groups,
            parts=parts,
            buckets=self.buckets,
            prices=self.prices,
            inbound={key: tuple(self._by_place(v)) for key, v in self.inbound.items()},
            outbound={key: tuple(v) for key, v in self.outbound.items()},
            order=order,
            depth=dict(self.depths(order)),
            training=self.training,
        )

    def _by_place(self, transfers: list[int]) -> list[int]:
        return sorted(transfers, key=lambda t: (self.transfers[t].rows, self.transfers[t].tokens))


def pipeline_shape(compute: ComputeModel, pipeline: PipelinePlace, hops: tuple[float, ...]) -> Shape:
    """What the schedule may know: the slowest replica's times, seconds of the hops, limits, shared devices."""

    def slowest(stage: StagePlace, work: Kind) -> float:
        return max(
            compute.group_price(
                r.ranks, stage.layers, r.rows[1] - r.rows[0], work, recompute=stage.recompute
            ).seconds
            for r in stage.replicas
        )

    stages = pipeline.stages
    again = [slowest(s, Kind.RECOMPUTE) for s in stages]
    return Shape(
        micro_batches=pipeline.micro_batches,
        forward_seconds=tuple(slowest(s, Kind.FORWARD) for s in stages),
        backward_seconds=tuple(slowest(s, Kind.BACKWARD) + a for s, a in zip(stages, again, strict=True)),
        input_seconds=tuple(slowest(s, Kind.BACKWARD_INPUT) + a for s, a in zip(stages, again, strict=True)),
        weight_seconds=tuple(slowest(s, Kind.BACKWARD_WEIGHT) for s in stages),
        hop_seconds=hops,
        in_flight=tuple(min(s.in_flight, pipeline.micro_batches) for s in stages),
        resources=_resources(stages),
    )


def _resources(stages: Sequence[StagePlace]) -> tuple[int, ...]:
    """A number for each stage, the same where stages share a device, directly or by way of others."""
    numbers: list[int] = []
    last: dict[int, int] = {}  # device -> the latest stage that it stands in
    for stage in stages:
        joined = {numbers[last[device]] for device in stage.devices() if device in last}
        number = min(joined, default=stage.index)
        numbers = [number if n in joined else n for n in numbers]
        numbers.append(number)
        last.update(dict.fromkeys(stage.devices(), stage.index))
    return tuple(numbers)


def compile_program(
    layout: Layout,
    compute: ComputeModel,
    *,
    ownership: Ownership | None = None,
    training: bool = True,
    islands: Islands | None = None,
) -> Program:
    """The program of one training step, or of one forward-only evaluation step over the same rows.

    Lists and owners depend on the plan alone: a profile or calibration of `compute` only prices them.
    Inside an island collectives carry gradients and weights; by default islands are where a vendor's library is.
    """
    if ownership is None:
        ownership = own_by_strength(layout, compute)
    builder = _Builder(layout, compute, ownership, training)
    for pipeline in layout.pipelines:
        builder.pipeline(pipeline)
    if not training:
        builder.norm()
        return builder.build()
    if islands is None:
        islands = native_islands(compute.graph, layout.used)
    exchange = plan_exchange(ownership, builder.parts, layout, builder.actions, islands)
    builder.buckets = dict(exchange.buckets)
    builder.reduce(exchange)
    builder.norm()
    builder.update(exchange)
    return builder.build()
