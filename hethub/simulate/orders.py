"""In which order a stage of another engine works, sends and receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from hethub.program.actions import What
from hethub.timeline.record import Kind

__all__ = ["ORDERS", "Step", "lockstep", "one_forward_one_backward"]


class Step(NamedTuple):
    """Compute of a micro-batch, or (what is moved, whether it leaves)."""

    kind: Kind | tuple[What, bool]
    micro_batch: int


def lockstep(stages: int, stage: int, micro_batches: int) -> Iterator[Step]:
    """DeepSpeed's TrainSchedule (runtime/pipe/schedule.py): every stage counts the same steps.

    Even stages do forwards in even steps, odd ones in odd steps. Before a forward the gradient of the step before
    leaves and the activation is taken; before a backward the gradient is taken and the activation of the step before
    leaves.
    """
    before = -1
    for number in range(2 * (micro_batches + stages - 1)):
        forward = number % 2 == stage % 2
        half, odd = number // 2, stage % 2
        now = half - stage // 2 if forward else half - stages + (stage + 1) // 2 + 1 - odd
        neighbour = stage > 0 if forward else stage < stages - 1
        if neighbour:
            leaving, taken = (What.GRADIENT, What.ACTIVATION) if forward else (What.ACTIVATION, What.GRADIENT)
            moves = [(leaving, True, before), (taken, False, now)]
            for what, away, micro_batch in moves if forward else reversed(moves):
                if 0 <= micro_batch < micro_batches:
                    yield Step((what, away), micro_batch)
        if 0 <= now < micro_batches:
            yield Step(Kind.FORWARD if forward else Kind.BACKWARD, now)
        before = now


def one_forward_one_backward(stages: int, stage: int, micro_batches: int) -> Iterator[Step]:
    """Megatron's 1F1B: stages - stage - 1 forwards first, then one of each; everything leaves when it is made."""
    ahead = min(stages - stage - 1, micro_batches)
    work = [(Kind.FORWARD, n) for n in range(ahead)]
    for n in range(micro_batches - ahead):
        work += [(Kind.FORWARD, ahead + n), (Kind.BACKWARD, n)]
    work += [(Kind.BACKWARD, n) for n in range(micro_batches - ahead, micro_batches)]
    for kind, n in work:
        forward = kind == Kind.FORWARD
        what = What.ACTIVATION if forward else What.GRADIENT
        if stage > 0 if forward else stage < stages - 1:
            yield Step((what, False), n)
        yield Step(kind, n)
        if stage < stages - 1 if forward else stage > 0:
            yield Step((what, True), n)


ORDERS: Mapping[str, Callable[[int, int, int], Iterator[Step]]] = {
    "lockstep": lockstep,
    "1f1b": one_forward_one_backward,
}
