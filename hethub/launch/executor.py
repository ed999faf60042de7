"""The executor: interprets one device's action list. Clock, device, channels and data come as arguments.

It knows no schedule and no backend: it runs what the program lists, in order, and records every action. Messages are
moved by the communicator's own threads meanwhile: a send does not wait, a receive waits for what was posted ahead.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from hethub.cost.shapes import parameter_span
from hethub.data.batches import Batches
from hethub.launch.communicator import Communicator, Delivery
from hethub.launch.devices import ComputeDevice, Timing
from hethub.launch.faults import Hook
from hethub.launch.flights import Flight
from hethub.launch.gradients import WeightGradients
from hethub.launch.groups import SoloGroup
from hethub.launch.island import Island
from hethub.launch.meter import Meter
from hethub.launch.model import StageModel
from hethub.launch.parameters import ParameterLane
from hethub.launch.recorder import Recorder
from hethub.launch.shards import Shards
from hethub.launch.tally import DeviceMemoryError, Held
from hethub.program.actions import SUMS, Action, Program, Transfer, What
from hethub.program.faults import Phase
from hethub.program.memory import opens_parameters
from hethub.specs.job import OptimizerSettings
from hethub.specs.layout import PipelinePlace, RankPlace, ReplicaPlace, Span, StagePlace, sequence_span
from hethub.timeline.record import Kind, Lane

__all__ = ["ActionError", "Executor", "Rows", "StepResult", "local_places"]


class ActionError(Exception):
    """An action failed; `action` says which in words and `__cause__` why."""

    def __init__(self, action: str, reason: str) -> None:
        super().__init__(f"{action}: {reason}")
        self.action = action
        self.reason = reason


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss (mean nats per token over the whole batch) and gradient norm before clipping (NaN in evaluation).

    In evaluation only the root's loss is meaningful.
    """

    loss: float
    norm: float


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a step's rows come from: `get(start, stop)` returns token ids and targets (n, S) of rows [start, stop) of
    the global batch, and the weight of each row; `tokens` is the number of weighted tokens in the whole batch."""

    get: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
    tokens: int


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """One stage as this device takes part in it."""

    pipeline: PipelinePlace
    stage: StagePlace
    replica: ReplicaPlace
    rank: RankPlace
    counts_loss: bool  # one rank of each replica adds up the loss


def local_places(program: Program, device: int) -> dict[int, LocalPlace]:
    """The stages that a device stands in, by stage index (all of one pipeline)."""
    found = {}
    for pipeline in program.layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for number, rank in enumerate(replica.ranks):
                    if rank.device == device:
                        found[stage.index] = LocalPlace(pipeline, stage, replica, rank, number == 0)
    return found


def training_rows(batches: Batches, step: int, global_batch: int, sequence_length: int) -> Rows:
    """The rows of a training step, each of weight one."""

    def get(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs, targets = batches.rows(step, start, stop)
        return inputs, targets, np.ones(stop - start)

    return Rows(get, global_batch * sequence_length)


def held_out_rows(batches: Batches, turn: int, rows: int, global_batch: int, sequence_length: int) -> Rows:
    """Turn `turn` of an evaluation over held-out rows [0, rows); rows past the end weigh nothing."""

    def get(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        wanted = np.arange(turn * global_batch + start, turn * global_batch + stop)
        inside = wanted < rows
        pieces = [batches.held_out_rows(int(i), int(i) + 1) for i in np.where(inside, wanted, 0)]
        inputs, targets = (np.concatenate([p[k] for p in pieces]) for k in (0, 1))
        return inputs, targets, inside.astype(np.float64)

    return Rows(get, rows * sequence_length)


def local_shards(
    program: Program, device: int, stages: Mapping[int, StageModel], sink: WeightGradients
) -> Shards:
    """What a device holds of the parameters, over all of its stages."""
    weights: dict[str, Tensor] = {}
    first: dict[str, int] = {}
    for index, place in local_places(program, device).items():
        for parameter in program.ownership.parameters:
            if parameter.name in stages[index].parameters:
                weights[parameter.name] = stages[index].parameters[parameter.name]
                first[parameter.name] = parameter_span(parameter, place.rank.share)[0]
    return Shards(program.ownership, weights, sink.buffers, first)


@dataclass(slots=True)
class _Leaving:
    """A stage's result until the last of its sends; a tally counts it as long."""

    value: Tensor
    sends: int
    counted: Held | None


