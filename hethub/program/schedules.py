"""Schedules: functions from (stage times, memory limits, micro-batches) to an order of work.

A schedule returns ONE total order of all work x stage x micro-batch of a pipeline that respects every dependence:
forward, and either the whole backward or its input part and later its weight part. Each device executes the part of
that order that concerns its own stages; since all follow one order, no plan can deadlock, tensor-parallel groups
meet in the same order, and a device may stand in several stages. Nothing else knows schedules by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from hethub.program.critical_path import list_scheduling
from hethub.program.greedy import one_forward_one_backward, split_one_forward_one_backward, zero_bubble_h1
from hethub.program.orders import Shape, Task
from hethub.timeline.record import Kind

__all__ = ["SCHEDULES", "Schedule", "forward_only"]

Schedule = Callable[[Shape], list[Task]]


def interleaved(shape: Shape) -> list[Task]:
    """Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, as Megatron-LM orders it) for any placing of stages.

    A device takes a group of as many micro-batches as there are devices through the first of its stages (chunks),
    then the group through its next one, and comes back in reverse. It goes ahead by the forwards that lead to the first
    one of its last stage and by two for each stage behind that, then alternates. For p devices in a loop with v
    equal stages each, the bubble is (p - 1) / (m v) of the work. Tighter in-flight limits make groups smaller.
    """
    stages, members = len(shape.resources), shape.stages_of()
    size = min(len(members), *shape.in_flight)
    steps_apart = 2 if len(members) < stages else 1  # without chunks it is plain 1F1B
    queues = []
    for own in members.values():
        ahead = (len(own) - 1) * size + 1 + steps_apart * (stages - 1 - own[-1])
        queues.append(_alternating(own, ahead, size, shape))
    return _merged(queues, shape)


def _alternating(own: list[int], ahead: int, size: int, shape: Shape) -> list[Task]:
    """One device's order: `ahead` forwards more than backwards, then one backward, one forward in turn."""
    count = shape.micro_batches
    groups = [range(at, min(at + size, count)) for at in range(0, count, size)]
    forwards = deque(Task(Kind.FORWARD, s, m) for group in groups for s in own for m in group)
    backwards = deque(Task(Kind.BACKWARD, s, m) for group in groups for s in reversed(own) for m in group)
    held = dict.fromkeys(own, 0)
    order = []
    while backwards:
        forth = bool(forwards) and len(backwards) - len(forwards) < ahead
        if forth and held[forwards[0].stage] < shape.in_flight[forwards[0].stage]:
            task = forwards.popleft()
            held[task.stage] += 1
        else:
            task = backwards.popleft()
            held[task.stage] -= 1
        order.append(task)
    return order


def _merged(queues: list[list[Task]], shape: Shape) -> list[Task]:
    """One total order of the devices' orders; where all of them wait for each other, the first that can go does."""
    waiting = [deque(queue) for queue in queues]
    held = [0] * len(shape.resources)
    done: set[Task] = set()
    order: list[Task] = []

    def can_go(task: Task) -> bool:
        kind, stage, micro_batch = task
        if kind == Kind.FORWARD:
            there = stage == 0 or Task(kind, stage - 1, micro_batch) in done
            return there and held[stage] < shape.in_flight[stage]
        last = stage == len(held) - 1
        return Task(Kind.FORWARD, stage, micro_batch) in done and (
            last or Task(kind, stage + 1, micro_batch) in done
        )

    def go(task: Task) -> None:
        held[task.stage] += 1 if task.kind == Kind.FORWARD else -1
        done.add(task)
        order.append(task)

    while any(waiting):
        before = len(order)
        for queue in waiting:
            while queue and can_go(queue[0]):
                go(queue.popleft())
        if len(order) == before:
            queue, task = next((queue, task) for queue in waiting for task in queue if can_go(task))
            queue.remove(task)
            go(task)
    return order


def forward_only(shape: Shape) -> list[Task]:
    """Evaluation: every micro-batch forward, none kept."""
    stages = range(len(shape.resources))
    return [Task(Kind.FORWARD, s, m) for m in range(shape.micro_batches) for s in stages]


def gpipe(shape: Shape) -> list[Task]:
    """GPipe (Huang et al., arXiv 1811.06965): all forwards, then all backwards.

    It needs in_flight = micro_batches on every stage, which the plan's checker demands.
    """
    stages = range(len(shape.resources))
    forwards = [Task(Kind.FORWARD, s, m) for m in range(shape.micro_batches) for s in stages]
    backwards = [Task(Kind.BACKWARD, s, m) for m in range(shape.micro_batches) for s in reversed(stages)]
    return forwards + backwards


SCHEDULES: Mapping[str, Schedule] = {
    "1f1b": one_forward_one_backward,
    "1f1b-split": split_one_forward_one_backward,
    "gpipe": gpipe,
    "interleaved": interleaved,
    "list": list_scheduling,
    "zb-h1": zero_bubble_h1,
}
