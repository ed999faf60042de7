"""Greedy schedules: every resource that is free does its best task by a priority rule. 1F1B, 1F1B with split backwards,
and ZB-H1 are such rules."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from hethub.program.orders import BACKWARD, FORWARD, INPUT, WEIGHT, Shape, Shortest, Task
from hethub.timeline.record import Kind

__all__ = [
    "LAST",
    "Rank",
    "Rule",
    "Run",
    "one_forward_one_backward",
    "split_one_forward_one_backward",
    "zero_bubble_h1",
]

LAST = 1e300  # a rank after all others
Rank = list[list[float]]  # [stage][micro-batch] -> smaller goes first
_Option = tuple[float, float, float, Kind | None, int]  # start, end, rank, kind (None: wait for it), stage


class Rule(NamedTuple):
    """How a resource chooses among tasks whose inputs are known to come.

    Stage s splits its backwards from micro-batch `split_from[s]` on (default: all, or none where `weight` is None).
    `patience` is how far a resource waits for better work, as a share of the time until its first choice would be done:
    at 0 it takes what starts first; near 1 every active schedule is possible (Giffler and Thompson, 1960).
    `ahead[s]` is how many forwards stage s may be ahead of its backwards (their input parts), besides the limit.
    """

    forward: Rank
    backward: Rank
    weight: Rank | None
    patience: float = 0.0
    split_from: Sequence[int] | None = None
    ahead: Sequence[int] | None = None


class Run:
    """A pipeline executed in predicted time: every resource that is free does its best task, under the limits.

    It always ends: stages take micro-batches in order, so the oldest unfinished one is never kept waiting by a limit.
    """

    def __init__(self, shape: Shape, rule: Rule) -> None:
        self.shape, self.rule, self.patience = shape, rule, rule.patience
        self.hops = shape.hops()
        stages = len(shape.resources)
        self.split_from = rule.split_from or [shape.micro_batches if rule.weight is None else 0] * stages
        self.ahead = shape.in_flight if rule.ahead is None else rule.ahead
        self.forwards, self.backwards, self.freed = [0] * stages, [0] * stages, [0] * stages  # done so far
        # When the inputs of the n-th forward or backward of a stage are there; they come in order.
        self.forward_ready: list[list[float]] = [[] for _ in range(stages)]
        self.backward_ready: list[list[float]] = [[] for _ in range(stages)]
        self.forward_ready[0] = [0.0] * shape.micro_batches
        self.members = shape.stages_of()
        self.free_at = dict.fromkeys(self.members, 0.0)
        self.order: list[Task] = []
        # When the n-th backward of a stage may start at best, and how long after its forward that is.
        self.expected: list[list[float]] = [[] for _ in range(stages)]
        self.round_trip = [0.0] * stages
        back = shape.backward_seconds if rule.weight is None else shape.input_seconds
        for stage in reversed(range(stages - 1)):
            there_and_back = shape.forward_seconds[stage + 1] + 2 * self.hops[stage] + back[stage + 1]
            self.round_trip[stage] = self.round_trip[stage + 1] + there_and_back

    def options(self, resource: int) -> list[_Option]:
        """The tasks whose inputs are known to come, and with patience the backwards that may come back soon."""
        shape, rule = self.shape, self.rule
        found: list[_Option] = []
        free = self.free_at[resource]
        for stage in self.members[resource]:
            done, forwards, freed = self.backwards[stage], self.forwards[stage], self.freed[stage]
            ready = self.backward_ready[stage]
            if done < len(ready):
                start = max(free, ready[done])
                split = done >= self.split_from[stage]
                end = start + (shape.input_seconds if split else shape.backward_seconds)[stage]
                found.append((start, end, rule.backward[stage][done], INPUT if split else BACKWARD, stage))
            elif self.patience and done < forwards and self.expected[stage][done] > free:
                found.append((self.expected[stage][done], math.inf, rule.backward[stage][done], None, stage))
            if freed < done and rule.weight is not None:
                end = free + shape.weight_seconds[stage]
                found.append((free, end, rule.weight[stage][freed], WEIGHT, stage))
            ready = self.forward_ready[stage]
            ahead = forwards - done < self.ahead[stage] and forwards - freed < shape.in_flight[stage]
            if ahead and forwards < len(ready):
                start = max(free, ready[forwards])
                end = start + shape.forward_seconds[stage]
                found.append((start, end, rule.forward[stage][forwards], FORWARD, stage))
        return found

    def choice(self, resource: int) -> _Option | None:
        """What the resource does next, as far as is known: the best rank of all that start early enough."""
        options = self.options(resource)
        if len(options) < 2:
            return options[0] if options else None
        horizon = min(options)[0]
        if self.patience:
            horizon += self.patience * (min([option[1] for option in options]) - horizon)
        best = None
        for option in options:
            if option[0] <= horizon and (best is None or option[2] < best[2]):
                best = option
        return best

    def finish(self, kind: Kind, stage: int, end: float) -> int:
        """Do a task; returns the stage that its result goes to, or -1."""
        if kind is FORWARD:
            self.order.append(Task(kind, stage, self.forwards[stage]))
            self.expected[stage].append(end + self.round_trip[stage])
            self.forwards[stage] += 1
            if stage == len(self.hops):
                self.backward_ready[stage].append(end)
                return -1
            self.forward_ready[stage + 1].append(end + self.hops[stage])
            return stage + 1
        if kind is WEIGHT:
            self.order.append(Task(kind, stage, self.freed[stage]))
            self.freed[stage] += 1
            return -1
        self.order.append(Task(kind, stage, self.backwards[stage]))
        self.backwards[stage] += 1
        if kind is BACKWARD:
            self.freed[stage] += 1
        if stage:
            self.backward_ready[stage - 1].append(end + self.hops[stage - 1])
        return stage - 1

    def run(self) -> list[Task]:
        """The order of all tasks, by their starts."""
        queue: list[tuple[float, int]] = []
        planned: dict[int, _Option | None] = {}
        resources = self.shape.resources

        def plan(resource: int) -> None:
            choice = planned[resource] = self.choice(resource)
            if choice is not None:
                heapq.heappush(queue, (choice[0], resource))

        for resource in self.members:
            plan(resource)
        while queue:
            start, resource = heapq.heappop(queue)
            choice = planned[resource]
            if choice is None or choice[0] != start:
                continue  # superseded by a better plan
            _, end, _, kind, stage = choice
            planned[resource] = None
            if kind is None:  # it did not come as soon as it might have: wait no longer
                self.free_at[resource] = start
                plan(resource)
                continue
            self.free_at[resource] = end
            target = self.finish(kind, stage, end)
            plan(resource)
            if target >= 0 and resources[target] != resource:
                plan(resources[target])
        return self.order


_IN_TURN = 0.5  # patience that keeps forwards and backwards in turn


def _by_kind(shape: Shape, first: float) -> Rank:
    """Micro-batches in order, all of this kind after those of a smaller `first`."""
    row = [first * shape.micro_batches + m for m in range(shape.micro_batches)]
    return [row] * len(shape.resources)


def one_forward_one_backward(shape: Shape) -> list[Task]:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv 2006.09503): the shorter of two orders.

    Backwards first, whatever can start; and one backward, one forward in turn, waiting for either. The first falls out
    of step where unequal stages and hops make a forward and a backward meet: then both neighbours wait.
    """
    found = Shortest(shape)
    for first, patience in ((1, 0.0), (0, _IN_TURN)):
        rule = Rule(_by_kind(shape, first), _by_kind(shape, 1 - first), None, patience)
        found.offer(Run(shape, rule).run())
        if found.is_least:
            break
    return found.order


