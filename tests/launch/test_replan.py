"""A plan made anew for what a run measured is faster, under the same fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.planners.replan import pace_of_run, replan
from hethub.program.check import check_plan, same_cluster
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.pace import Pace
from hethub.specs.job import COMPUTE, Fault
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import step_seconds
from tests.chaos.three_types import plan_by_rows
from tests.launch.pool import Pool

STEPS, WARM = 8, 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for five emulated devices of three types, good as long as all are as their figures say."""
    return plan_by_rows(tmp_path_factory.mktemp("cluster"))


def predicted(plan: Plan) -> Timeline:
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    found = simulate(compile_program(lay_out(plan), compute), compute, steps=3).timeline
    assert found is not None
    return found


def slow(**changes: Any) -> Fault:
    values = {"device": -1, "step": 0, "steps": STEPS, "action": COMPUTE, "phase": "before", "do": "slow"}
    return Fault(**{**values, "place": "job.yaml", **changes})


def seconds(pool: Pool, plan: Plan, fault: Fault) -> tuple[float, Timeline]:
    trained = pool.train(plan, STEPS, held_out_rows=0, time_scale=20.0, faults=[fault])
    return float(np.median(step_seconds(trained.timeline)[WARM:])), trained.timeline


def index(plan: Plan, name: str) -> int:
    return next(d for d, device in enumerate(plan.cluster.devices()) if device.name == name)


def check_promise(pool: Pool, plan: Plan, fault: Fault) -> Pace:
    """The new plan is faster (`benchmarks/replan.py` tells how much of its promise is kept); returns the pace."""
    before, measured = seconds(pool, plan, fault)
    pace, _ = pace_of_run(plan, predicted(plan), measured, range(WARM, STEPS))
    found = replan(plan, pace)
    assert check_plan(found.plan) == [] and same_cluster(found.plan, plan.cluster) == []
    assert found.old_step_seconds == pytest.approx(before, rel=0.15)  # a loaded machine is late
    assert found.gain > 0.05
    after, _ = seconds(pool, found.plan, fault)
    assert after < before
    return pace


def test_a_device_twice_as_slow(pool: Pool, plan: Plan) -> None:
    pace = check_promise(pool, plan, slow(device=index(plan, "a/0/0"), factor=2.0))
    assert pace.devices.pop("a/0/0") == pytest.approx(2.0, rel=0.02)
    assert list(pace.devices.values()) == pytest.approx([1.0] * len(pace.devices), rel=0.02)


def test_a_link_at_a_quarter(pool: Pool, plan: Plan) -> None:
    pace = check_promise(pool, plan, slow(link="desk-shelf", factor=4.0))
    assert pace.bandwidth["desk-shelf"] == pytest.approx(0.25, rel=0.1)


def test_a_plan_that_is_still_right_is_kept(plan: Plan) -> None:
    as_predicted = Pace({device.name: 1.0 for device in plan.cluster.devices()})
    best = replan(plan, as_predicted).plan
    assert replan(best, as_predicted).gain < 0.01
