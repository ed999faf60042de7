"""The executor: interprets one device's action list. Clock, device, channels and data come as arguments.

It knows no schedule and no backend: it runs what the program lists, in order, and records every action.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hethub.cost.shapes import parameter_span
from hethub.data.batches import Batches
from hethub.launch.communicator import Communicator, Delivery
from hethub.launch.devices import ComputeDevice, Timing
from hethub.launch.faults import Hook, Phase
from hethub.launch.model import SoloGroup, StageModel, TensorGroup
from hethub.launch.optimizer import Updater
from hethub.launch.recorder import Recorder
from hethub.program.actions import Action, Price, Program, Transfer, What
from hethub.specs.job import OptimizerSettings
from hethub.specs.layout import PipelinePlace, RankPlace, ReplicaPlace, StagePlace
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


@dataclass(slots=True)
class _Flight:
    """One micro-batch held by one stage between its forward and its backward."""

    entry: Tensor
    output: Tensor | None
    targets: Tensor | None = None
    weights: Tensor | None = None


class Executor:
    """Runs a program's steps on one device.

    `stages` are this device's models by stage index; they may be shared by a training and an evaluation program.
    `mark(step, action)` is called before each action.
    """

    def __init__(
        self,
        program: Program,
        device: int,
        *,
        stages: Mapping[int, StageModel],
        compute: ComputeDevice,
        communicator: Communicator,
        recorder: Recorder,
        wide: torch.dtype,
        settings: OptimizerSettings,
        total_steps: int,
        mark: Callable[[int, int], None] = lambda step, action: None,
    ) -> None:
        self.program = program
        self.device = device
        self.stages = stages
        self.compute = compute
        self.communicator = communicator
        self.recorder = recorder
        self.wide = wide
        self.total_steps = total_steps
        self.mark = mark
        self.hook: Hook | None = None
        self.places = local_places(program, device)
        self.actions = program.devices[device]
        self.is_root = device == program.layout.used[0]
        self._solo = SoloGroup()
        self.weights: dict[str, Tensor] = {}
        first: dict[str, int] = {}
        for index, stage in stages.items():
            share = self.places[index].rank.share
            for parameter in program.ownership.parameters:
                if parameter.name in stage.parameters:
                    self.weights[parameter.name] = stage.parameters[parameter.name]
                    first[parameter.name] = parameter_span(parameter, share)[0]
        self.gradients: dict[str, Tensor] = {}
        self.updater = Updater(program.ownership, device, self.weights, first, wide, settings)
        if program.training:
            self._prepare_gradients()
        self._handlers: dict[Kind, Callable[[Action], Timing | None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.RECOMPUTE: self._recompute,
            Kind.SEND: self._send,
            Kind.RECEIVE: self._receive,
            Kind.REDUCE: self._reduce,
            Kind.NORM: self._norm,
            Kind.UPDATE: self._update,
            Kind.GATHER: self._gather,
        }

    def _prepare_gradients(self) -> None:
        """Gradients accumulate in fp32 (fp64) buffers; where weights are that wide, in `.grad` itself."""
        for name, weight in self.weights.items():
            buffer = torch.zeros_like(weight, dtype=self.wide, requires_grad=False)
            self.gradients[name] = buffer
            if weight.dtype == self.wide:
                weight.grad = buffer
            else:
                weight.register_post_accumulate_grad_hook(lambda w, b=buffer: _move_gradient(w, b))
        tally = self.compute.tally
        if tally is not None:
            for tensor in (*self.weights.values(), *self.gradients.values()):
                tally.add(tensor)
            states = sum(m.numel() * 2 * m.element_size() for m in self.updater.masters.values())
            copies = [m for n, m in self.updater.masters.items() if not self._is_view(n, m)]
            tally.grow(states + sum(m.numel() * m.element_size() for m in copies))

    def _is_view(self, number: int, master: Tensor) -> bool:
        return self.updater.view(number, self.weights).data_ptr() == master.data_ptr()

    def run(self, step: int, rows: Rows) -> StepResult:
        """Execute the whole list once. Raises ActionError naming the action that failed."""
        self._step = step
        self._rows = rows
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._parts: dict[tuple[What, int, int], dict[int, Tensor]] = defaultdict(dict)
        self._outgoing: dict[tuple[What, int, int], list[Tensor | int]] = {}
        self._mail: dict[int, Tensor] = {}
        self._loss = 0.0
        self._squares = 0.0
        self._totals: Tensor | None = None
        self._parameters_open = False
        self.communicator.begin(Lane.ACTIVATIONS)
        for number, action in enumerate(self.actions):
            self.mark(step, number)
            self._number = number
            try:
                if not self._parameters_open and self._is_parameter(action):
                    self.communicator.begin(Lane.PARAMETERS)
                    self._parameters_open = True
                if self.hook is not None:
                    self.hook(step, number, Phase.BEFORE)
                timing = self._handlers[action.kind](action)
                if self.hook is not None:
                    self.hook(step, number, Phase.AFTER)
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ActionError(self.program.describe(self.device, number), text) from error
            self.recorder.add(step, self.device, number, action, timing)
        self.communicator.drain()
        totals = self._combined()
        return StepResult(
            float(totals[1]) / rows.tokens, math.sqrt(float(totals[0])) if self.program.training else math.nan
        )

    def _is_parameter(self, action: Action) -> bool:
        """The parameter lane opens after the pipeline: until then its buffers would only take memory."""
        return action.stage < 0

    # -- compute -------------------------------------------------------------------------------------------------

    def _price(self, action: Action) -> Price:
        return self.program.prices[self.device, action.stage, action.kind]

    def _group(self, action: Action) -> TensorGroup:
        return self.stages[action.stage].group if action.stage >= 0 else self._solo

    def _run_math(self, action: Action, work: Callable[[], None]) -> Timing:
        def math() -> None:
            self._during()
            work()

        return self.compute.compute(
            self._price(action), self._group(action), work if self.hook is None else math
        )

    def _during(self) -> None:
        if self.hook is not None:
            self.hook(self._step, self._number, Phase.DURING)

    def _entry(self, action: Action) -> _Flight:
        """Assemble a stage's input: tokens where it begins the model, else the rows received."""
        place, stage = self.places[action.stage], self.stages[action.stage]
        device = self.compute.torch_device
        targets = weights = None
        tokens: Tensor | None = None
        if stage.first or stage.last:
            pipeline = place.pipeline
            base = pipeline.first_row + action.micro_batch * pipeline.micro_batch_rows
            inputs, wanted, weight = self._rows.get(
                base + place.replica.rows[0], base + place.replica.rows[1]
            )
            if stage.first:
                tokens = torch.from_numpy(np.ascontiguousarray(inputs)).to(device)
            if stage.last:
                targets = torch.from_numpy(np.ascontiguousarray(wanted)).to(device)
                weights = torch.from_numpy(weight).to(device)
        if tokens is not None:
            return _Flight(tokens, None, targets, weights)
        entry = self._assemble(What.ACTIVATION, action)
        return _Flight(entry, None, targets, weights)

    def _assemble(self, what: What, action: Action) -> Tensor:
        """Join the parts of a stage's input or output gradient in row order."""
        parts = self._parts.pop((what, action.stage, action.micro_batch))
        ordered = [parts[t] for t in self.program.inbound[self.device, action.stage, what]]
        return ordered[0] if len(ordered) == 1 else torch.cat(ordered)

    def _forward(self, action: Action) -> Timing:
        flight = self._entry(action)
        stage = self.stages[action.stage]
        keep = self.program.training and self.places[action.stage].stage.recompute != "full"
        timing = self._run_math(action, lambda: self._run_forward(stage, flight, keep))
        self._flights[action.stage, action.micro_batch] = flight
        assert flight.output is not None
        if stage.last:
            if self.places[action.stage].counts_loss:
                self._loss += float(flight.output.detach())
        else:
            self._offer(What.ACTIVATION, action, flight.output.detach())
        if not keep:
            flight.output = None
        if not self.program.training:
            del self._flights[action.stage, action.micro_batch]
        return timing

    def _run_forward(self, stage: StageModel, flight: _Flight, keep: bool) -> None:
        tally = self.compute.tally
        with torch.set_grad_enabled(keep), tally.saving() if tally is not None and keep else nullcontext():
            if keep and flight.entry.is_floating_point():
                flight.entry.requires_grad_()
            flight.output = stage.forward(flight.entry, flight.targets, flight.weights)

    def _recompute(self, action: Action) -> Timing:
        flight = self._flights[action.stage, action.micro_batch]
        return self._run_math(action, lambda: self._run_forward(self.stages[action.stage], flight, True))

    def _backward(self, action: Action) -> Timing:
        flight = self._flights.pop((action.stage, action.micro_batch))
        stage = self.stages[action.stage]
        output = flight.output
        assert output is not None
        if stage.last:
            gradient = torch.tensor(1.0 / self._rows.tokens, dtype=output.dtype, device=output.device)
        else:
            gradient = self._assemble(What.GRADIENT, action)
        timing = self._run_math(action, lambda: output.backward(gradient))
        if not stage.first:
            assert flight.entry.grad is not None
            self._offer(What.GRADIENT, action, flight.entry.grad)
        return timing

    # -- activations between stages ------------------------------------------------------------------------------

    def _offer(self, what: What, action: Action, value: Tensor) -> None:
        """Keep a result until its last send; hand local parts over at once."""
        sends = 0
        for number in self.program.outbound.get((self.device, action.stage, what), ()):
            transfer = self.program.transfers[number]
            if transfer.destination == self.device:
                part = self._cut(transfer, action.stage, value)
                self._parts[what, transfer.stage, action.micro_batch][number] = part
            else:
                sends += 1
        if sends:
            self._outgoing[what, action.stage, action.micro_batch] = [value, sends]

    def _cut(self, transfer: Transfer, stage: int, value: Tensor) -> Tensor:
        offset = self.places[stage].replica.rows[0]
        return value[transfer.rows[0] - offset : transfer.rows[1] - offset].clone()

    def _send_activation(self, transfer: Transfer, action: Action) -> list[Tensor]:
        step = -1 if transfer.what == What.ACTIVATION else 1
        key = (transfer.what, transfer.stage + step, action.micro_batch)
        entry = self._outgoing[key]
        value = entry[0]
        assert isinstance(value, Tensor) and isinstance(entry[1], int)
        entry[1] -= 1
        if entry[1] == 0:
            del self._outgoing[key]
        offset = self.places[key[1]].replica.rows[0]
        return [value[transfer.rows[0] - offset : transfer.rows[1] - offset]]

    def _send(self, action: Action) -> Timing:
        transfer = self.program.transfers[self.program.messages[action.message].transfer]
        start = self.compute.clock.now()
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            parts = self._send_activation(transfer, action)
        elif transfer.what == What.REDUCE:
            parts = [self._slice_of(self.gradients, n).reshape(-1) for n in transfer.slices]
        elif transfer.what == What.NORM:
            parts = [torch.tensor([self._squares, self._loss], dtype=torch.float64)]
        elif transfer.what == What.TOTAL:
            parts = [self._combined()]
        else:
            parts = [self._slice_of(self.weights, n).detach().reshape(-1) for n in transfer.slices]
        self.communicator.send(action.message, parts, start)
        self._during()
        return Timing(start, self.compute.clock.now(), 0.0, 0.0, 0.0)

    def _receive(self, action: Action) -> Timing:
        transfer = self.program.transfers[self.program.messages[action.message].transfer]
        start = self.compute.clock.now()

        def use(delivery: Delivery) -> None:
            if delivery.arrival is not None:
                self.compute.clock.wait_until(delivery.arrival)
            self._keep(transfer, action, delivery.payload)

        self._during()
        self.communicator.receive(action.message, use)
        return Timing(start, self.compute.clock.now(), 0.0, 0.0, 0.0)

    def _keep(self, transfer: Transfer, action: Action, payload: Tensor) -> None:
        """Copy a message out of its buffer to where its reader looks for it."""
        device = self.compute.torch_device
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            stage = self.stages[transfer.stage]
            rows = transfer.rows[1] - transfer.rows[0]
            shape = (rows, -1, stage.model.hidden_size)
            value = payload.view(stage.dtype).view(shape).clone().to(device)
            number = self.program.messages[action.message].transfer
            self._parts[transfer.what, transfer.stage, action.micro_batch][number] = value
        elif transfer.what == What.REDUCE:
            self._mail[action.message] = payload.view(self.wide).clone().to(device)
        elif transfer.what == What.WEIGHTS:
            dtype = next(iter(self.weights.values())).dtype
            self._mail[action.message] = payload.view(dtype).clone().to(device)
        elif transfer.what == What.NORM:
            self._mail[action.message] = payload.view(torch.float64).clone()
        else:
            self._totals = payload.view(torch.float64).clone()

    # -- after the pipeline --------------------------------------------------------------------------------------

    def _slice_of(self, tensors: Mapping[str, Tensor], number: int) -> Tensor:
        return self.updater.view(number, tensors)

    def _arrived(self, what: What) -> dict[int, tuple[Transfer, Tensor]]:
        """Mail of one kind by sender, in the order of device indices."""
        found = {}
        for message in list(self._mail):
            transfer = self.program.transfers[self.program.messages[message].transfer]
            if transfer.what == what:
                found[transfer.source] = (transfer, self._mail.pop(message))
        return dict(sorted(found.items()))

    def _reduce(self, action: Action) -> Timing:
        return self._run_math(action, self._sum_gradients)

    def _sum_gradients(self) -> None:
        """Sum each owned slice over its contributors in the order of device indices."""
        pieces: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for source, (transfer, flat) in self._arrived(What.REDUCE).items():
            at = 0
            for number in transfer.slices:
                size = self.program.ownership.slices[number].elements
                pieces[number][source] = flat[at : at + size]
                at += size
        for number, master in self.updater.masters.items():
            own = self._slice_of(self.gradients, number)
            total: Tensor | None = None
            for contributor in self.program.ownership.slices[number].contributors:
                piece = own if contributor == self.device else pieces[number][contributor].view(own.shape)
                total = piece.clone() if total is None else total.add_(piece)
            master.grad = total

    def _norm(self, action: Action) -> Timing:
        def work() -> None:
            if self.program.training:
                self._squares = self.updater.sum_of_squares()

        return self._run_math(action, work)

    def _combined(self) -> Tensor:
        """(sum of squares, loss sum) over all devices; on the root summed in the order of device indices."""
        if self._totals is None:
            total = torch.tensor([self._squares, self._loss], dtype=torch.float64)
            if self.is_root:
                for _, value in self._arrived(What.NORM).values():
                    total += value
            self._totals = total
        return self._totals

    def _update(self, action: Action) -> Timing:
        def work() -> None:
            norm = math.sqrt(float(self._combined()[0]))
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient norm is {norm}; lower the learning rate or look at the data"
                )
            self.updater.update(norm, self._step, self.total_steps)
            for buffer in self.gradients.values():
                buffer.zero_()

        return self._run_math(action, work)

    def _gather(self, action: Action) -> Timing:
        return self._run_math(action, self._take_weights)

    def _take_weights(self) -> None:
        with torch.no_grad():
            for transfer, flat in self._arrived(What.WEIGHTS).values():
                at = 0
                for number in transfer.slices:
                    view = self._slice_of(self.weights, number)
                    view.copy_(flat[at : at + view.numel()].view(view.shape))
                    at += view.numel()


def _move_gradient(weight: Tensor, buffer: Tensor) -> None:
    """Add a 16-bit gradient into its wide buffer and forget it."""
    assert weight.grad is not None
    buffer.add_(weight.grad)
    weight.grad = None