class Executor:
    """Runs a program's steps on one device.

    `stages` are this device's models by stage index and `sink` takes their weight gradients; both may be shared by a
    training and an evaluation program. `shards` are both seen by
    parameter. `mark(step, action)` is called before each action; `neighbours` as in `ParameterLane`.
    """

    def __init__(
        self,
        program: Program,
        device: int,
        *,
        stages: Mapping[int, StageModel],
        sink: WeightGradients,
        shards: Shards,
        compute: ComputeDevice,
        communicator: Communicator,
        recorder: Recorder,
        settings: OptimizerSettings,
        total_steps: int,
        mark: Callable[[int, int], None] = lambda step, action: None,
        neighbours: Mapping[int, Shards] = MappingProxyType({}),
    ) -> None:
        self.program = program
        self.device = device
        self.stages = stages
        self.sink = sink
        self.compute = compute
        self.communicator = communicator
        self.island: Island | None = None  # runs the program's collectives, where it has any
        self.recorder = recorder
        self.total_steps = total_steps
        self.mark = mark
        self.hook: Hook | None = None  # interruptions on purpose; None costs nothing
        self.meter: Meter | None = None  # who counts while the run goes on; None costs nothing
        self._sent = math.nan  # when the message of the action was sent, where that is known
        self.places = local_places(program, device)
        self.actions = program.devices[device]
        self._solo = SoloGroup()
        self.lane = ParameterLane(program, device, shards, settings, neighbours)
        self._pieces = self._cut_flights()
        self._opening = opens_parameters(program, device)
        self._letters: list[Tensor] = []  # buffers of parameter mail that has not been read yet
        self._owes = False  # new weights of the last step have not been received yet
        self._carried = [
            (number, action) for number, action in enumerate(self.actions) if program.carried(action)
        ]
        tally = compute.tally
        self._counted = None if tally is None else tally.hold(self._lasting())
        self._handlers: dict[Kind, Callable[[Action], Timing]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward,
            Kind.BACKWARD_WEIGHT: self._backward_weight,
            Kind.RECOMPUTE: self._recompute,
            Kind.SEND: self._send,
            Kind.RECEIVE: self._receive,
            Kind.REDUCE: self._reduce,
            Kind.NORM: self._norm,
            Kind.UPDATE: self._update,
            Kind.GATHER: self._gather,
        }

    def _lasting(self) -> list[Tensor]:
        """What the device keeps from step to step."""
        updater = self.lane.updater
        moments = [
            m for o in updater.optimizers for ms in (o.first_moments, o.second_moments) for m in ms.values()
        ]
        own = [t for m in updater.masters.values() for t in (m, m.grad) if t is not None]
        return [*self.lane.shards.weights.values(), *self.sink.buffers.values(), *own, *moments]

    def _cut_flights(self) -> dict[tuple[int, int], tuple[Span, ...]]:
        """The pieces of each micro-batch that some action runs part by part; the others go whole."""
        return {
            (a.stage, a.micro_batch): self.program.parts[self.device, a.stage]
            for a in self.actions
            if a.stage >= 0 and a.part >= 0
        }

    def run(self, step: int, rows: Rows) -> StepResult:
        """Execute the whole list once. Raises ActionError naming the action that failed.

        New weights of this step may still be on their way when it ends: the next step, or `settle`, takes them.
        """
        self._step = step
        self._rows = rows
        self._flights: dict[tuple[int, int], Flight] = {}
        self._parts: dict[tuple[What, int, int], dict[int, tuple[Tensor, Tensor | None]]] = defaultdict(dict)
        self._outgoing: dict[tuple[What, int, int], _Leaving] = {}
        self.lane.begin()
        self.communicator.begin(Lane.ACTIVATIONS)
        for number, action in enumerate(self.actions):
            if number == self._opening:  # earlier its buffers would only take memory
                self.communicator.begin(Lane.PARAMETERS)
            if self._owes or not self.program.carried(action):
                timing = self._do(number, action)
                self.recorder.add(step, self.device, number, action, timing, self._sent)
        self._owes = self.program.training
        self.compute.settle()
        totals = self.lane.totals()
        norm = math.sqrt(float(totals[0])) if self.program.training else math.nan
        return StepResult(float(totals[1]) / rows.tokens, norm)

    def settle(self) -> None:
        """Take the new weights that are still on their way, and see every message off. Called when a step is not
        followed by another: before evaluation, and before weights are read."""
        if self._owes:
            self._step += 1  # which they belong to
            for number, action in self._carried:
                self._do(number, action)
            self._owes = False
        self.communicator.drain()

    def _do(self, number: int, action: Action) -> Timing:
        self.mark(self._step, number)
        self._number = number
        self._sent = math.nan
        try:
            if self.hook is not None:
                self.hook(self._step, number, Phase.BEFORE)
            timing = self._handlers[action.kind](action)
            if self.hook is not None:
                self.hook(self._step, number, Phase.AFTER)
        except DeviceMemoryError as error:
            recompute = self.places[action.stage].stage.recompute if action.stage >= 0 else "none"
            told = error.in_stage(action.stage, recompute)
            raise ActionError(self.program.describe(self.device, number), str(told)) from told
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ActionError(self.program.describe(self.device, number), text) from error
        return timing

    def _during(self) -> None:
        if self.hook is not None:
            self.hook(self._step, self._number, Phase.DURING)

    # -- compute -------------------------------------------------------------------------------------------------

    def _run_math(self, action: Action, work: Callable[[], None]) -> Timing:
        price = self.program.price(self.device, action)
        group = self._solo if action.stage < 0 or price.alone else self.stages[action.stage].group

        def interrupted() -> None:
            self._during()
            work()

        return self.compute.compute(price, group, work if self.hook is None else interrupted)

    def _run_pieces(self, action: Action, flight: Flight) -> list[int]:
        """The pieces of a flight that an action runs, in the order of forward."""
        if action.part >= 0:
            return [action.part]
        return list(range(len(flight.pieces)))

    def _flight(self, action: Action) -> Flight:
        """A new micro-batch: tokens where the stage begins the model, else the rows received."""
        key = (action.stage, action.micro_batch)
        place, stage = self.places[action.stage], self.stages[action.stage]
        targets = weights = tokens = None
        if stage.first or stage.last:
            pipeline = place.pipeline
            base = pipeline.first_row + action.micro_batch * pipeline.micro_batch_rows
            inputs, wanted, weight = self._rows.get(
                base + place.replica.rows[0], base + place.replica.rows[1]
            )
            if stage.first:
                tokens = self._onto_device(inputs)
            if stage.last:
                targets, weights = self._onto_device(wanted), self._onto_device(weight)
        entry, held = (tokens, []) if tokens is not None else self._assemble(What.ACTIVATION, action)
        pieces = self._pieces.get(key, (place.stage.layers,))
        scale = 1.0 / self._rows.tokens
        flight = self._flights[key] = Flight(
            stage, pieces, entry, targets, weights, scale, self.compute.tally, held
        )
        return flight

    def _onto_device(self, values: np.ndarray) -> Tensor:
        """Numbers of the host, for work that is queued from now on."""
        host = torch.from_numpy(np.ascontiguousarray(values))
        streams = self.compute.streams
        if streams is None:
            return host
        staged = streams.host_memory(host.numel() * host.element_size()).view(host.dtype).view(host.shape)
        return streams.copy_in(staged.copy_(host))[0]

    def _forward(self, action: Action) -> Timing:
        key = (action.stage, action.micro_batch)
        flight = self._flights.get(key) or self._flight(action)
        pieces = self._run_pieces(action, flight)
        keep = self.program.training and self.places[action.stage].stage.recompute != "full"
        timing = self._run_math(action, lambda: flight.forward(pieces, keep=keep))
        if pieces[-1] == len(flight.pieces) - 1:
            self._finish_forward(action, flight)
        return timing

    def _finish_forward(self, action: Action, flight: Flight) -> None:
        assert flight.value is not None
        if flight.stage.last:
            if self.places[action.stage].counts_loss:
                self.lane.losses.append(flight.value)
        else:
            self._offer(What.ACTIVATION, action, flight.value)
        flight.value = None
        if not self.program.training:
            self._land(action)

    def _land(self, action: Action) -> None:
        """The micro-batch is done with the stage: its message buffers are free."""
        flight = self._flights.pop((action.stage, action.micro_batch))
        flight.land()
        for buffer in flight.held:
            self.communicator.release(buffer, Lane.ACTIVATIONS)

    def _recompute(self, action: Action) -> Timing:
        flight = self._flights[action.stage, action.micro_batch]
        return self._run_math(action, flight.recompute)

    def _backward(self, action: Action) -> Timing:
        flight = self._flights[action.stage, action.micro_batch]
        pieces = self._run_pieces(action, flight)
        gradient: Tensor | None = None
        buffers: list[Tensor] = []
        if pieces[-1] == len(flight.pieces) - 1 and not flight.stage.last:
            gradient, buffers = self._assemble(What.GRADIENT, action)
        split = action.kind == Kind.BACKWARD_INPUT

        def work() -> None:
            for piece in reversed(pieces):
                last = piece == len(flight.pieces) - 1
                flight.backward(piece, gradient if last else None, split=split)

        timing = self._run_math(action, work)
        # What a split backward notes may lie in the gradient's buffer, and between pieces it is still read.
        flight.held += buffers
        if pieces[0] == 0:
            if not flight.stage.first:
                self._offer(What.GRADIENT, action, flight.input_gradient)
            if not split:
                self._land(action)
        return timing

    def _backward_weight(self, action: Action) -> Timing:
        flight = self._flights[action.stage, action.micro_batch]
        pieces = self._run_pieces(action, flight)

        def work() -> None:
            for piece in reversed(pieces):
                flight.settle(piece)

        timing = self._run_math(action, work)
        if pieces[0] == 0:
            self._land(action)
        return timing

    # -- activations between stages ------------------------------------------------------------------------------

    def _offer(self, what: What, action: Action, value: Tensor) -> None:
        """Keep a result until its last send; hand local parts over at once."""
        sends = 0
        for number in self.program.outbound.get((self.device, action.stage, what), ()):
            transfer = self.program.transfers[number]
            if transfer.destination == self.device:
                part = self._cut(transfer, action.stage, value)
                self._parts[what, transfer.stage, action.micro_batch][number] = (part, None)
            else:
                sends += 1
        if sends:
            tally = self.compute.tally
            counted = None if tally is None else tally.hold([value])
            self._outgoing[what, action.stage, action.micro_batch] = _Leaving(value, sends, counted)

    def _origin(self, stage: int) -> tuple[int, int]:
        """First row (of the micro-batch) and first token (of the row) that this device holds in a stage."""
        replica, rank = self.places[stage].replica, self.places[stage].rank
        members = len(replica.ranks)
        return replica.rows[0], sequence_span(self._length, members, replica.ranks.index(rank))[0]

    @property
    def _length(self) -> int:
        return next(iter(self.stages.values())).sequence_length

    def _cut(self, transfer: Transfer, stage: int, value: Tensor) -> Tensor:
        """A transfer's rectangle of a stage's result, input or output gradient (rows, tokens, D)."""
        row, token = self._origin(stage)
        rows = slice(transfer.rows[0] - row, transfer.rows[1] - row)
        return value[rows, transfer.tokens[0] - token : transfer.tokens[1] - token]

    def _assemble(self, what: What, action: Action) -> tuple[Tensor, list[Tensor]]:
        """A stage's input or output gradient (rows, tokens, D) from its rectangles, and the message buffers that it
        lies in: a single one is used where it arrived."""
        parts = self._parts.pop((what, action.stage, action.micro_batch), {})
        numbers = self.program.inbound.get((self.device, action.stage, what), ())
        if len(numbers) == 1:
            value, buffer = parts[numbers[0]]
            return value, [] if buffer is None else [buffer]
        transfers = [self.program.transfers[n] for n in numbers]
        replica = self.places[action.stage].replica
        _, token = self._origin(action.stage)
        tokens = max((t.tokens[1] for t in transfers), default=token) - token
        stage, rows = self.stages[action.stage], replica.rows[1] - replica.rows[0]
        device = self.compute.torch_device
        whole = torch.empty(rows, tokens, stage.model.hidden_size, dtype=stage.dtype, device=device)
        for number, transfer in zip(numbers, transfers, strict=True):
            value, buffer = parts[number]
            self._cut(transfer, action.stage, whole).copy_(value)
            if buffer is not None:
                self.communicator.release(buffer, Lane.ACTIVATIONS)
        return whole, []

    def _send(self, action: Action) -> Timing:
        transfer = self.program.transfer(action.message)

        def leave() -> None:
            if transfer.lane == Lane.ACTIVATIONS:
                parts: Sequence[Tensor] = [self._leaving(transfer, action)]
            elif transfer.members:
                self._join(action.message)
                return
            else:
                parts = self.lane.outgoing(transfer)
            now = self.compute.clock.now()
            if self.meter is not None:
                self.meter.send(action.message, now)
            self.communicator.send(action.message, parts, now)
            self._during()

        return self.compute.elapsed(leave)

    def _join(self, message: int) -> None:
        """Begin a collective."""
        assert self.island is not None
        if self.meter is not None:
            self.meter.send(message, self.compute.clock.now())
        self.island.begin(message)
        self._during()

    def _leaving(self, transfer: Transfer, action: Action) -> Tensor:
        step = -1 if transfer.what == What.ACTIVATION else 1
        key = (transfer.what, transfer.stage + step, action.micro_batch)
        entry = self._outgoing[key]
        entry.sends -= 1
        if entry.sends == 0:
            del self._outgoing[key]
        return self._cut(transfer, key[1], entry.value)

    def _receive(self, action: Action) -> Timing:
        transfer = self.program.transfer(action.message)

        def arrive() -> None:
            self._during()
            if transfer.members:
                self._take_part(action.message)
                return
            delivery = self.communicator.receive(action.message)
            if self.meter is not None:
                self._sent = self.meter.received(action.message)
            if delivery.arrival is not None:
                self.compute.clock.wait_until(delivery.arrival)
            if transfer.lane == Lane.ACTIVATIONS:
                self._keep(transfer, action, delivery)
            else:
                self._mail(transfer, delivery)

        return self.compute.elapsed(arrive)

    def _take_part(self, message: int) -> None:
        """End a collective."""
        assert self.island is not None
        self.lane.keep_weights(self.island.end(message))
        if self.meter is not None:
            self._sent = self.meter.received(message)

    def _taken(self, delivery: Delivery, transfer: Transfer) -> tuple[Tensor, Tensor | None]:
        """What came, on the device, and the buffer that it lies in, if it still does."""
        streams = self.compute.streams
        if streams is None:
            return delivery.payload, delivery.buffer
        value, free = streams.copy_in(delivery.payload)
        self.communicator.release(delivery.buffer, transfer.lane, free)
        return value, None

    def _keep(self, transfer: Transfer, action: Action, delivery: Delivery) -> None:
        stage = self.stages[transfer.stage]
        rows, tokens = (span[1] - span[0] for span in (transfer.rows, transfer.tokens))
        value, buffer = self._taken(delivery, transfer)
        value = value.view(stage.dtype).view(rows, tokens, stage.model.hidden_size)
        number = self.program.messages[action.message].transfer
        self._parts[transfer.what, transfer.stage, action.micro_batch][number] = (value, buffer)

    def _mail(self, transfer: Transfer, delivery: Delivery) -> None:
        """Parameter mail is read by a later action; its buffer is free after that."""
        if transfer.what in SUMS:
            payload = delivery.payload.clone()
            self.communicator.release(delivery.buffer, transfer.lane)
        else:
            payload, buffer = self._taken(delivery, transfer)
            if buffer is not None:
                self._letters.append(buffer)
        self.lane.keep(transfer, payload)

    # -- after the pipeline --------------------------------------------------------------------------------------

    def _reduce(self, action: Action) -> Timing:
        return self._run_math(action, lambda: self.lane.reduce(action.part))

    def _norm(self, action: Action) -> Timing:
        self._read_mail()
        return self._run_math(action, self.lane.norm if self.program.training else lambda: None)

    def _update(self, action: Action) -> Timing:
        def work() -> None:
            self.lane.update(action.part, self._step, self.total_steps)
            if action.part == len(self.program.buckets.get(self.device, ())) - 1:
                self.sink.clear()

        return self._run_math(action, work)

    def _gather(self, action: Action) -> Timing:
        timing = self._run_math(action, self.lane.gather)
        self._read_mail()
        return timing

    def _read_mail(self) -> None:
        """All mail so far has been read: its buffers are free."""
        for buffer in self._letters:
            self.communicator.release(buffer, Lane.PARAMETERS)
        self._letters.clear()
