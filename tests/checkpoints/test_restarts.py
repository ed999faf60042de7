"""What becomes of a failed run, by cause and policy."""

from __future__ import annotations

import pytest

from hethub.checkpoints.restarts import Cause, decide
from hethub.specs.job import FailurePolicy


def policy(**changes: object) -> FailurePolicy:
    values = {
        "restart": "replan",
        "max_restarts": 2,
        "within_seconds": 100.0,
        "not_a_number": "stop",
        **changes,
    }
    return FailurePolicy(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cause", "restart", "goes_on", "without"),
    [
        (Cause.WORKER, "none", False, False),
        (Cause.WORKER, "same", True, False),
        (Cause.WORKER, "replan", True, True),
        (Cause.NODE, "replan", True, True),
        (Cause.STALL, "replan", True, True),
        (Cause.LINK, "replan", True, False),
        (Cause.MEMORY, "same", False, False),
        (Cause.MEMORY, "replan", True, True),
        (Cause.DATA, "replan", False, False),
        (Cause.NOT_A_NUMBER, "replan", False, False),
    ],
)
def test_by_cause(cause: Cause, restart: str, goes_on: bool, without: bool) -> None:
    decision = decide(cause, policy(restart=restart), [], 0.0)
    assert (decision.restart, decision.without_the_lost) == (goes_on, without)


def test_rolling_back_needs_no_other_policy_and_keeps_the_devices() -> None:
    decision = decide(Cause.NOT_A_NUMBER, policy(restart="none", not_a_number="roll_back"), [], 0.0)
    assert decision.restart and not decision.without_the_lost


def test_restarts_count_for_a_while_only() -> None:
    assert not decide(Cause.WORKER, policy(), [1.0, 2.0], 50.0).restart
    assert decide(Cause.WORKER, policy(), [1.0, 2.0], 101.5).restart
    assert not decide(Cause.WORKER, policy(max_restarts=0), [], 0.0).restart
