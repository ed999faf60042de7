"""List scheduling by critical path: for unequal stages under their own in-flight limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hethub.program.greedy import (
    LAST,
    Rank,
    Rule,
    Run,
    one_forward_one_backward,
    split_one_forward_one_backward,
    zero_bubble_h1,
)
from hethub.program.orders import BACKWARD, FORWARD, INPUT, KINDS, WEIGHT, Shape, Shortest, Task, makespan

__all__ = ["list_scheduling"]


class _CriticalPath:
    """Priorities by what must still follow a task: the longest path first, older micro-batches before younger ones."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        stages, hops = len(shape.resources), shape.hops()
        # Seconds from the start of a backward, or of a forward, to the end of all that follows it.
        self.backward, self.forward = [0.0] * stages, [0.0] * stages
        for s in range(stages):
            before = hops[s - 1] + self.backward[s - 1] if s else 0.0
            self.backward[s] = shape.input_seconds[s] + max(shape.weight_seconds[s], before)
        for s in reversed(range(stages)):
            after = hops[s] + self.forward[s + 1] if s + 1 < stages else self.backward[s]
            self.forward[s] = shape.forward_seconds[s] + after
        self.period = self._period()

    def _period(self) -> float:
        """Seconds that a further micro-batch costs at least: the busiest resource's work, or a full limit's turn."""
        shape = self.shape
        stages = range(len(shape.resources))
        load = dict.fromkeys(shape.resources, 0.0)
        for s in stages:
            load[shape.resources[s]] += shape.forward_seconds[s] + shape.backward_seconds[s]
        below = [0.0, *self.backward]  # of stage s: what follows its backward
        turn = [(self.forward[s] - below[s]) / shape.in_flight[s] for s in stages]
        return max(*load.values(), *turn)

    def ranks(self, after: Sequence[float], age: float) -> Rank:
        """What follows on each stage, less `age` periods for each micro-batch that goes before."""
        turns = [age * self.period * m for m in range(self.shape.micro_batches)]
        return [[turn - seconds for turn in turns] for seconds in after]

    def gating(self, age: float) -> Rank:
        """Ranks of weight parts: each as urgent as the forward that waits for its in-flight slot, if one does."""
        shape = self.shape
        waiting = zip(self.ranks(self.forward, age), shape.weight_seconds, shape.in_flight, strict=True)
        return [[rank - seconds for rank in row[limit:]] + [LAST] * limit for row, seconds, limit in waiting]

    def rule(self, number: int, whole: frozenset[int] = frozenset()) -> Rule:
        """A rule of `_RULES`, with no backward of the stages `whole` split."""
        age, weight, patience, tail = _RULES[number]
        count, stages = self.shape.micro_batches, len(self.shape.resources)
        weights = {
            "gating": self.gating(age),
            "now": [[-LAST] * count] * stages,
            "lazy": [[LAST] * count] * stages,
        }[weight]
        first = max(0, count - tail * stages) if tail else 0
        split_from = [count if stage in whole else first for stage in range(stages)]
        return Rule(
            self.ranks(self.forward, age), self.ranks(self.backward, age), weights, patience, split_from
        )


# (age, weight parts, patience, split only so many times the number of stages at the end, 0 for all). Of a larger grid
# these took the least makespans on random shapes; which of them wins differs from shape to shape.
_RULES = (
    (0.25, "gating", 0.0, 0),
    (0.5, "gating", 0.5, 0),
    (0.5, "gating", 0.99, 0),
    (1.0, "gating", 0.99, 0),
    (0.5, "lazy", 0.0, 0),
    (0.5, "lazy", 0.5, 0),
    (0.5, "lazy", 0.99, 0),
    (0.5, "now", 0.0, 0),
    (0.5, "now", 0.99, 0),
    (0.25, "gating", 0.0, 1),
    (1.0, "gating", 0.0, 1),
    (0.5, "gating", 0.0, 2),
)


