"""Orders of a pipeline's work: what a schedule makes of what it may know, and how long that takes in predicted time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hethub.timeline.record import Kind

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT",
    "KINDS",
    "WEIGHT",
    "Shape",
    "Shortest",
    "Task",
    "makespan",
    "margins",
    "timed",
]


class Task(NamedTuple):
    """One piece of work of a pipeline, on every replica of the stage."""

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a schedule may know of a pipeline.

    `resources` names for each stage the set of stages that share a device with it, by a common number.
    Seconds are per micro-batch; `hop_seconds[s]` is the transfer between stages s and s + 1, one way
    (see `hops.py`).
    `backward_seconds` is the whole backward; split, it is `input_seconds` (which gives the gradient that the stage
    before waits for) and `weight_seconds`, which nobody waits for. Recomputation is inside the whole and the input's.
    `in_flight[s]` is the most micro-batches that stage s holds: from its forward to the end of its whole backward, or
    of its weight part where that is split.
    """

    micro_batches: int
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    input_seconds: tuple[float, ...]
    weight_seconds: tuple[float, ...]
    hop_seconds: tuple[float, ...]
    in_flight: tuple[int, ...]
    resources: tuple[int, ...]

    def seconds(self, kind: Kind) -> tuple[float, ...]:
        """Seconds of this kind of work on each stage."""
        return {
            Kind.FORWARD: self.forward_seconds,
            Kind.BACKWARD: self.backward_seconds,
            Kind.BACKWARD_INPUT: self.input_seconds,
            Kind.BACKWARD_WEIGHT: self.weight_seconds,
        }[kind]

    def hops(self) -> tuple[float, ...]:
        """`hop_seconds`, but 0 between stages of one resource."""
        pairs = pairwise(self.resources)
        return tuple(0.0 if a == b else hop for hop, (a, b) in zip(self.hop_seconds, pairs, strict=True))

    def stages_of(self) -> dict[int, list[int]]:
        """The stages of every resource, in order."""
        members: dict[int, list[int]] = {}
        for stage, resource in enumerate(self.resources):
            members.setdefault(resource, []).append(stage)
        return members


KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)  # by their numbers
FORWARD, BACKWARD, INPUT, WEIGHT = KINDS


def timed(order: Iterable[Task], shape: Shape) -> list[tuple[float, float]]:
    """Start and end in seconds of every task of an order (or of a forward-only one), begun at 0.

    A resource does its tasks one by one in the order's sequence, each once its input is there. Raises ValueError
    where a task stands before one that it needs.
    """
    seconds = [shape.seconds(kind) for kind in KINDS]
    hops, last, resources = shape.hops(), len(shape.resources) - 1, shape.resources
    free = [0.0] * (1 + max(resources))
    # ends of forwards, and of whole backwards and input parts, by stage and micro-batch
    forward: list[dict[int, float]] = [{} for _ in resources]
    backward: list[dict[int, float]] = [{} for _ in resources]
    times = []
    try:
        for kind, stage, micro_batch in order:
            if kind == FORWARD:
                ready = forward[stage - 1][micro_batch] + hops[stage - 1] if stage else 0.0
                done = forward[stage]
            elif kind == WEIGHT:
                ready = backward[stage][micro_batch]
                done = None
            else:
                ready = forward[stage][micro_batch]
                if stage < last:
                    ready = max(ready, backward[stage + 1][micro_batch] + hops[stage])
                done = backward[stage]
            start = max(free[resources[stage]], ready)
            end = free[resources[stage]] = start + seconds[kind][stage]
            if done is not None:
                done[micro_batch] = end
            times.append((start, end))
    except KeyError:
        raise ValueError(
            f"{kind.name} of stage {stage}, micro-batch {micro_batch} stands before what it needs"
        ) from None
    return times


def margins(order: Sequence[Task], shape: Shape) -> tuple[float, ...]:
    """Seconds of every stage that the others go on without it at either end of the step, the shorter of the two: before
    its first task, and after its last."""
    times = timed(order, shape)
    first, last = [math.inf] * len(shape.resources), [0.0] * len(shape.resources)
    for task, (start, end) in zip(order, times, strict=True):
        first[task.stage] = min(first[task.stage], start)
        last[task.stage] = max(last[task.stage], end)
    whole = max(last)
    return tuple(min(start, whole - end) for start, end in zip(first, last, strict=True))


def makespan(order: Iterable[Task], shape: Shape) -> float:
    """Seconds from the first task's start to the last one's end, executed as `timed` says."""
    return max((end for _, end in timed(order, shape)), default=0.0)


class Shortest:
    """The shortest of some orders, and of equally long ones that with the fewest tasks."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._key = shape, (math.inf, 0)
        self.order: list[Task] = []

    def offer(self, order: list[Task], seconds: float | None = None) -> None:
        """Keep it, where it is shorter; `seconds` is its makespan, where that is known."""
        key = makespan(order, self._shape) if seconds is None else seconds, len(order)
        if key < self._key:
            self._key, self.order = key, order

    @property
    def is_least(self) -> bool:
        """Whether no order is shorter: some resource works from the first moment that it can to the end."""
        return self._key[0] <= _least_makespan(self._shape) * (1 + 1e-12)


def _least_makespan(shape: Shape) -> float:
    """The longest of all resources' own work, begun when the first micro-batch can be there."""
    there, work = dict.fromkeys(shape.resources, math.inf), dict.fromkeys(shape.resources, 0.0)
    arrival = 0.0
    for stage, (resource, hop) in enumerate(zip(shape.resources, (*shape.hops(), 0.0), strict=True)):
        there[resource] = min(there[resource], arrival)
        # split, a backward may take less than whole
        backward = min(
            shape.backward_seconds[stage], shape.input_seconds[stage] + shape.weight_seconds[stage]
        )
        work[resource] += shape.micro_batches * (shape.forward_seconds[stage] + backward)
        arrival += shape.forward_seconds[stage] + hop
    return max(there[resource] + seconds for resource, seconds in work.items())
