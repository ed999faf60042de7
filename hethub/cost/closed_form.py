"""The closed form of a pipeline's step, for many splits at once: what an inner search loop asks millions of times.

One forward, one backward in the usual fixed order (Narayanan et al., "Efficient large-scale language model training on
GPU clusters", SC 2021): stage i does `in_flight[i]` forwards, then a backward and a forward in turn. A task starts when
its stage is free and its input is there, so its end is a maximum and a sum. The first micro-batches are followed so,
exactly; all further ones add the steady state's period, the largest mean of a circuit (Baccelli et al.,
"Synchronization and linearity", 1992). Assumed: every boundary has a link of its own each way, devices do nothing else,
and weights and gradients travel after the last backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Splits", "fixed_order", "step_seconds"]

Floats = npt.NDArray[np.float64]
Task = tuple[bool, int, int]  # backward?, stage, micro-batch

_FOLLOWED = (
    24  # micro-batches beyond two rounds of those in flight until the steady state is taken as reached
)
_AT_ONCE = (
    2048  # splits: numpy's calls cost little beside them, and what is followed stays in the processor's cache
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Times of many splits into as many stages, seconds: [splits, stages], of links [splits, stages - 1].

    `latency` is what a message takes beside `transfer`, for which it has the link to itself. `reduce` is from a
    stage's last backward until its gradients are summed, `update` what follows once all are.
    """

    forward: Floats
    backward: Floats
    transfer: Floats
    latency: Floats
    reduce: Floats
    update: Floats


def step_seconds(splits: Splits, in_flight: Sequence[int], micro_batches: int) -> Floats:
    """Step times [splits]. Raises ValueError where `in_flight` is less than 1 or rises along the pipeline, for which
    the fixed order has no end."""
    count = len(splits.forward)
    followed = min(micro_batches, 2 * in_flight[0] + _FOLLOWED)
    found = np.empty(count)
    order = fixed_order(in_flight, followed)
    for first in range(0, count, _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        times = _Times(splits, part)
        summed = times.summed(order)
        if followed < micro_batches:
            summed += times.period(in_flight) * (micro_batches - followed)
        found[part] = summed + splits.update[part].max(axis=1)
    return found


def fixed_order(in_flight: Sequence[int], micro_batches: int) -> list[Task]:
    """All tasks, each after those that it needs. Raises ValueError as `step_seconds` does."""
    stages = len(in_flight)
    if min(in_flight) < 1 or any(one < other for one, other in pairwise(in_flight)):
        raise ValueError(f"in_flight {list(in_flight)} must be at least 1 and not rise from stage to stage")
    own = [_own_order(stage, min(in_flight[stage], micro_batches), micro_batches) for stage in range(stages)]
    done = [[0, 0] for _ in range(stages)]  # forwards and backwards
    order: list[Task] = []
    while len(order) < 2 * stages * micro_batches:
        for stage in range(stages):
            while own[stage]:
                backward, _, micro_batch = own[stage][-1]
                source = stage + 1 if backward else stage - 1
                if 0 <= source < stages and done[source][backward] <= micro_batch:
                    break
                order.append(own[stage].pop())
                done[stage][backward] += 1
    return order


def _own_order(stage: int, ahead: int, micro_batches: int) -> list[Task]:
    """A stage's tasks, the last one first."""
    tasks = [(False, stage, m) for m in range(ahead)]
    for m in range(micro_batches):
        tasks.append((True, stage, m))
        if m + ahead < micro_batches:
            tasks.append((False, stage, m + ahead))
    return tasks[::-1]


class _Times:
    """Some of the splits, stage by stage in rows that lie together."""

    def __init__(self, splits: Splits, part: slice) -> None:
        self.work = [np.ascontiguousarray(times[part].T) for times in (splits.forward, splits.backward)]
        self.transfer, self.latency, self.reduce = (
            np.ascontiguousarray(times[part].T) for times in (splits.transfer, splits.latency, splits.reduce)
        )

    def summed(self, order: Sequence[Task]) -> Floats:
        """When the gradients of all stages are summed, after the tasks of `order`."""
        stages, count = self.reduce.shape
        free = np.zeros((stages, count))
        link_free = np.zeros((2, max(0, stages - 1), count))
        arrival: dict[Task, Floats] = {}
        for task in order:
            backward, stage, micro_batch = task
            end = free[stage]
            there = arrival.pop(task, None)
            if there is not None:
                np.maximum(end, there, out=end)
            np.add(end, self.work[backward][stage], out=end)
            target, boundary = (stage - 1, stage - 1) if backward else (stage + 1, stage)
            if 0 <= target < stages:
                link = link_free[int(backward), boundary]
                np.maximum(link, end, out=link)
                np.add(link, self.transfer[boundary], out=link)
                arrival[backward, target, micro_batch] = link + self.latency[boundary]
        done: Floats = (free + self.reduce).max(axis=0)
        return done

    def period(self, in_flight: Sequence[int]) -> Floats:
        """Seconds a micro-batch in the steady state.

        From stage i's forward of a micro-batch down to stage j, over to the backward that follows there, and up again,
        `in_flight[i] - in_flight[j] + 1` micro-batches pass before the next forward that waits for it. A link takes at
        least its transfers.
        """
        stages = len(in_flight)
        both = self.work[0] + self.work[1]
        hops = 2 * (self.transfer + self.latency)
        found: Floats = both.max(axis=0)
        if stages > 1:
            np.maximum(found, self.transfer.max(axis=0), out=found)
        for first in range(stages):
            circuit = both[first].copy()
            for last in range(first + 1, stages):
                circuit += hops[last - 1] + both[last]
                np.maximum(found, circuit / (in_flight[first] - in_flight[last] + 1), out=found)
        return found
