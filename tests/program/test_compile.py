"""What a program says: who gets which rows, what happens after the pipeline, what it costs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.compute import ComputeModel, gradient_bytes
from hethub.program.actions import Program, What
from hethub.program.compile import compile_program, pipeline_shape
from hethub.program.hops import hop_seconds
from hethub.specs.layout import RankPlace, ReplicaPlace, StagePlace, lay_out, sequence_span
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind, Lane
from tests.plan_strategies import NAMED_PLANS, SEQUENCE, compile_plan, compute_model, plans


def places(program: Program) -> Iterator[tuple[StagePlace, ReplicaPlace, int, RankPlace, int]]:
    """Every rank: its stage, replica, place in the group, itself, and the number of the last stage."""
    for pipeline in program.layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for member, rank in enumerate(replica.ranks):
                    yield stage, replica, member, rank, len(pipeline.stages) - 1


@settings(max_examples=100)
@given(plan=plans())
def test_every_rank_gets_each_row_and_token_of_its_own_once(plan: Plan) -> None:
    program = compile_plan(plan)
    for stage, replica, member, rank, last in places(program):
        for what, absent in ((What.ACTIVATION, stage.index == 0), (What.GRADIENT, stage.index == last)):
            numbers = program.inbound.get((rank.device, stage.index, what), ())
            transfers = [program.transfers[n] for n in numbers]
            got = [(r, t) for x in transfers for r in range(*x.rows) for t in range(*x.tokens)]
            tokens = range(*sequence_span(SEQUENCE, len(replica.ranks), member))
            assert sorted(got) == ([] if absent else [(r, t) for r in range(*replica.rows) for t in tokens])


@settings(max_examples=50)
@given(plan=plans())
def test_every_byte_between_two_replicas_travels_once(plan: Plan) -> None:
    """So the fan-out to a group's members is inside the group, whatever link lies between the stages."""
    program = compile_plan(plan)
    sent: Counter[tuple[int, What, int, int, tuple[int, int]]] = Counter()
    pipeline_of = {d: p.index for p in program.layout.pipelines for s in p.stages for d in s.devices()}
    for transfer in program.transfers:
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            for row in range(*transfer.rows):
                for token in range(*transfer.tokens):
                    here = (pipeline_of[transfer.source], transfer.what, transfer.stage)
                    sent[(*here, row, (token, token))] += 1
    assert set(sent.values()) <= {1}


@settings(max_examples=50)
@given(plan=plans())
def test_a_message_carries_the_bytes_of_its_rows_or_slices(plan: Plan) -> None:
    program = compile_plan(plan)
    table = program.ownership
    for transfer in program.transfers:
        if transfer.what in (What.ACTIVATION, What.GRADIENT):
            rows, tokens = (span[1] - span[0] for span in (transfer.rows, transfer.tokens))
            elements = rows * tokens * plan.workload.model.hidden_size
            assert transfer.lane == Lane.ACTIVATIONS
        elif transfer.what in (What.REDUCE, What.WEIGHTS):
            elements = sum(table.slices[n].elements for n in transfer.slices)
            assert transfer.lane == Lane.PARAMETERS
        else:
            continue
        assert transfer.bytes == elements * gradient_bytes(plan.workload.precision)


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_after_the_pipeline_come_reduce_norm_and_update(name: str) -> None:
    program = compile_plan(NAMED_PLANS[name]("fp32"))
    for device in program.layout.used:
        after = [a.kind for a in program.devices[device] if a.stage < 0 and not program.carried(a)]
        own_work = [kind for kind in after if kind not in (Kind.SEND, Kind.RECEIVE)]
        assert own_work == sorted(own_work)
        assert own_work.count(Kind.NORM) == 1
        assert own_work.count(Kind.UPDATE) == max(1, len(program.buckets[device]))
    unused = set(range(len(program.devices))) - set(program.layout.used)
    assert all(program.devices[device] == () for device in unused)


def test_gradients_leave_between_the_parts_of_the_last_backward() -> None:
    """And new weights are put into place part by part before the first forward."""
    program = compile_plan(NAMED_PLANS["replicas that reduce in parts"]("fp32"))
    for device in program.layout.used:
        assert len(program.parts[device, 0]) > 2
        actions = program.devices[device]
        parts = [n for n, a in enumerate(actions) if a.kind == Kind.BACKWARD and a.part >= 0]
        sends = [
            n
            for n, a in enumerate(actions)
            if a.kind == Kind.SEND and program.transfer(a.message).what == What.REDUCE
        ]
        assert any(parts[0] < n < parts[-1] for n in sends)
        first = [a.kind for a in actions if a.part >= 0 and a.kind in (Kind.GATHER, Kind.FORWARD)]
        assert Kind.GATHER in first[first.index(Kind.FORWARD) :]


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
            before = [a for a in actions[:at] if a.kind not in (Kind.RECEIVE, Kind.SEND)]
            assert before[-1] == action._replace(kind=Kind.RECOMPUTE)


def test_stages_that_share_devices_are_one_resource() -> None:
    plan = NAMED_PLANS["chunks: one device in stages 0 and 2"]("fp32")
    layout = lay_out(plan)
    compute = compute_model(plan)
    hops = hop_seconds(layout, compute)[0]
    assert pipeline_shape(compute, layout.pipelines[0], hops).resources == (0, 1, 0)
    # Stage 2 on both devices joins all three.
    first, second, third = layout.pipelines[0].stages
    both = replace(third, replicas=(first.replicas[0], second.replicas[0]))
    joined = replace(layout.pipelines[0], stages=(first, second, both))
    assert pipeline_shape(compute, joined, hops).resources == (0, 0, 0)


def test_the_same_plan_compiles_to_the_same_program() -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp64")
    one, other = (compile_program(lay_out(plan), compute_model(plan)) for _ in range(2))
    assert one == other


@settings(max_examples=60)
@given(plan=plans(), slow=st.sampled_from([0.2, 5.0]))
def test_what_was_measured_prices_a_program_and_does_not_order_it(plan: Plan, slow: float) -> None:
    """A launch knows the plan alone. Seen to catch: list schedules, parts and owners by a calibration's slow-down (a
    real bug)."""
    known = compute_model(plan)
    types = sorted({known.graph.devices[d].type.name for d in lay_out(plan).used})
    measured = ComputeModel(known.graph, plan.workload, slow_down={types[0]: slow})
    one, other = (compile_program(lay_out(plan), compute) for compute in (known, measured))
    assert replace(other, prices=one.prices) == one
    assert other.prices != one.prices
