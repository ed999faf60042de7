"""Schedules: functions from (stage times, memory limits, micro-batches) to an order of work.

A schedule returns ONE total order of all work x stage x micro-batch of a pipeline that respects every dependence:
forward, and either the whole backward or its input part and later its weight part. Each device executes the part of
that order that concerns its own stages; since all follow one order, no plan can deadlock, tensor-parallel groups
meet in the same order, and a device may stand in several stages. Nothing else knows schedules by name.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from hethub.timeline.record import Kind

__all__ = ["SCHEDULES", "Schedule", "Shape", "Task", "forward_only", "makespan", "margins", "timed"]


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


Schedule = Callable[[Shape], list[Task]]

_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)  # by their numbers
_FORWARD, _BACKWARD, _INPUT, _WEIGHT = _KINDS


# -- an order in predicted time ------------------------------------------------------------------------------


def timed(order: Iterable[Task], shape: Shape) -> list[tuple[float, float]]:
    """Start and end in seconds of every task of an order (or of a forward-only one), begun at 0.

    A resource does its tasks one by one in the order's sequence, each once its input is there. Raises ValueError
    where a task stands before one that it needs.
    """
    seconds = [shape.seconds(kind) for kind in _KINDS]
    hops, last, resources = shape.hops(), len(shape.resources) - 1, shape.resources
    free = [0.0] * (1 + max(resources))
    # ends of forwards, and of whole backwards and input parts, by stage and micro-batch
    forward: list[dict[int, float]] = [{} for _ in resources]
    backward: list[dict[int, float]] = [{} for _ in resources]
    times = []
    try:
        for kind, stage, micro_batch in order:
            if kind == _FORWARD:
                ready = forward[stage - 1][micro_batch] + hops[stage - 1] if stage else 0.0
                done = forward[stage]
            elif kind == _WEIGHT:
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


# -- greedy: priority rules ----------------------------------------------------------------------------------

_Rank = list[list[float]]  # [stage][micro-batch] -> smaller goes first
_Option = tuple[float, float, float, Kind | None, int]  # start, end, rank, kind (None: wait for it), stage


class _Rule(NamedTuple):
    """How a resource chooses among tasks whose inputs are known to come.

    Stage s splits its backwards from micro-batch `split_from[s]` on (default: all, or none where `weight` is None).
    `patience` is how far a resource waits for better work, as a share of the time until its first choice would be done:
    at 0 it takes what starts first; near 1 every active schedule is possible (Giffler and Thompson, 1960).
    `ahead[s]` is how many forwards stage s may be ahead of its backwards (their input parts), besides the limit.
    """

    forward: _Rank
    backward: _Rank
    weight: _Rank | None
    patience: float = 0.0
    split_from: Sequence[int] | None = None
    ahead: Sequence[int] | None = None


class _Run:
    """A pipeline executed in predicted time: every resource that is free does its best task, under the limits.

    It always ends: stages take micro-batches in order, so the oldest unfinished one is never kept waiting by a limit.
    """

    def __init__(self, shape: Shape, rule: _Rule) -> None:
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
                found.append((start, end, rule.backward[stage][done], _INPUT if split else _BACKWARD, stage))
            elif self.patience and done < forwards and self.expected[stage][done] > free:
                found.append((self.expected[stage][done], math.inf, rule.backward[stage][done], None, stage))
            if freed < done and rule.weight is not None:
                end = free + shape.weight_seconds[stage]
                found.append((free, end, rule.weight[stage][freed], _WEIGHT, stage))
            ready = self.forward_ready[stage]
            ahead = forwards - done < self.ahead[stage] and forwards - freed < shape.in_flight[stage]
            if ahead and forwards < len(ready):
                start = max(free, ready[forwards])
                end = start + shape.forward_seconds[stage]
                found.append((start, end, rule.forward[stage][forwards], _FORWARD, stage))
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
        if kind is _FORWARD:
            self.order.append(Task(kind, stage, self.forwards[stage]))
            self.expected[stage].append(end + self.round_trip[stage])
            self.forwards[stage] += 1
            if stage == len(self.hops):
                self.backward_ready[stage].append(end)
                return -1
            self.forward_ready[stage + 1].append(end + self.hops[stage])
            return stage + 1
        if kind is _WEIGHT:
            self.order.append(Task(kind, stage, self.freed[stage]))
            self.freed[stage] += 1
            return -1
        self.order.append(Task(kind, stage, self.backwards[stage]))
        self.backwards[stage] += 1
        if kind is _BACKWARD:
            self.freed[stage] += 1
        if stage:
            self.backward_ready[stage - 1].append(end + self.hops[stage - 1])
        return stage - 1

    def run(self) -> list[Task]:
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


def _by_kind(shape: Shape, first: float) -> _Rank:
    """Micro-batches in order, all of this kind after those of a smaller `first`."""
    row = [first * shape.micro_batches + m for m in range(shape.micro_batches)]
    return [row] * len(shape.resources)


def one_forward_one_backward(shape: Shape) -> list[Task]:
    """1F1B (PipeDream-Flush; Narayanan et al., arXiv 2006.09503): the shorter of two orders.

    Backwards first, whatever can start; and one backward, one forward in turn, waiting for either. The first falls out
    of step where unequal stages and hops make a forward and a backward meet: then both neighbours wait.
    """
    found = _Shortest(shape)
    for first, patience in ((1, 0.0), (0, _IN_TURN)):
        rule = _Rule(_by_kind(shape, first), _by_kind(shape, 1 - first), None, patience)
        found.offer(_Run(shape, rule).run())
        if found.is_least:
            break
    return found.order


def split_one_forward_one_backward(shape: Shape) -> list[Task]:
    """1F1B whose backwards are split, each weight part right behind its input part.

    So no gradient waits for weight parts on its way back, and at most one micro-batch of a stage waits for its own:
    with 1F1B's memory and one split backward more, the bubble of p equal stages is (p - 1)(F + B) instead of 1F1B's
    (p - 1)(F + B + W), and stages that are out of step wait less.
    """
    now = [[-_LAST] * shape.micro_batches] * len(shape.resources)
    return _Run(shape, _Rule(_by_kind(shape, 0), _by_kind(shape, 1), now, _IN_TURN)).run()


def zero_bubble_h1(shape: Shape) -> list[Task]:
    """ZB-H1 (Qi et al., arXiv 2401.10241): 1F1B with split backwards, weight parts where nothing else can start.

    So the gradient reaches the first stage without waiting for weight parts, and those fill the bubble at the end.
    The limit holds until the weight part; where every stage may hold as many micro-batches as there are stages, 1F1B's
    own peak, the bubble of p equal stages is (p - 1)(F + B - W) instead of 1F1B's (p - 1)(F + B + W).
    """
    ahead = range(len(shape.resources), 0, -1)
    # Forwards first, as far as `ahead` allows: backwards first would do two in a row and starve the next stage.
    rule = _Rule(_by_kind(shape, 0), _by_kind(shape, 1), _by_kind(shape, 2), ahead=ahead)
    return _Run(shape, rule).run()


# -- interleaved ---------------------------------------------------------------------------------------------


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


# -- list scheduling -----------------------------------------------------------------------------------------


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

    def ranks(self, after: Sequence[float], age: float) -> _Rank:
        """What follows on each stage, less `age` periods for each micro-batch that goes before."""
        turns = [age * self.period * m for m in range(self.shape.micro_batches)]
        return [[turn - seconds for turn in turns] for seconds in after]

    def gating(self, age: float) -> _Rank:
        """Ranks of weight parts: each as urgent as the forward that waits for its in-flight slot, if one does."""
        shape = self.shape
        waiting = zip(self.ranks(self.forward, age), shape.weight_seconds, shape.in_flight, strict=True)
        return [[rank - seconds for rank in row[limit:]] + [_LAST] * limit for row, seconds, limit in waiting]

    def rule(self, number: int, whole: frozenset[int] = frozenset()) -> _Rule:
        """A rule of `_RULES`, with no backward of the stages `whole` split."""
        age, weight, patience, tail = _RULES[number]
        count, stages = self.shape.micro_batches, len(self.shape.resources)
        weights = {
            "gating": self.gating(age),
            "now": [[-_LAST] * count] * stages,
            "lazy": [[_LAST] * count] * stages,
        }[weight]
        first = max(0, count - tail * stages) if tail else 0
        split_from = [count if stage in whole else first for stage in range(stages)]
        return _Rule(
            self.ranks(self.forward, age), self.ranks(self.backward, age), weights, patience, split_from
        )


# (age, weight parts, patience, split only so many times the number of stages at the end, 0 for all). Of a larger grid
# these took the least makespans on random shapes; which of them wins differs from shape to shape.
_RULES = (
    (0.25, "gating", 0.0, 0),
    (0.5, "gating", 0.0, 0),
    (0.5, "gating", 0.5, 0),
    (0.5, "gating", 0.99, 0),
    (1.0, "gating", 0.0, 0),
    (1.0, "gating", 0.99, 0),
    (0.5, "lazy", 0.0, 0),
    (0.5, "lazy", 0.5, 0),
    (0.5, "lazy", 0.99, 0),
    (0.25, "now", 0.5, 0),
    (0.5, "now", 0.0, 0),
    (0.5, "now", 0.99, 0),
    (1.0, "now", 0.99, 0),
    (0.25, "gating", 0.0, 1),
    (1.0, "gating", 0.0, 1),
    (0.5, "gating", 0.0, 2),
    (1.0, "gating", 0.0, 2),
)
_LAST = 1e300  # a rank after all others


def _joined(order: list[Task], shape: Shape) -> tuple[list[Task], float]:
    """The order with backwards left whole where their parts are neighbours and splitting gains nothing; and its
    makespan.

    Joining makes the stage before wait for the weight part too. That is free where that stage may start so late in a
    schedule of the same length that does everything as late as possible: all such joins hold in it together.
    """
    seconds, resources = [shape.seconds(kind) for kind in _KINDS], shape.resources
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
        if kind == _WEIGHT:
            late[resource], following[resource] = end - seconds[kind][stage], task
            continue
        deadline = (forward if kind == _FORWARD else backward)[stage].get(micro_batch, math.inf)
        start = min(end, deadline) - seconds[kind][stage]
        if following[resource] == (_WEIGHT, stage, micro_batch):
            end += shape.weight_seconds[stage]
            if end <= deadline and end - shape.backward_seconds[stage] >= start:
                start = end - shape.backward_seconds[stage]
                whole.add((stage, micro_batch))
        late[resource], following[resource] = start, task
        if kind != _FORWARD:
            if stage < last:
                backward[stage + 1][micro_batch] = start - hops[stage]
        elif stage > 0:
            forward[stage - 1][micro_batch] = start - hops[stage - 1]
    if not whole:
        return order, length
    joined = [
        Task(_BACKWARD, task[1], task[2]) if task[0] == _INPUT and task[1:] in whole else task
        for task in order
        if task[0] != _WEIGHT or task[1:] not in whole
    ]
    return joined, makespan(joined, shape)


def list_scheduling(shape: Shape) -> list[Task]:
    """List scheduling (Graham, 1966) by critical path, for unequal stages under their own in-flight limits.

    Rules of priority are tried on a few micro-batches, the best of them on all, and of these, of 1F1B, split or not,
    and of ZB-H1 the shortest order wins; of equally long ones that with the fewest split backwards. So it is never
    longer than those three. Weight parts fill bubbles, or come early to free the in-flight slot that a forward waits
    for.
    Of 500 random shapes of 3 stages and 3 micro-batches 98.6 % were optimal and the worst took 2.1 % more.
    """
    found = _Shortest(shape)
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


class _Shortest:
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


_Ordered = tuple[list[Task], float]  # and its makespan


def _by_rule(path: _CriticalPath, number: int, whole: frozenset[int] = frozenset()) -> _Ordered:
    """The order that a rule makes."""
    return _joined(_Run(path.shape, path.rule(number, whole)).run(), path.shape)


def _promising(seconds: Sequence[float]) -> list[int]:
    """Numbers of the rules whose orders are best; splitting at the end only costs less the more micro-batches there
    are, so both ways are kept."""
    ranked = sorted(range(len(_RULES)), key=seconds.__getitem__)
    everywhere = [number for number in ranked if not _RULES[number][-1]]
    at_the_end = [number for number in ranked if _RULES[number][-1]]
    return everywhere[:3] + at_the_end[:2]


def _better_whole(
    path: _CriticalPath, number: int, order: list[Task], least: float
) -> tuple[frozenset[int], _Ordered]:
    """Stages that had better not split, each added where that shortens `order`, that of this rule, which takes `least`
    seconds; and the order then. A stage that splits no backward is left out."""
    whole: frozenset[int] = frozenset()
    for stage in range(len(path.shape.resources)):
        if not any(task.stage == stage and task.kind == _WEIGHT for task in order):
            continue
        other, seconds = _by_rule(path, number, whole | {stage})
        if seconds < least:
            whole, least, order = whole | {stage}, seconds, other
    return whole, (order, least)


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
