"""A training with faults played through: what is lost, where it goes on, what the policy says, and what all takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.measured import NOT_MEASURED
from hethub.errors import InputError
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.program.compile import compile_program
from hethub.simulate.course import Course, RecoverySeconds
from hethub.simulate.forecast import Forecast, forecast
from hethub.simulate.modelled import steady_step_seconds
from hethub.specs.cluster import Cluster
from hethub.specs.job import COMPUTE, CheckpointPolicy, FailurePolicy, Fault
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from tests.plan_strategies import NAMED_PLANS, compute_model

PLAN = NAMED_PLANS["rows cut differently in each stage"]("fp32")
PROGRAM = compile_program(lay_out(PLAN), compute_model(PLAN))
STEP = steady_step_seconds(PLAN, compute_model(PLAN))
SCALE = 1.0 / STEP  # a step takes a second
USED = lay_out(PLAN).used
NAMES = [device.name for device in PLAN.cluster.devices()]
AT_ONCE = RecoverySeconds(
    detect_seconds=0.0,
    silence_seconds=0.0,
    plan_seconds=0.0,
    regroup_seconds=0.0,
    load_seconds=0.0,
    first_step_seconds=0.0,
    commit_seconds=0.0,
    copy_bytes_per_second=1e18,
    write_bytes_per_second=1e18,
    read_bytes_per_second=1e18,
)
SAME = FailurePolicy(restart="same", max_restarts=100, within_seconds=3600.0, not_a_number="stop")


def middle(device: int) -> int:
    """An action in the middle of a device's list."""
    return len(PROGRAM.devices[device]) // 2


def fault(step: int, **changes: Any) -> Fault:
    """A worker killed in the middle of a step, or something else."""
    device = changes.get("device", USED[0])
    values = {"device": device, "action": middle(device), "phase": "before", "do": "kill", "factor": 2.0}
    return Fault(**{**values, "step": step, "place": "job.yaml:9:3 fault.action", **changes})


def planned_anew(cluster: Cluster) -> Plan:
    return FirstPlanner().plan(Problem.of(cluster, PLAN.workload)).plan


def played(
    faults: Sequence[Fault],
    *,
    steps: int = 20,
    every: int = 5,
    policy: FailurePolicy = SAME,
    recovery: RecoverySeconds = AT_ONCE,
) -> Forecast:
    checkpoint = CheckpointPolicy(every=every, keep=2, notice_seconds=30.0) if every else None
    return forecast(
        PLAN,
        faults,
        steps=steps,
        checkpoint=checkpoint,
        policy=policy,
        replan=planned_anew,
        scale=SCALE,
        recovery=recovery,
    )


def test_without_faults_a_training_takes_its_steps() -> None:
    found = played([])
    assert (found.steps, found.outages, found.ended) == (20, (), "")
    assert found.step_seconds == pytest.approx(1.0)
    assert found.wall_seconds == pytest.approx(
        20.0, rel=0.03
    )  # the first step has no new weights to wait for
    assert found.goodput_ratio == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize(("step", "from_step"), [(3, 0), (5, 5), (9, 5), (12, 10)])
def test_what_was_done_since_the_newest_checkpoint_is_done_again(step: int, from_step: int) -> None:
    """Seen to catch: the step under way counted as done whole."""
    found = played([fault(step)])
    (outage,) = found.outages
    assert (outage.step, outage.device, outage.cause) == (step, NAMES[USED[0]], "worker")
    assert outage.from_step == from_step
    assert step - from_step < outage.again_seconds < step - from_step + 1
    assert found.wall_seconds == pytest.approx(played([]).wall_seconds + outage.again_seconds, abs=0.2)


def test_a_checkpoint_that_is_not_whole_yet_is_not_gone_on_from() -> None:
    slow = replace(AT_ONCE, commit_seconds=0.5)
    early = fault(10, action=1)
    assert [one.from_step for one in played([early], recovery=slow).outages] == [5]
    late = fault(10, action=len(PROGRAM.devices[USED[0]]) - 1, phase="after")
    assert [one.from_step for one in played([late], recovery=slow).outages] == [10]
    assert [one.from_step for one in played([fault(11)], every=0).outages] == [0]


@pytest.mark.parametrize("part", ["detect", "regroup", "load", "first_step"])
def test_each_part_of_a_recovery_costs_its_time(part: str) -> None:
    bare = played([fault(7)], recovery=AT_ONCE)
    found = played([fault(7)], recovery=replace(AT_ONCE, **{f"{part}_seconds": 3.0}))
    attempts = 2 if part == "first_step" else 1  # the first attempt has a first step too
    assert found.wall_seconds - bare.wall_seconds == pytest.approx(3.0 * attempts)


def test_checkpoints_keep_training_for_as_long_as_their_copies_take() -> None:
    table = PROGRAM.ownership
    rate = 12 * max(table.owned_elements.values()) / 0.25  # a quarter of a second each
    found = played([], recovery=replace(AT_ONCE, copy_bytes_per_second=rate))
    assert found.stall_seconds == pytest.approx(4 * 0.25)
    assert found.wall_seconds == pytest.approx(played([]).wall_seconds + 4 * 0.25)