def split_one_forward_one_backward(shape: Shape) -> list[Task]:
    """1F1B whose backwards are split, each weight part right behind its input part.

    So no gradient waits for weight parts on its way back, and at most one micro-batch of a stage waits for its own:
    with 1F1B's memory and one split backward more, the bubble of p equal stages is (p - 1)(F + B) instead of 1F1B's
    (p - 1)(F + B + W), and stages that are out of step wait less.
    """
    now = [[-LAST] * shape.micro_batches] * len(shape.resources)
    return Run(shape, Rule(_by_kind(shape, 0), _by_kind(shape, 1), now, _IN_TURN)).run()


def zero_bubble_h1(shape: Shape) -> list[Task]:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with split backwards, weight parts where nothing else can start.

    So the gradient reaches the first stage without waiting for weight parts, and those fill the bubble at the end.
    The limit holds until the weight part; where every stage may hold as many micro-batches as there are stages, 1F1B's
    own peak, the bubble of p equal stages is (p - 1)(F + B - W) instead of 1F1B's (p - 1)(F + B + W).
    """
    ahead = range(len(shape.resources), 0, -1)
    # Forwards first, as far as `ahead` allows: backwards first would do two in a row and starve the next stage.
    rule = Rule(_by_kind(shape, 0), _by_kind(shape, 1), _by_kind(shape, 2), ahead=ahead)
    return Run(shape, rule).run()
