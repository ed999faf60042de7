"""Compile a layout into a program: schedule pipelines, join stages, reduce and update by ownership."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hethub.cost.compute import ComputeModel, ComputePrice, PricedSegment, gradient_bytes, state_bytes
from hethub.cost.shapes import BYTES
from hethub.program.actions import Action, Channel, Message, Price, Program, Transfer, What
from hethub.program.ownership import Ownership, own
from hethub.program.schedules import SCHEDULES, Shape, Task, forward_only
from hethub.specs.layout import Layout, PipelinePlace, ReplicaPlace, Span, StagePlace
from hethub.timeline.record import Kind, Lane

__all__ = ["compile_program", "pipeline_shape"]

_SCALARS_BYTES = 16  # sum of squares and loss, fp64 each


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


class _Builder:
    """Collects the lists while compiling; `build` freezes them."""

    def __init__(self, layout: Layout, compute: ComputeModel, ownership: Ownership, training: bool) -> None:
        self.layout = layout
        self.compute = compute
        self.ownership = ownership
        self.training = training
        self.actions: list[list[Action]] = [[] for _ in compute.graph.devices]
        self.transfers: list[Transfer] = []
        self.messages: list[Message] = []
        self.groups: dict[tuple[int, int], tuple[int, ...]] = {}
        self.prices: dict[tuple[int, int, Kind], Price] = {}
        self.inbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)
        self.outbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)
        self.order: dict[Channel, list[int]] = defaultdict(list)
        self.unreceived: dict[tuple[int, int], int] = {}  # (transfer, micro-batch) -> message

    # -- transfers -------------------------------------------------------------------------------------------

    def add_transfer(
        self,
        what: What,
        source: int,
        destination: int,
        size: int,
        *,
        stage: int = -1,
        rows: Span = (0, 0),
        slices: tuple[int, ...] = (),
    ) -> int:
        lane = Lane.ACTIVATIONS if what in (What.ACTIVATION, What.GRADIENT) else Lane.PARAMETERS
        self.transfers.append(Transfer(what, source, destination, lane, stage, rows, slices, size))
        return len(self.transfers) - 1

    def join_stages(self, sender: StagePlace, receiver: StagePlace, what: What) -> None:
        """Every receiving rank gets each row once, from one rank of the replica that holds it."""
        workload = self.compute.workload
        for target in receiver.replicas:
            for source in sender.replicas:
                rows = _overlap(source.rows, target.rows)
                if rows is None:
                    continue
                for number, rank in enumerate(target.ranks):
                    giver = source.ranks[number * len(source.ranks) // len(target.ranks)].device
                    dtype = self.compute.graph.devices[giver].type.dtype_for(workload.precision)
                    elements = (rows[1] - rows[0]) * workload.sequence_length * workload.model.hidden_size
                    index = self.add_transfer(
                        what, giver, rank.device, elements * BYTES[dtype], stage=receiver.index, rows=rows
                    )
                    self.inbound[rank.device, receiver.index, what].append(index)
                    self.outbound[giver, sender.index, what].append(index)

    def send(self, transfer: int, micro_batch: int = -1) -> None:
        entry = self.transfers[transfer]
        number = len(self.messages)
        self.messages.append(Message(transfer, micro_batch))
        self.unreceived[transfer, micro_batch] = number
        self.order[entry.source, entry.destination, entry.lane].append(number)
        self.actions[entry.source].append(Action(Kind.SEND, entry.stage, micro_batch, number))

    def receive(self, transfer: int, micro_batch: int = -1) -> None:
        entry = self.transfers[transfer]
        number = self.unreceived.pop((transfer, micro_batch))
        self.actions[entry.destination].append(Action(Kind.RECEIVE, entry.stage, micro_batch, number))

    # -- the pipelines ---------------------------------------------------------------------------------------

    def pipeline(self, pipeline: PipelinePlace) -> None:
        pairs = list(pairwise(pipeline.stages))
        for one, other in pairs:
            self.join_stages(one, other, What.ACTIVATION)
            if self.training:
                self.join_stages(other, one, What.GRADIENT)
        for stage in pipeline.stages:
            for replica in stage.replicas:
                self.price_replica(stage, replica)
        schedule = SCHEDULES[pipeline.schedule] if self.training else forward_only
        shape = pipeline_shape(self.compute, pipeline)
        for task in schedule(shape):
            self.task(pipeline.stages[task.stage], task)

    def price_replica(self, stage: StagePlace, replica: ReplicaPlace) -> None:
        rows = replica.rows[1] - replica.rows[0]
        kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.RECOMPUTE) if self.training else (Kind.FORWARD,)
        prices = {
            kind: self.compute.group_price(
                replica.ranks, stage.layers, rows, kind, recompute=stage.recompute, training=self.training
            )
            for kind in kinds
        }
        devices = tuple(rank.device for rank in replica.ranks)
        for member, device in enumerate(devices):
            self.groups[device, stage.index] = devices
            for kind, price in prices.items():
                self.prices[device, stage.index, kind] = Price(price, member)

    def task(self, stage: StagePlace, task: Task) -> None:
        """One forward or backward on every rank of the stage, with the messages around it."""
        forward = task.kind == Kind.FORWARD
        gets, gives = (What.ACTIVATION, What.ACTIVATION) if forward else (What.GRADIENT, What.GRADIENT)
        recomputes = not forward and stage.recompute != "none"
        for device in stage.devices():
            for transfer in self.inbound.get((device, stage.index, gets), ()):
                if self.transfers[transfer].source != device:
                    self.receive(transfer, task.micro_batch)
            if recomputes:
                self.actions[device].append(Action(Kind.RECOMPUTE, stage.index, task.micro_batch, -1))
            self.actions[device].append(Action(task.kind, stage.index, task.micro_batch, -1))
        for device in stage.devices():
            for transfer in self.outbound.get((device, stage.index, gives), ()):
                if self.transfers[transfer].destination != device:
                    self.send(transfer, task.micro_batch)

    # -- after the pipelines ---------------------------------------------------------------------------------

    def touch(self, device: int, kind: Kind, size: float) -> None:
        """An action without a stage, priced by the memory traffic of `size` bytes."""
        seconds = self.compute.touch_seconds(self.compute.graph.devices[device].type, size)
        price = ComputePrice((PricedSegment((seconds,), 0.0),), seconds, (seconds,))
        self.prices[device, -1, kind] = Price(price, 0)
        self.actions[device].append(Action(kind, -1, -1, -1))

    def route(self, what: What, routes: dict[tuple[int, int], tuple[int, ...]], width: int) -> None:
        """Send slices along every route: a device sends all, neighbours in turn, then receives."""
        count = len(self.actions)
        transfers = {
            (source, destination): self.add_transfer(
                what, source, destination, self.ownership.route_elements(slices) * width, slices=slices
            )
            for (source, destination), slices in routes.items()
        }
        by_turn = sorted(transfers, key=lambda route: ((route[1] - route[0]) % count, route[0]))
        for route in by_turn:
            self.send(transfers[route])
        for route in by_turn:
            self.receive(transfers[route])

    def reduce(self) -> None:
        precision = self.compute.workload.precision
        width = gradient_bytes(precision)
        self.route(What.REDUCE, dict(self.ownership.gradient_routes), width)
        for device in self.layout.used:
            # each incoming slice is read and added into the device's own
            self.touch(device, Kind.REDUCE, 3 * self.ownership.incoming_elements.get(device, 0) * width)

    def norm(self) -> None:
        root, *others = self.layout.used
        width = gradient_bytes(self.compute.workload.precision)
        for device in self.layout.used:
            owned = self.ownership.owned_elements.get(device, 0)
            self.touch(device, Kind.NORM, owned * width if self.training else 0)
        up = [self.add_transfer(What.NORM, d, root, _SCALARS_BYTES) for d in others]
        for transfer in up:
            self.send(transfer)
        for transfer in up:
            self.receive(transfer)
        if self.training:
            down = [self.add_transfer(What.TOTAL, root, d, _SCALARS_BYTES) for d in others]
            for transfer in down:
                self.send(transfer)
            for transfer in down:
                self.receive(transfer)

    def update(self) -> None:
        precision = self.compute.workload.precision
        for device in self.layout.used:
            owned = self.ownership.owned_elements.get(device, 0)
            size = BYTES[self.compute.graph.devices[device].type.dtype_for(precision)]
            # read gradient; read and write master and moments; write the weight
            self.touch(
                device,
                Kind.UPDATE,
                owned * (gradient_bytes(precision) + 2 * state_bytes(precision) + 2 * size),
            )
        narrow = min(BYTES[self.compute.graph.devices[d].type.dtype_for(precision)] for d in self.layout.used)
        self.route(What.WEIGHTS, dict(self.ownership.weight_routes), narrow)
        incoming: dict[int, int] = defaultdict(int)
        for (_, holder), slices in self.ownership.weight_routes.items():
            incoming[holder] += self.ownership.route_elements(slices)
        for device in self.layout.used:
            self.touch(device, Kind.GATHER, 2 * incoming[device] * narrow)

    def build(self) -> Program:
        if self.unreceived:
            raise AssertionError(f"{len(self.unreceived)} messages are sent and never received")
        order = {channel: tuple(messages) for channel, messages in self.order.items()}
        return Program(
            layout=self.layout,
            ownership=self.ownership,
            devices=tuple(tuple(actions) for actions in self.actions),
            transfers=tuple(self.transfers),
            messages=tuple(self.messages),
            groups=self.groups,
            prices=self.prices,
            inbound={key: tuple(self._by_row(v)) for key, v in self.inbound.items()},
            outbound={key: tuple(v) for key, v in self.outbound.items()},
            order=order,
            depth=dict(self._depths(order)),
            training=self.training,
        )

    def _by_row(self, transfers: list[int]) -> list[int]:
        return sorted(transfers, key=lambda t: self.transfers[t].rows)

    def _depths(self, order: dict[Channel, tuple[int, ...]]) -> Iterator[tuple[Channel, int]]:
        """Receives are posted in the sender's order and consumed in any: a buffer is needed for every message
        that is posted before the one waited for and not consumed yet. At least two, so that one can fill
        while the other is read."""
        position = {message: i for messages in order.values() for i, message in enumerate(messages)}
        consumed: dict[Channel, int] = defaultdict(int)
        need: dict[Channel, int] = defaultdict(lambda: 2)
        for actions in self.actions:
            for action in actions:
                if action.kind == Kind.RECEIVE:
                    entry = self.transfers[self.messages[action.message].transfer]
                    channel = (entry.source, entry.destination, entry.lane)
                    need[channel] = max(need[channel], position[action.message] + 1 - consumed[channel])
                    consumed[channel] += 1
        for channel, messages in order.items():
            yield channel, min(need[channel], len(messages))


def pipeline_shape(compute: ComputeModel, pipeline: PipelinePlace) -> Shape:
    """What the schedule may know: the slowest replica's times, the slowest hop, limits, shared devices."""

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
        hop_seconds=tuple(_hop_seconds(compute, one, other) for one, other in pairwise(stages)),
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


def _hop_seconds(compute: ComputeModel, one: StagePlace, other: StagePlace) -> float:
    """The slowest transfer between two stages, first replicas standing for the rest."""
    workload = compute.workload
    worst = 0.0
    source = one.replicas[0].ranks[0].device
    size = BYTES[compute.graph.devices[source].type.dtype_for(workload.precision)]
    for target in other.replicas:
        rows = target.rows[1] - target.rows[0]
        if target.ranks[0].device != source:
            path = compute.graph.path(source, target.ranks[0].device)
            worst = max(
                worst, path.seconds(rows * workload.sequence_length * workload.model.hidden_size * size)
            )
    return worst


def compile_program(
    layout: Layout, compute: ComputeModel, *, ownership: Ownership | None = None, training: bool = True
) -> Program:
    """The program of one training step, or of one forward-only evaluation step over the same rows."""
    builder = _Builder(layout, compute, own(layout) if ownership is None else ownership, training)
    for pipeline in layout.pipelines:
        builder.pipeline(pipeline)
    if training:
        builder.reduce()
    builder.norm()
    if training:
        builder.update()
    return builder.build()