def test_without_a_lost_device_steps_are_those_of_another_plan() -> None:
    """Seen to catch: the plan of before kept after a replanning."""
    policy = replace(SAME, restart="replan")
    found = played([fault(7)], policy=policy, recovery=replace(AT_ONCE, plan_seconds=2.0))
    (outage,) = found.outages
    lost = NAMES[USED[0]]
    left = planned_anew(replace(PLAN.cluster, exclude=frozenset({lost})))
    after = steady_step_seconds(left, compute_model(left)) * SCALE
    assert outage.lost == (lost,) and outage.plan_seconds == 2.0
    assert outage.step_seconds == pytest.approx(after)
    assert found.wall_seconds == pytest.approx(5 + outage.again_seconds + 2 + 15 * after, rel=0.03)


def test_a_fault_of_a_device_that_is_no_longer_there_does_not_come() -> None:
    policy = replace(SAME, restart="replan")
    left = planned_anew(replace(PLAN.cluster, exclude=frozenset({NAMES[USED[0]]})))
    used = {left.cluster.devices()[d].name for d in lay_out(left).used}
    other = next(d for d in USED if NAMES[d] in used)
    found = played([fault(7), fault(9), fault(12, device=other, action=1)], policy=policy)
    assert [one.device for one in found.outages] == [NAMES[USED[0]], NAMES[other]]


def test_a_stuck_worker_is_known_after_its_limit() -> None:
    for do, silence in (("hang", 0.0), ("stop", 1.5)):
        found = played([fault(7, do=do)], recovery=replace(AT_ONCE, silence_seconds=1.5))
        (outage,) = found.outages
        assert outage.cause == "stall" and outage.detect_seconds == pytest.approx(5.0 + silence)


def test_workers_that_die_together_are_one_failure_and_a_whole_node_is_told_as_one() -> None:
    node = NAMES[USED[0]].rpartition("/")[0]
    beside = [d for d in USED if NAMES[d].rpartition("/")[0] == node]
    assert len(beside) > 1
    found = played([fault(7, device=d) for d in beside], recovery=replace(AT_ONCE, detect_seconds=0.5))
    assert [one.cause for one in found.outages] == ["node"]


@pytest.mark.parametrize(
    ("changes", "words", "steps"),
    [
        ({"restart": "none"}, "on_failure.restart is none", 7),
        ({"max_restarts": 1}, "1 restarts within 3600 s, on_failure.max_restarts is 1", 12),
        ({"within_seconds": 2.0, "max_restarts": 1}, "", 20),
    ],
)
def test_the_policy_ends_the_run_as_it_would_end_a_real_one(
    changes: dict[str, Any], words: str, steps: int
) -> None:
    found = played([fault(7), fault(12)], policy=replace(SAME, **changes))
    assert (found.ended, found.steps) == (words, steps)


def test_a_gradient_that_is_no_number_costs_by_its_policy() -> None:
    bad = fault(7, do="nan", phase="during")
    assert played([bad]).ended == "on_failure.not_a_number is stop"
    assert played([bad], policy=replace(SAME, not_a_number="skip")) == played([])
    rolled = played([bad], policy=replace(SAME, not_a_number="roll_back"))
    (outage,) = rolled.outages
    assert (outage.cause, outage.from_step) == ("not-a-number", 5)
    assert outage.again_seconds == pytest.approx(3.0, abs=0.1)  # steps 5, 6 and 7


def test_slow_devices_and_actions_make_their_steps_longer() -> None:
    plain = played([]).wall_seconds
    lasting = fault(4, action=COMPUTE, do="slow", factor=3.0, steps=6)
    three = played([lasting]).wall_seconds
    assert plain < three < plain + 6 * 2.1
    seconds = Course(PLAN, NOT_MEASURED, SCALE, (), 0, AT_ONCE).predicted_seconds(USED[0], middle(USED[0]))
    for phase in ("before", "during", "after"):
        one = played([fault(4, do="slow", factor=3.0, phase=phase)])
        assert one.wall_seconds - plain == pytest.approx(2 * seconds * SCALE)


def test_a_fault_without_a_place_in_the_plan_is_refused_at_its_line() -> None:
    with pytest.raises(InputError, match=r"^job\.yaml:9:3 fault\.action: "):
        played([fault(3, action="backward stage 9 micro-batch 0")])


@settings(max_examples=60)
@given(
    points=st.lists(
        st.tuples(
            st.integers(0, 19), st.sampled_from(USED), st.floats(0, 1), st.sampled_from(["before", "after"])
        ),
        max_size=6,
    ),
    every=st.integers(0, 7),
    detect=st.floats(0, 2),
)
def test_all_the_time_of_a_training_is_accounted_for(
    points: list[tuple[int, int, float, str]], every: int, detect: float
) -> None:
    """Steps, what is done again and what lies between make up the whole."""
    faults = [
        fault(step, device=device, action=int(share * (len(PROGRAM.devices[device]) - 1)), phase=phase)
        for step, device, share, phase in points
    ]
    recovery = replace(AT_ONCE, detect_seconds=detect, regroup_seconds=0.25)
    found = played(faults, every=every, recovery=recovery)
    assert found.steps == 20 and found.ended == ""
    assert len(found.outages) <= len(faults)
    lost = sum(one.again_seconds + one.between_seconds for one in found.outages)
    # A first step has no new weights to wait for, and the next is the longer by as much.
    first_step = abs(Course(PLAN, NOT_MEASURED, SCALE, (), 0, AT_ONCE).begin(0, 1) - 1.0)
    assert found.wall_seconds == pytest.approx(20.0 + lost, abs=first_step * (1 + len(found.outages)) + 1e-9)
    assert 0.0 < found.goodput_ratio <= 1.0 + first_step
