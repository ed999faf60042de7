"""What a program says: who gets which rows, what happens after the pipeline, what it costs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.cost.compute import gradient_bytes
from hethub.program.actions import What
from hethub.program.compile import compile_program, pipeline_shape
from hethub.program.ownership import own
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind, Lane
from tests.plan_strategies import NAMED_PLANS, SEQUENCE, compile_plan, compute_model, plans


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_every_rank_gets_each_of_its_rows_once(plan: Plan) -> None:
    program = compile_plan(plan)
    for pipeline in program.layout.pipelines:
        last = len(pipeline.stages) - 1
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for rank in replica.ranks:
                    for what, absent in (
                        (What.ACTIVATION, stage.index == 0),
                        (What.GRADIENT, stage.index == last),
                    ):
                        numbers = program.inbound.get((rank.device, stage.index, what), ())
                        spans = [program.transfers[n].rows for n in numbers]
                        rows = [row for start, stop in spans for row in range(start, stop)]
                        assert rows == ([] if absent else list(range(*replica.rows)))


@settings(max_examples=50, deadline=None)
@given(plan=plans())
def test_a_message_carries_the_bytes_of_its_rows_or_slices(plan: Plan) -> None:
    program = compile_plan(plan)
    table = own(program.layout)
    for transfer in program.transfers:
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            elements = (transfer.rows[1] - transfer.rows[0]) * SEQUENCE * plan.workload.model.hidden_size
            assert transfer.lane == Lane.ACTIVATIONS
        elif transfer.what in (What.REDUCE, What.WEIGHTS):
            elements = sum(table.slices[n].elements for n in transfer.slices)
            assert transfer.lane == Lane.PARAMETERS
        else:
            continue
        assert transfer.bytes == elements * gradient_bytes(plan.workload.precision)


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_a_step_ends_with_reduce_norm_update_gather_on_every_rank(name: str) -> None:
    program = compile_plan(NAMED_PLANS[name]("fp32"))
    for device in program.layout.used:
        after = [a.kind for a in program.devices[device] if a.stage < 0]
        own_work = [kind for kind in after if kind not in (Kind.SEND, Kind.RECEIVE)]
        assert own_work == [Kind.REDUCE, Kind.NORM, Kind.UPDATE, Kind.GATHER]
    unused = set(range(len(program.devices))) - set(program.layout.used)
    assert all(program.devices[device] == () for device in unused)


def test_evaluation_goes_forward_and_sums_the_loss_only() -> None:
    program = compile_plan(NAMED_PLANS["everything uneven at once"]("fp32"), training=False)
    kinds = {action.kind for actions in program.devices for action in actions}
    assert kinds == {Kind.FORWARD, Kind.NORM, Kind.SEND, Kind.RECEIVE}
    assert {transfer.what for transfer in program.transfers} == {What.ACTIVATION, What.NORM}


def test_a_stage_that_recomputes_does_so_before_each_backward() -> None:
    program = compile_plan(NAMED_PLANS["recompute full"]("fp32"))
    actions = program.devices[program.layout.used[0]]
    for at, action in enumerate(actions):
        if action.kind == Kind.BACKWARD:
            assert actions[at - 1] == action._replace(kind=Kind.RECOMPUTE)


def test_stages_that_share_devices_are_one_resource() -> None:
    plan = NAMED_PLANS["chunks: one device in stages 0 and 2"]("fp32")
    layout = lay_out(plan)
    assert pipeline_shape(compute_model(plan), layout.pipelines[0]).resources == (0, 1, 0)
    # Stage 2 on both devices joins all three.
    first, second, third = layout.pipelines[0].stages
    both = replace(third, replicas=(first.replicas[0], second.replicas[0]))
    joined = replace(layout.pipelines[0], stages=(first, second, both))
    assert pipeline_shape(compute_model(plan), joined).resources == (0, 0, 0)


def test_the_same_plan_compiles_to_the_same_program() -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp64")
    one, other = (compile_program(lay_out(plan), compute_model(plan)) for _ in range(2))
    assert one == other
