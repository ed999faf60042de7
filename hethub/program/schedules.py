"""Schedules: functions from (stage times, memory limits, micro-batches) to an order of work.

A schedule returns ONE total order of all (forward | backward) x stage x micro-batch of a pipeline that
respects every dependence. Each device executes the part of that order that concerns its own stages; since all
follow one order, no plan can deadlock, tensor-parallel groups meet in the same order, and a device may stand
in several stages. Nothing else knows schedules by name.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hethub.timeline.record import Kind

__all__ = ["SCHEDULES", "Schedule", "Shape", "Task", "forward_only"]


class Task(NamedTuple):
    """One piece of work of a pipeline, on every replica of the stage."""

    kind: Kind
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a schedule may know of a pipeline.

    `resources` names for each stage the set of stages that share a device with it, by a common number.
    Seconds are per micro-batch; `hop_seconds[s]` is the transfer between stages s and s + 1, one way.
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


Schedule = Callable[[Shape], list[Task]]


class _Run:
    """A pipeline executed in predicted time, greedily: a device that is free takes the best ready task."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        stages = len(shape.forward_seconds)
        self.next_forward = [0] * stages
        self.next_backward = [0] * stages
        # When the inputs of the n-th forward or backward of a stage are there; they come in order.
        self.forward_ready: list[list[float]] = [[] for _ in range(stages)]
        self.backward_ready: list[list[float]] = [[] for _ in range(stages)]
        self.forward_ready[0] = [0.0] * shape.micro_batches
        self.members: dict[int, list[int]] = {}
        for stage, resource in enumerate(shape.resources):
            self.members.setdefault(resource, []).append(stage)
        self.free_at = dict.fromkeys(self.members, 0.0)
        self.order: list[Task] = []

    def candidates(self, resource: int) -> list[tuple[float, int, int, Task]]:
        """Tasks whose inputs are known to come: (start, preference, micro-batch, task)."""
        found = []
        for stage in self.members[resource]:
            micro_batch = self.next_backward[stage]
            if micro_batch < len(self.backward_ready[stage]):
                start = max(self.free_at[resource], self.backward_ready[stage][micro_batch])
                found.append((start, 0, micro_batch, Task(Kind.BACKWARD, stage, micro_batch)))
            micro_batch = self.next_forward[stage]
            held = micro_batch - self.next_backward[stage]
            if micro_batch < len(self.forward_ready[stage]) and held < self.shape.in_flight[stage]:
                start = max(self.free_at[resource], self.forward_ready[stage][micro_batch])
                found.append((start, 1, micro_batch, Task(Kind.FORWARD, stage, micro_batch)))
        return found

    def finish(self, task: Task, start: float) -> list[int]:
        """Do a task; returns the resources that may have new work."""
        shape, stage, last = self.shape, task.stage, len(self.shape.forward_seconds) - 1
        forward = task.kind == Kind.FORWARD
        end = start + (shape.forward_seconds if forward else shape.backward_seconds)[stage]
        self.free_at[shape.resources[stage]] = end
        touched = [shape.resources[stage]]
        if forward:
            self.next_forward[stage] += 1
            target, ready = (stage, self.backward_ready) if stage == last else (stage + 1, self.forward_ready)
        else:
            self.next_backward[stage] += 1
            target, ready = stage - 1, self.backward_ready
        if target >= 0:
            same = shape.resources[target] == shape.resources[stage]
            hop = 0.0 if target == stage or same else shape.hop_seconds[min(stage, target)]
            ready[target].append(end + hop)
            touched.append(shape.resources[target])
        self.order.append(task)
        return touched

    def run(self) -> list[Task]:
        queue: list[tuple[float, int]] = []
        planned: dict[int, tuple[float, Task]] = {}

        def plan(resource: int) -> None:
            options = self.candidates(resource)
            if options:
                start, _, _, task = min(options)
                planned[resource] = (start, task)
                heapq.heappush(queue, (start, resource))
            else:
                planned.pop(resource, None)

        for resource in self.members:
            plan(resource)
        while queue:
            start, resource = heapq.heappop(queue)
            if resource not in planned or planned[resource][0] != start:
                continue  # superseded by a better plan
            task = planned.pop(resource)[1]
            for touched in dict.fromkeys(self.finish(task, start)):
                plan(touched)
        return self.order


def one_forward_one_backward(shape: Shape) -> list[Task]:
    """1F1B (Narayanan et al., PipeDream-Flush): backward first, forward while the in-flight limit allows."""
    return _Run(shape).run()


def gpipe(shape: Shape) -> list[Task]:
    """GPipe (Huang et al.): all forwards, then all backwards; needs in_flight = micro_batches everywhere."""
    stages = range(len(shape.forward_seconds))
    forwards = [Task(Kind.FORWARD, s, m) for m in range(shape.micro_batches) for s in stages]
    backwards = [Task(Kind.BACKWARD, s, m) for m in range(shape.micro_batches) for s in reversed(stages)]
    return forwards + backwards


def forward_only(shape: Shape) -> list[Task]:
    """Evaluation: every micro-batch forward, none kept."""
    stages = range(len(shape.forward_seconds))
    return [Task(Kind.FORWARD, s, m) for m in range(shape.micro_batches) for s in stages]


SCHEDULES: Mapping[str, Schedule] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