def _joined(order: list[Task], shape: Shape) -> tuple[list[Task], float]:
    """The order with backwards left whole where their parts are neighbours and splitting gains nothing; and its
    makespan.

    Joining makes the stage before wait for the weight part too. That is free where that stage may start so late in a
    schedule of the same length that does everything as late as possible: all such joins hold in it together.
    """
    seconds, resources = [shape.seconds(kind) for kind in KINDS], shape.resources
    hops, last = shape.hops(), len(resources) - 1
    length = makespan(order, shape)
    late = [length] * (1 + max(resources))  # start of what the resource does next
    following: list[Task | None] = [None] * len(late)  # what that is
    # latest ends, by stage and micro-batch, of forwards, and of whole backwards and input parts
    forward: list[dict[int, float]] = [{} for _ in resources]
    backward: list[dict[int, float]] = [{} for _ in resources]
    whole: set[tuple[int, int]] = set()
    for task in reversed(order):
        kind, stage, micro_batch = task
        resource = resources[stage]
        end = late[resource]
        if kind == WEIGHT:
            late[resource], following[resource] = end - seconds[kind][stage], task
            continue
        deadline = (forward if kind == FORWARD else backward)[stage].get(micro_batch, math.inf)
        start = min(end, deadline) - seconds[kind][stage]
        if following[resource] == (WEIGHT, stage, micro_batch):
            end += shape.weight_seconds[stage]
            if end <= deadline and end - shape.backward_seconds[stage] >= start:
                start = end - shape.backward_seconds[stage]
                whole.add((stage, micro_batch))
        late[resource], following[resource] = start, task
        if kind != FORWARD:
            if stage < last:
                backward[stage + 1][micro_batch] = start - hops[stage]
        elif stage > 0:
            forward[stage - 1][micro_batch] = start - hops[stage - 1]
    if not whole:
        return order, length
    joined = [
        Task(BACKWARD, task[1], task[2]) if task[0] == INPUT and task[1:] in whole else task
        for task in order
        if task[0] != WEIGHT or task[1:] not in whole
    ]
    return joined, makespan(joined, shape)


def list_scheduling(shape: Shape) -> list[Task]:
    """List scheduling (Graham, 1966) by critical path, for unequal stages under their own in-flight limits.

    Rules of priority are tried on a few micro-batches, the best of them on all, and of these, of 1F1B, split or not,
    and of ZB-H1 the shortest order wins; of equally long ones that with the fewest split backwards. So it is never
    longer than those three. Weight parts fill bubbles, or come early to free the in-flight slot that a forward waits
    for. Of small random shapes nearly all are optimal, which a test holds against all orders.
    """
    found = Shortest(shape)
    found.offer(one_forward_one_backward(shape))
    found.offer(*_joined(split_one_forward_one_backward(shape), shape))
    found.offer(*_joined(zero_bubble_h1(shape), shape))
    if found.is_least:
        return found.order
    few = min(shape.micro_batches, _TRIAL_MICRO_BATCHES)
    trial = shape
    if few < shape.micro_batches or few < max(shape.in_flight):
        trial = replace(shape, micro_batches=few, in_flight=tuple(min(few, n) for n in shape.in_flight))
    path, tried = _CriticalPath(trial), []
    for number in range(len(_RULES)):
        tried.append(_by_rule(path, number))
        if trial is shape:
            found.offer(*tried[-1])
            if found.is_least:
                return found.order
    full = path if trial is shape else _CriticalPath(shape)
    for number in _promising([seconds for _, seconds in tried]):
        whole, ordered = _better_whole(path, number, *tried[number])
        found.offer(*(ordered if trial is shape else _by_rule(full, number, whole)))
        if found.is_least:
            break
    return found.order


_TRIAL_MICRO_BATCHES = 16


_Ordered = tuple[list[Task], float]  # and its makespan


def _by_rule(path: _CriticalPath, number: int, whole: frozenset[int] = frozenset()) -> _Ordered:
    """The order that a rule makes."""
    return _joined(Run(path.shape, path.rule(number, whole)).run(), path.shape)


def _promising(seconds: Sequence[float]) -> list[int]:
    """Numbers of the rules whose orders are best; splitting at the end only costs less the more micro-batches there
    are, so both ways are kept."""
    ranked = sorted(range(len(_RULES)), key=seconds.__getitem__)
    everywhere = [number for number in ranked if not _RULES[number][-1]]
    at_the_end = [number for number in ranked if _RULES[number][-1]]
    return everywhere[:2] + at_the_end[:1]


def _better_whole(
    path: _CriticalPath, number: int, order: list[Task], least: float
) -> tuple[frozenset[int], _Ordered]:
    """Stages that had better not split, each added where that shortens `order`, that of this rule, which takes `least`
    seconds; and the order then. A stage that splits no backward is left out."""
    whole: frozenset[int] = frozenset()
    for stage in range(len(path.shape.resources)):
        if not any(task.stage == stage and task.kind == WEIGHT for task in order):
            continue
        other, seconds = _by_rule(path, number, whole | {stage})
        if seconds < least:
            whole, least, order = whole | {stage}, seconds, other
    return whole, (order, least)
