"""Compile a layout into a program: schedule pipelines, join stages, reduce and update by ownership."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, ComputePrice, PricedSegment, gradient_bytes, state_bytes
from hethub.cost.shapes import BYTES
from hethub.program.actions import Action, Channel, Message, Price, Program, Transfer, What
from hethub.program.exchange import GRADIENT_KINDS, Exchange, WeightSend, plan_exchange
from hethub.program.ownership import Ownership
from hethub.program.parts import Parts, cut_stages
from hethub.program.schedules import SCHEDULES, Shape, Task, forward_only, margins
from hethub.program.updaters import own_by_strength
from hethub.specs.layout import Layout, PipelinePlace, ReplicaPlace, Span, StagePlace, sequence_span
from hethub.timeline.record import Kind, Lane

__all__ = ["compile_program", "pipeline_shape"]

_SCALARS_BYTES = 16  # sum of squares and loss, fp64 each
_STAGE_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.RECOMPUTE)


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


def _alone(seconds: float) -> Price:
    """An action without collectives."""
    return Price(ComputePrice((PricedSegment((seconds,), 0.0),), seconds, (seconds,)), 0)


class _Order(NamedTuple):
    """A pipeline's schedule: its tasks, and every stage's margin (see `schedules.margins`)."""

    tasks: tuple[Task, ...]
    margins: tuple[float, ...]


def _orders(layout: Layout, compute: ComputeModel, training: bool) -> list[_Order]:
    """Every pipeline's; alike pipelines share one."""
    known: dict[tuple[str, Shape], _Order] = {}
    found = []
    for pipeline in layout.pipelines:
        key = (pipeline.schedule, pipeline_shape(compute, pipeline))
        if key not in known:
            tasks = (SCHEDULES[key[0]] if training else forward_only)(key[1])
            known[key] = _Order(tuple(tasks), margins(tasks, key[1]))
        found.append(known[key])
    return found


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
        self.orders = _orders(layout, compute, training)
        self.parts: Parts = self._cut_stages() if training else {}
        self.buckets: dict[int, tuple[tuple[int, ...], ...]] = {}
        self.prices: dict[tuple[int, int, Kind, int], Price] = {}
        self.inbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)
        self.outbound: dict[tuple[int, int, What], list[int]] = defaultdict(list)
        self.unreceived: dict[tuple[int, int], int] = {}  # (transfer, micro-batch) -> message

    def _cut_stages(self) -> Parts:
        found = {
            (pipeline, stage): margin
            for pipeline, order in enumerate(self.orders)
            for stage, margin in enumerate(order.margins)
        }
        return cut_stages(self.layout, self.compute, self.ownership, found)

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
        tokens: Span = (0, 0),
        slices: tuple[int, ...] = (),
    ) -> int:
        lane = Lane.ACTIVATIONS if what in (What.ACTIVATION, What.GRADIENT) else Lane.PARAMETERS
        self.transfers.append(Transfer(what, source, destination, lane, stage, rows, tokens, slices, size))
        return len(self.transfers) - 1

    def join_stages(self, sender: StagePlace, receiver: StagePlace, what: What) -> None:
        """Every rank gets the rows and tokens that it holds between blocks, each once, from the rank that has them.

        So a byte crosses the link between the stages once; the receiving group's all-gather fans it out."""
        length = self.compute.workload.sequence_length
        for target in receiver.replicas:
            for source in sender.replicas:
                rows = _overlap(source.rows, target.rows)
                if rows is None:
                    continue
                for to, taker in enumerate(target.ranks):
                    wanted = sequence_span(length, len(target.ranks), to)
                    for at, giver in enumerate(source.ranks):
                        tokens = _overlap(sequence_span(length, len(source.ranks), at), wanted)
                        if tokens is not None:
                            self.join_ranks(
                                what,
                                (giver.device, sender.index),
                                (taker.device, receiver.index),
                                rows,
                                tokens,
                            )

    def join_ranks(
        self, what: What, source: tuple[int, int], target: tuple[int, int], rows: Span, tokens: Span
    ) -> None:
        """A rectangle of rows and tokens from (device, stage) to (device, stage)."""
        workload = self.compute.workload
        dtype = self.compute.graph.devices[source[0]].type.dtype_for(workload.precision)
        elements = (rows[1] - rows[0]) * (tokens[1] - tokens[0]) * workload.model.hidden_size
        index = self.add_transfer(
            what, source[0], target[0], elements * BYTES[dtype], stage=target[1], rows=rows, tokens=tokens
        )
        self.inbound[(*target, what)].append(index)
        self.outbound[(*source, what)].append(index)

    def sending(self, transfer: int, micro_batch: int = -1) -> Action:
        """A new message along a transfer."""
        number = len(self.messages)
        self.messages.append(Message(transfer, micro_batch))
        self.unreceived[transfer, micro_batch] = number
        return Action(Kind.SEND, self.transfers[transfer].stage, micro_batch, number)

    def receiving(self, transfer: int, micro_batch: int = -1) -> Action:
        """The other end of a message made by `sending`."""
        number = self.unreceived.pop((transfer, micro_batch))
        return Action(Kind.RECEIVE, self.transfers[transfer].stage, micro_batch, number)

    def send(self, transfer: int, micro_batch: int = -1) -> None:
        self.actions[self.transfers[transfer].source].append(self.sending(transfer, micro_batch))

    def receive(self, transfer: int, micro_batch: int = -1) -> None:
        self.actions[self.transfers[transfer].destination].append(self.receiving(transfer, micro_batch))

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

    # -- around and after the pipelines ----------------------------------------------------------------------

    def touch(self, device: int, kind: Kind, size: float, part: int = -1) -> Action:
        """An action without a stage, priced by the memory traffic of `size` bytes."""
        seconds = self.compute.touch_seconds(self.compute.graph.devices[device].type, size)
        self.prices[device, -1, kind, part] = _alone(seconds)
        return Action(kind, -1, -1, -1, part)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of one element of a weight on the wire."""
        precision = self.compute.workload.precision
        types = [self.compute.graph.devices[d].type for d in self.layout.used]
        return min(BYTES[t.dtype_for(precision)] for t in types)

    def reduce(self, exchange: Exchange) -> None:
        """Gradients leave as soon as a part of the last backward has completed them; their updaters add them up."""
        width = gradient_bytes(self.compute.workload.precision)
        elements = self.ownership.route_elements
        inserted: dict[int, list[tuple[Action, Action]]] = defaultdict(list)
        number: dict[int, int] = {}
        for n, send in enumerate(exchange.gradients):
            number[n] = self.add_transfer(
                What.REDUCE, send.source, send.destination, elements(send.slices) * width, slices=send.slices
            )
            inserted[send.source].append((send.behind, self.sending(number[n])))
        for device, entries in inserted.items():
            self.actions[device] = _insert(self.actions[device], entries, before=False)
        for device in self.layout.used:
            for wait in exchange.reductions.get(device, ()):
                for n in wait.needs:
                    self.receive(number[n])
                # each incoming slice is read and added into the device's own
                size = 3 * elements(wait.slices) * width
                self.actions[device].append(self.touch(device, Kind.REDUCE, size, wait.bucket))

    def norm(self) -> None:
        root, *others = self.layout.used
        width = gradient_bytes(self.compute.workload.precision)
        for device in self.layout.used:
            owned = self.ownership.owned_elements.get(device, 0)
            self.actions[device].append(self.touch(device, Kind.NORM, owned * width if self.training else 0))
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

    def update(self, exchange: Exchange) -> None:
        """Bucket by bucket in the order of first use; each leaves for its holders at once. What the step before sent
        is received before the first forward that uses it."""
        waiting: dict[int, list[tuple[Action, int]]] = defaultdict(list)  # holder -> (first use, transfer)
        for device in self.layout.used:
            sends = exchange.weights.get(device, ())
            buckets = self.buckets.get(device, ())
            leaving: dict[int, list[WeightSend]] = defaultdict(list)
            for send in sends:
                leaving[send.bucket].append(send)
            for bucket in range(len(buckets)) or (-1,):  # -1: nothing to update, gradients to clear
                self.actions[device].append(self.update_bucket(device, bucket, len(buckets)))
                for send in leaving[bucket]:
                    size = self.ownership.route_elements(send.slices) * self.weight_bytes
                    transfer = self.add_transfer(
                        What.WEIGHTS, device, send.destination, size, slices=send.slices
                    )
                    self.send(transfer)
                    waiting[send.destination].append((send.first_use, transfer))
        for device, entries in waiting.items():
            self.gather(device, entries)

    def update_bucket(self, device: int, bucket: int, buckets: int) -> Action:
        """Read gradient; read and write master and moments; write the weight. The last bucket's action also clears the
        gradients of all that the device holds."""
        precision = self.compute.workload.precision
        slices = self.buckets[device][bucket] if buckets else ()
        width = gradient_bytes(precision)
        size = BYTES[self.compute.graph.devices[device].type.dtype_for(precision)]
        each = width + 2 * state_bytes(precision) + 2 * size
        cleared = self.ownership.held_elements.get(device, 0) if bucket == buckets - 1 else 0
        return self.touch(
            device,
            Kind.UPDATE,
            self.ownership.route_elements(slices) * each + cleared * width,
            bucket if buckets else -1,
        )

    def gather(self, device: int, entries: list[tuple[Action, int]]) -> None:
        """Receive new weights before their first use, and put them into place."""
        by_use: dict[Action, list[int]] = defaultdict(list)
        for first_use, transfer in entries:
            by_use[first_use].append(transfer)
        inserted: list[tuple[Action, Action]] = []
        for number, first_use in enumerate(a for a in self.actions[device] if a in by_use):
            transfers = by_use[first_use]
            inserted += [(first_use, self.receiving(transfer)) for transfer in transfers]
            size = 2 * sum(self.transfers[transfer].bytes for transfer in transfers)
            inserted.append((first_use, self.touch(device, Kind.GATHER, size, number)))
        self.actions[device] = _insert(self.actions[device], inserted, before=True)

    # -- the end ---------------------------------------------------------------------------------------------

    def build(self) -> Program:
        if self.unreceived:
            raise AssertionError(f"{len(self.unreceived)} messages are sent and never received")
        order = self._order()
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
            depth=dict(self._depths(order)),
            training=self.training,
        )

    def _by_place(self, transfers: list[int]) -> list[int]:
        return sorted(transfers, key=lambda t: (self.transfers[t].rows, self.transfers[t].tokens))

    def _order(self) -> dict[Channel, tuple[int, ...]]:
        """Every channel's messages as its sender's list has them."""
        found: dict[Channel, list[int]] = defaultdict(list)
        for actions in self.actions:
            for action in actions:
                if action.kind == Kind.SEND:
                    entry = self.transfers[self.messages[action.message].transfer]
                    found[entry.source, entry.destination, entry.lane].append(action.message)
        return {channel: tuple(messages) for channel, messages in found.items()}

    def _depths(self, order: dict[Channel, tuple[int, ...]]) -> Iterator[tuple[Channel, int]]:
        """Receives are posted in the sender's order and consumed in any: a buffer is needed for every message
        that is posted before the one waited for and not consumed yet. At least two, so that one can fill
        while the other is read. Gradients to reduce have a buffer each, since their updater looks at the first only
        when its own last backward is done."""
        position = {message: i for messages in order.values() for i, message in enumerate(messages)}
        consumed: dict[Channel, int] = defaultdict(int)
        need = {
            channel: max(2, sum(self._transfer(m).what == What.REDUCE for m in messages))
            for channel, messages in order.items()
        }
        receives = [a for actions in self.actions for a in actions if a.kind == Kind.RECEIVE]
        # New weights are consumed in the next step, after everything else of theirs.
        for action in sorted(receives, key=lambda a: self._transfer(a.message).what == What.WEIGHTS):
            entry = self._transfer(action.message)
            channel = (entry.source, entry.destination, entry.lane)
            need[channel] = max(need[channel], position[action.message] + 1 - consumed[channel])
            consumed[channel] += 1
        for channel, messages in order.items():
            yield channel, min(need[channel], len(messages))

    def _transfer(self, message: int) -> Transfer:
        return self.transfers[self.messages[message].transfer]


def _insert(
    actions: Sequence[Action], entries: Sequence[tuple[Action, Action]], *, before: bool
) -> list[Action]:
    """`actions` with entries (place, new) set before or behind their places, in the order given; behind means behind
    the sends of the place's own results too, for which other stages wait."""
    new: dict[Action, list[Action]] = defaultdict(list)
    for place, action in entries:
        new[place].append(action)
    if before:
        return [entry for action in actions for entry in (*new.get(action, ()), action)]
    found: list[Action] = []
    due: list[Action] = []
    for action in actions:
        if due and action.kind != Kind.SEND:
            found += due
            due = []
        found.append(action)
        due += new.get(action, ())
    return found + due


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
    """The slowest message between two stages."""
    workload = compute.workload
    worst = 0.0
    for source in one.replicas:
        for target in other.replicas:
            rows = _overlap(source.rows, target.rows)
            giver, taker = source.ranks[0].device, target.ranks[0].device
            if rows is None or giver == taker:
                continue
            tokens = min(
                sequence_span(workload.sequence_length, len(r.ranks), 0)[1] for r in (source, target)
            )
            size = BYTES[compute.graph.devices[giver].type.dtype_for(workload.precision)]
            elements = (rows[1] - rows[0]) * tokens * workload.model.hidden_size
            worst = max(worst, compute.graph.path(giver, taker).seconds(elements * size))
    return worst


def compile_program(
    layout: Layout, compute: ComputeModel, *, ownership: Ownership | None = None, training: bool = True
) -> Program:
    """The program of one training step, or of one forward-only evaluation step over the same rows."""
    if ownership is None:
        ownership = own_by_strength(layout, compute)
    builder = _Builder(layout, compute, ownership, training)
    for pipeline in layout.pipelines:
        builder.pipeline(pipeline)
    if not training:
        builder.norm()
        return builder.build()
    exchange = plan_exchange(ownership, builder.parts, layout, builder.actions)
    builder.buckets = dict(exchange.buckets)
    builder.reduce(exchange)
    builder.norm()
    builder.update(exchange)
    return builder.build()
