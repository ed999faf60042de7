"""Measures a device here and now: layers, products, copies and messages, into the profile format.

Layers run the very code that trains: `StageModel` of one layer, `Flight`, the weight-gradient sink and the optimizer.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hethub.cost.profiles.profile import LayerKey, LayerRow
from hethub.cost.shapes import LayerKind, Parameter, layer_kind
from hethub.launch.flights import Flight
from hethub.launch.gradients import WeightGradients
from hethub.launch.model import StageModel
from hethub.launch.optimizer import AdamW
from hethub.launch.tally import StorageTally
from hethub.specs.job import OptimizerSettings, OptimizerSpec
from hethub.specs.layout import Share, Span
from hethub.specs.workload import Model

__all__ = ["LayerProfiler", "Spread", "copy_bytes_per_second", "product_flops_per_second", "repeated"]

_LEAST_REPEATS = 5
_REPETITION_SECONDS = 0.1
_HELD_UP = 2.0
_SETTINGS = OptimizerSettings(
    **OptimizerSpec(learning_rate=1e-3).model_dump()
)  # its time does not depend on them


@dataclass(frozen=True, slots=True)
class Spread:
    """The mean of repetitions, since a step is a sum of many such times: the median of a CPU's, which are skewed, was
    seen to be 5 % less. `ratio` says how repeatable they were: the distance of the quartiles over the median."""

    seconds: float
    ratio: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Of at least two repetitions. Those beyond twice the median do not count: they were held up."""
        low, middle, high = statistics.quantiles(times, n=4)
        counted = [time for time in times if time <= _HELD_UP * middle]
        return cls(statistics.fmean(counted), (high - low) / middle)


def repeated(once: Callable[[], Sequence[float]], budget_seconds: float) -> list[Spread]:
    """Times of several things that one call measures, over at least five repetitions in about `budget_seconds`.

    A repetition is as many calls as last a tenth of a second, and counts with their mean: what comes in turns, as the
    pauses of a CPU quota, is in each of them. The first calls, which find everything cold, do not count.
    """
    once()
    calls = max(1, math.ceil(_REPETITION_SECONDS / max(sum(once()), 1e-9)))
    found: list[list[float]] = []
    begin = time.perf_counter()
    while len(found) < _LEAST_REPEATS or time.perf_counter() - begin < budget_seconds:
        runs = [once() for _ in range(calls)]
        found.append([sum(times) / calls for times in zip(*runs, strict=True)])
    return [Spread.of(times) for times in zip(*found, strict=True)]


