"""The physical bound cannot be beaten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.bounds import physical_bound, physical_step_seconds
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import LayerRow, Profile
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.specs.layout import Share, lay_out
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
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


def _rows(plan: Plan, draw: st.DrawFn) -> Iterator[LayerRow]:
    """Measured layers, long enough to outweigh messages: some types, kinds, degrees and micro-batches."""
    seconds = st.floats(0.05, 1.0)
    some = st.integers(0, 3).map(bool)
    for name, kind, degree, rows in product(
        plan.cluster.device_types, ("embedding", "decoder", "head"), (1, 2), (1, 3)
    ):
        if draw(some):
            halves = draw(st.booleans())
            yield LayerRow(
                model=plan.workload.model.name, device_type=name, layer_kind=kind, tensor_parallel=degree,
                micro_batch=rows, sequence_length=plan.workload.sequence_length, dtype=plan.workload.precision,
                forward_seconds=draw(seconds), backward_seconds=draw(seconds),
                backward_input_seconds=draw(seconds) if halves else None,
                backward_weight_seconds=draw(seconds) if halves else None,
            )  # fmt: skip


def _filling(draw: st.DrawFn) -> Plan:
    """A plan in which both devices of a cluster work nearly all the time, as a group or each for itself."""
    cluster, model = three_speeds(), tiny_model(layers=2)
    cluster = replace(cluster, node_groups=cluster.node_groups[:1], links=())
    degree, count, rows = draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rank = Rank(
        devices="a/0/0-1", count=degree, heads=model.heads // degree, ffn=model.ffn_size // degree,
        vocab=model.vocab_size // degree,
    )  # fmt: skip
    stage = Stage(layers=(0, model.layers + 2), in_flight=1, replicas=[Replica(rows=rows, ranks=[rank])])
    schedule = draw(st.sampled_from(["1f1b", "1f1b-split"]))
    pipeline = Pipeline(
        repeat=2 // degree, schedule=schedule, micro_batches=count, micro_batch_rows=rows, stages=[stage]
    )
    batch = 2 // degree * count * rows
    workload = Workload(
        model=model, sequence_length=16, global_batch=batch, precision="fp32", optimizer="adamw"
    )
    return Plan(name="filling", pipelines=[pipeline], cluster=cluster, workload=workload)


@st.composite
def _profiled(draw: st.DrawFn) -> tuple[Plan, Profile]:
    plan = draw(plans()) if draw(st.booleans()) else _filling(draw)
    return plan, Profile(tuple(_rows(plan, draw)), ())


@settings(max_examples=100)
@given(drawn=_profiled())
def test_no_plan_is_quicker_whatever_was_measured(drawn: tuple[Plan, Profile]) -> None:
    """Seeded bugs that it saw: one rank's measurements alone; backwards measured in halves left out."""
    plan, profile = drawn
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload, profile)
    step = simulate(compile_program(lay_out(plan), compute), compute, record=False).step_seconds
    assert step >= physical_step_seconds(compute) * (1 - 1e-9)


def _measured(
    plan: Plan, degree: int, forward: float, backward: float, halves: float | None = None
) -> LayerRow:
    return LayerRow(
        model=plan.workload.model.name, device_type="fast", layer_kind="decoder", tensor_parallel=degree,
        micro_batch=1, sequence_length=plan.workload.sequence_length, dtype="fp32", forward_seconds=forward,
        backward_seconds=backward, backward_input_seconds=halves, backward_weight_seconds=halves,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("degree", "forward", "backward", "halves", "least"),
    [(2, 1.5, 2.5, None, 8.0), (1, 4.0, 6.0, 2.0, 8.0), (2, 2.0, 4.0, None, 10.0)],
)
def test_of_what_was_measured_the_least_device_seconds_count(
    degree: int, forward: float, backward: float, halves: float | None, least: float
) -> None:
    """A decoder that takes 10 s on one rank takes 2 x 4 s on two, or 8 s in halves, or is still quickest alone. Seeded
    bug that it saw: 10 s each time."""
    plan = NAMED_PLANS["single device"]("fp32")
    cluster = replace(plan.cluster, node_groups=plan.cluster.node_groups[:1], links=())
    rows = (_measured(plan, 1, 4.0, 6.0), _measured(plan, degree, forward, backward, halves))
    compute = ComputeModel(CostGraph(cluster), plan.workload, Profile(rows[1:] if degree == 1 else rows, ()))
    decoders, batch = plan.workload.model.layers, plan.workload.global_batch
    bound = physical_step_seconds(compute)
    assert bound == pytest.approx(least * decoders * batch / len(cluster.devices()), rel=1e-3)
