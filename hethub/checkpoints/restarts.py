"""What becomes of a run whose attempt failed: a decision from the cause, the job's policy and the restarts so far."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the node agent reads `Cause` and does without the specs
    from hethub.specs.job import FailurePolicy

__all__ = ["Cause", "Decision", "decide", "told_cause"]


class Cause(StrEnum):
    """Why an attempt failed."""

    WORKER = "worker"  # its process died or raised
    NODE = "node"  # all workers of a node died
    LINK = "link"  # a connection was lost and nobody died
    STALL = "stall"  # a worker or a collective stood still
    MEMORY = "memory"  # a device ran out of memory
    DRIVER = "driver"  # it died, or lost the Ray head
    DATA = "data"  # tokens or weights are not what they were
    NOT_A_NUMBER = "not-a-number"  # a loss or gradient


_ABOUT_A_DEVICE = frozenset((Cause.WORKER, Cause.NODE, Cause.STALL, Cause.MEMORY))


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to begin another attempt, whether without the devices that failed, and why so, in words."""

    restart: bool
    without_the_lost: bool
    why: str


def told_cause(cause: Cause, device: str, used: Iterable[str], dead: Collection[str]) -> Cause:
    """The cause of a failure at `device`, or its node where all of that node's devices in use, several, are dead."""
    node = device.rpartition("/")[0]
    beside = {name for name in used if name.rpartition("/")[0] == node}
    return Cause.NODE if len(beside) > 1 and beside <= set(dead) else cause


def decide(cause: Cause, policy: FailurePolicy, restarts_at: Sequence[float], now: float) -> Decision:
    """`restarts_at` and `now` are seconds of one monotonic clock.

    Data that changed and memory that lacks would fail again on the same devices, so they end the run (memory: where the
    policy does not plan anew). A number that is none is the policy's own word.
    """
    if cause == Cause.NOT_A_NUMBER:
        if policy.not_a_number != "roll_back":
            return Decision(False, False, "on_failure.not_a_number is stop")
    elif policy.restart == "none":
        return Decision(False, False, "on_failure.restart is none")
    elif cause == Cause.DATA:
        return Decision(False, False, "data would be the same again")
    elif cause == Cause.MEMORY and policy.restart == "same":
        return Decision(False, False, "the same plan needs the same memory again")
    recent = [at for at in restarts_at if now - at <= policy.within_seconds]
    if len(recent) >= policy.max_restarts:
        return Decision(
            False,
            False,
            f"{len(recent)} restarts within {policy.within_seconds:g} s, "
            f"on_failure.max_restarts is {policy.max_restarts}",
        )
    without = policy.restart == "replan" and cause in _ABOUT_A_DEVICE
    return Decision(True, without, "without the lost devices" if without else "on the same devices")
