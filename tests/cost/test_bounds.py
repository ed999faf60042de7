"""The physical bound cannot be beaten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.cost.bounds import physical_bound, physical_step_seconds
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.simulate.engine import simulate
from hethub.specs.layout import Share
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload
from tests.plan_strategies import NAMED_PLANS, compile_plan, compute_model, plans, three_speeds, tiny_model


@settings(max_examples=40)
@given(plan=plans())
def test_no_simulated_plan_is_quicker(plan: Plan) -> None:
    compute = compute_model(plan)
    step = simulate(compile_plan(plan), compute, record=False).step_seconds
    assert step >= physical_step_seconds(compute)


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_no_named_plan_is_quicker(name: str) -> None:
    plan = NAMED_PLANS[name]("fp32")
    compute = compute_model(plan)
    assert simulate(compile_plan(plan), compute).step_seconds >= physical_step_seconds(compute)


def _compute(devices: int) -> ComputeModel:
    cluster = three_speeds()
    fast = replace(cluster.node_groups[0], devices_per_node=devices)
    cluster = replace(cluster, node_groups=(fast,), links=())
    workload = Workload(
        model=tiny_model(), sequence_length=16, global_batch=8, precision="fp32", optimizer="adamw"
    )
    return ComputeModel(CostGraph(cluster), workload)


def test_one_device_is_bounded_by_its_own_work_and_two_by_half() -> None:
    one = _compute(1)
    model, device_type = one.workload.model, one.graph.devices[0].type
    work = sum(
        count * one.layer_seconds(device_type, kind, Share.whole(model), 8)
        for kind, count in (("embedding", 1), ("decoder", model.layers), ("head", 1))
    )
    assert physical_step_seconds(one) == pytest.approx(work)
    assert physical_step_seconds(_compute(2)) == pytest.approx(work / 2)


def test_shares_add_up_and_follow_speed() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    shares = physical_bound(compute_model(plan)).shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["fast"] > shares["middle"] > shares["slow"]
