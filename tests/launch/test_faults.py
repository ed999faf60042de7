"""Interruptions on purpose: found in the program or refused at their line, done at their action, free without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hethub.errors import InputError
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.program.faults import Phase, PlannedFault, join_faults, plan_faults
from hethub.specs.job import Fault
from hethub.specs.layout import lay_out
from hethub.timeline.record import COMPUTE_KINDS, Kind
from hethub.timeline.summary import sent_seconds
from tests.launch.pool import Pool, PoolError, Trained
from tests.plan_strategies import NAMED_PLANS, compute_model

ONE = NAMED_PLANS["single device"]("fp32")
TWO = NAMED_PLANS["rows cut differently in each stage"]("fp32")


def fault(**changes: Any) -> Fault:
    values = {"device": 0, "step": 1, "action": 0, "phase": "before", "do": "raise", "factor": 2.0}
    return Fault(**{**values, "place": "job.yaml:9:3 fault.action", **changes})


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_program(lay_out(TWO), compute_model(TWO))


def one_second(device: int, action: int) -> float:
    return 1.0


def test_an_action_is_found_by_its_number_or_its_words(program: Program) -> None:
    number = next(
        n for n, a in enumerate(program.devices[0]) if a.kind == Kind.FORWARD and a.micro_batch == 1
    )
    words = "forward stage 0 micro-batch 1"
    for action in (number, words):
        (planned,) = plan_faults([fault(action=action, phase="after", do="kill")], program, one_second)
        assert planned == PlannedFault(0, 1, number, Phase.AFTER, "kill")


def test_words_that_no_action_has_are_refused_at_their_line(program: Program) -> None:
    with pytest.raises(
        InputError, match=r'^job\.yaml:9:3 fault\.action: .*"forwards stage 0 micro-batch 1"'
    ) as told:
        plan_faults([fault(action="forwards stage 0 micro-batch 1")], program, one_second)
    assert 'Did you mean "forward stage 0 micro-batch 1"?' in told.value.message


def test_a_number_past_the_list_and_a_device_out_of_the_plan_are_refused(program: Program) -> None:
    count = len(program.devices[0])
    with pytest.raises(InputError, match=f"has actions 0 to {count - 1}, not {count}"):
        plan_faults([fault(action=count)], program, one_second)
    alone = compile_program(lay_out(ONE), compute_model(ONE))
    left_out = next(device for device, actions in enumerate(alone.devices) if not actions)
    with pytest.raises(InputError, match="the plan leaves this device out"):
        plan_faults([fault(device=left_out, action="join")], alone, one_second)


def test_joining_is_no_action_of_a_step(program: Program) -> None:
    faults = [fault(action="join", do="hang"), fault(device=1)]
    assert join_faults(faults) == {0: "hang"}
    assert [planned.device for planned in plan_faults(faults, program, one_second)] == [1]


@pytest.mark.parametrize("phase", ["before", "during", "after"])
@pytest.mark.parametrize("action", ["forward stage 0 micro-batch 0", "update"])
def test_a_worker_raises_where_the_job_says(pool: Pool, action: str, phase: str) -> None:
    with pytest.raises(PoolError, match=f"ActionError: {action}: raised on purpose, as the job file asks"):
        pool.train(ONE, 3, faults=[fault(action=action, phase=phase)])


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_worker_runs_out_of_memory_where_the_job_says(pool: Pool, scale: float | None) -> None:
    action = "forward stage 0 micro-batch 0"
    with pytest.raises(PoolError, match=f"ActionError: {action}: .*(can't allocate memory|out of memory)"):
        pool.train(ONE, 3, faults=[fault(action=action, do="oom")], time_scale=scale)


def test_a_gradient_that_becomes_nan_ends_the_step_before_the_update(pool: Pool) -> None:
    with pytest.raises(PoolError, match=r"ActionError: update: the gradient norm is nan"):
        pool.train(ONE, 3, faults=[fault(action="backward stage 0 micro-batch 0", phase="during", do="nan")])


def test_a_slow_action_takes_the_time_and_the_training_is_the_same(pool: Pool) -> None:
    plain = pool.train(ONE, 2, held_out_rows=0)
    slow = pool.train(
        ONE, 2, held_out_rows=0, faults=[fault(action="update", phase="during", do="slow", factor=1.25)]
    )
    records = slow.timeline.records
    update = records[(records["step"] == 1) & (records["kind"] == Kind.UPDATE)]
    assert (update["end"] - update["start"]).max() >= 1.25  # of the predicted second
    assert slow.losses == plain.losses


def test_a_fault_that_is_never_reached_changes_nothing(pool: Pool) -> None:
    plain = pool.train(TWO, 2, held_out_rows=0)
    armed = pool.train(TWO, 2, held_out_rows=0, faults=[fault(device=1, step=5, do="kill")])
    assert armed.losses == plain.losses


def compute_seconds(trained: Trained, device: int, step: int) -> float:
    records = trained.timeline.records
    chosen = records[(records["step"] == step) & (records["device"] == device)]
    compute = chosen[np.isin(chosen["kind"], [int(kind) for kind in COMPUTE_KINDS])]
    return float(
        (compute["busy"] - compute["overrun"]).sum()
    )  # a loaded machine is late: that is not the device's


def test_a_device_is_slow_for_whole_steps(pool: Pool) -> None:
    trained = pool.train(
        TWO,
        4,
        held_out_rows=0,
        time_scale=1.0,
        faults=[fault(device=1, step=1, steps=2, action="compute", do="slow", factor=3.0)],
    )
    usual = compute_seconds(trained, 1, 0)
    of_steps = [compute_seconds(trained, 1, step) / usual for step in range(4)]
    # The first step takes no new weights, which is little work.
    assert of_steps == pytest.approx([1.0, 3.0, 3.0, 1.0], rel=0.02)
    assert compute_seconds(trained, 0, 1) == pytest.approx(compute_seconds(trained, 0, 0), rel=0.02)


def test_a_link_has_a_share_of_its_bandwidth_for_whole_steps(pool: Pool) -> None:
    plain = pool.train(TWO, 3, held_out_rows=0, time_scale=1.0)
    slow = pool.train(
        TWO,
        3,
        held_out_rows=0,
        time_scale=1.0,
        faults=[fault(device=-1, link="inter a", step=1, action="compute", do="slow", factor=50.0)],
    )

    (link,) = {group.inter_link for group in TWO.cluster.node_groups if group.name == "a"}
    records = slow.timeline.records
    chosen = (records["step"] == 1) & (records["kind"] == Kind.RECEIVE)
    chosen &= records["bytes"] == records["bytes"][chosen].max()
    # A loaded machine makes messages later, or notes late that one was sent. Seen to fail without the fault's factor.
    took = float(np.nanmax((records["end"] - sent_seconds(records))[chosen]))
    assert took >= 50 * records["bytes"][chosen].max() / link.bandwidth_bytes_per_second
    assert slow.losses == plain.losses