class LayerProfiler:
    """Layers of a model on one torch device, whole (tensor-parallel degree 1)."""

    def __init__(
        self,
        model: Model,
        device_type: str,
        sequence_length: int,
        precision: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.device_type = device_type
        self.sequence_length = sequence_length
        self.precision = precision
        self.dtype = dtype
        self.device = device

    def layers(self) -> Iterator[tuple[LayerKind, int]]:
        """Each kind of layer that the model has, and the first layer of that kind."""
        for layer in (0, 1, self.model.layers + 1):
            yield layer_kind(self.model, layer), layer

    def key(self, layer: int) -> LayerKey:
        """What a layer's rows are found by."""
        kind = layer_kind(self.model, layer)
        return LayerKey(self.model.name, self.device_type, kind, 1, self.sequence_length, self.precision)

    def measure(self, layer: int, rows: int, budget_seconds: float) -> tuple[LayerRow, dict[str, Spread]]:
        """One layer's row for micro-batches of `rows` sequences, and how repeatable its times were."""
        stage = self._stage((layer, layer + 1))
        sink = stage.sink = WeightGradients([stage])
        optimizer = self._optimizer(stage, sink)
        entry, tokens = self._entry(stage, rows), self._tokens(rows)
        weights = torch.ones(rows, device=self.device)
        gradient = None if stage.last else self._hidden(rows)

        def once() -> list[float]:
            whole, split = (Flight(stage, [stage.layers], entry, tokens, weights, 1.0) for _ in range(2))
            found = self._timed(
                lambda: whole.forward([0], keep=True),
                lambda: whole.backward(0, gradient, split=False),
                lambda: optimizer.step(1e-9, 0.5),
            )
            split.forward([0], keep=True)
            return found + self._timed(
                lambda: split.backward(0, gradient, split=True), lambda: split.settle(0)
            )

        names = ("forward", "backward", "update", "backward_input", "backward_weight")
        spreads = dict(zip(names, repeated(once, budget_seconds), strict=True))
        row = LayerRow(
            **asdict(self.key(layer)),
            micro_batch=rows,
            forward_seconds=spreads["forward"].seconds,
            backward_seconds=spreads["backward"].seconds,
            update_seconds=spreads["update"].seconds,
            backward_input_seconds=spreads["backward_input"].seconds,
            backward_weight_seconds=spreads["backward_weight"].seconds,
            parameters=sum(weight.numel() for weight in stage.parameters.values()),
            kept_bytes=self._kept_bytes(stage, entry, tokens, weights),
            peak_bytes=peak_bytes(self.device, once),
            spread=max(spreads["forward"].ratio, spreads["backward"].ratio),
        )
        return row, spreads

    def _kept_bytes(self, stage: StageModel, entry: Tensor, tokens: Tensor, weights: Tensor) -> int:
        """What a micro-batch keeps from its forward to its backward, weights and output left out."""
        tally = StorageTally(sys.maxsize, self.device_type)
        lasting = tally.hold(stage.parameters.values())
        before = tally.live_bytes
        last = stage.last  # which alone keeps targets
        flight = Flight(
            stage, [stage.layers], entry, tokens if last else None, weights if last else None, 1.0, tally
        )
        flight.forward([0], keep=True)
        output = flight.outputs[0]
        assert output is not None
        kept = tally.live_bytes - before - output.untyped_storage().nbytes()
        flight.land()
        lasting.release()
        return kept

    def _stage(self, layers: Span) -> StageModel:
        def weights(parameter: Parameter, span: Span) -> Tensor:
            shape = list(parameter.shape)
            shape[parameter.axis] = span[1] - span[0]
            return torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02

        return StageModel(
            self.model,
            layers,
            Share.whole(self.model),
            sequence_length=self.sequence_length,
            dtype=self.dtype,
            device=self.device,
            weights=weights,
        )

    def _optimizer(self, stage: StageModel, sink: WeightGradients) -> AdamW:
        masters = []
        for name, weight in stage.parameters.items():
            gradient = sink.buffers[name]
            master = weight.detach() if weight.dtype == gradient.dtype else weight.detach().to(gradient.dtype)
            master.grad = gradient
            masters.append(master)
        return AdamW([(masters, 0.1)], _SETTINGS)

    def _hidden(self, rows: int) -> Tensor:
        shape = (rows, self.sequence_length, self.model.hidden_size)
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _tokens(self, rows: int) -> Tensor:
        shape = (rows, self.sequence_length)
        return torch.randint(0, self.model.vocab_size, shape, device=self.device)

    def _entry(self, stage: StageModel, rows: int) -> Tensor:
        return self._tokens(rows) if stage.first else self._hidden(rows)

    def _timed(self, *calls: Callable[[], None]) -> list[float]:
        """Seconds of each call, the device's work included."""
        found = []
        for call in calls:
            begin = time.perf_counter()
            call()
            synchronize(self.device)
            found.append(time.perf_counter() - begin)
        return found


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait()


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int | None:
    """The most bytes that torch had in use on an accelerator during a call, less those before it; None on a host, whose
    allocator does not count."""
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "max_memory_allocated"):
        return None
    before = int(module.memory_allocated(device))
    module.reset_peak_memory_stats(device)
    call()
    return int(module.max_memory_allocated(device)) - before


def product_flops_per_second(
    device: torch.device, dtype: torch.dtype, budget_seconds: float, size: int = 1024
) -> float:
    """Of a square product of `size`: what the device reaches, not its peak."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def once() -> list[float]:
        begin = time.perf_counter()
        torch.matmul(one, other)
        synchronize(device)
        return [time.perf_counter() - begin]

    return 2.0 * size**3 / repeated(once, budget_seconds)[0].seconds


def copy_bytes_per_second(device: torch.device, budget_seconds: float, size_bytes: int = 1 << 26) -> float:
    """Memory traffic of a copy: `size_bytes` read and as many written."""
    one, other = (torch.zeros(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def once() -> list[float]:
        begin = time.perf_counter()
        other.copy_(one)
        synchronize(device)
        return [time.perf_counter() - begin]

    return 2.0 * size_bytes / repeated(once, budget_seconds)[0].seconds
