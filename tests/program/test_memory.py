"""Peak memory by walking a program: what schedules really hold, and when."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings

from hethub.cost.memory import device_memory, rank_shape, stage_bytes
from hethub.program.actions import What
from hethub.program.compile import compile_program
from hethub.program.memory import MemoryPeak, acknowledged, program_memory
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, compute_model, plans, three_speeds


def peaks(plan: Plan) -> dict[int, MemoryPeak]:
    compute = compute_model(plan)
    return program_memory(compile_program(lay_out(plan), compute), compute)


def with_stages(plan: Plan, micro_batches: int, **changes: object) -> Plan:
    """All stages of the plan's pipelines changed alike."""
    pipelines = [
        p.model_copy(
            update={
                "stages": [stage.model_copy(update=changes) for stage in p.stages],
                "micro_batches": micro_batches,
            }
        )
        for p in plan.pipelines
    ]
    return plan.model_copy(update={"pipelines": pipelines})


def test_the_last_stage_holds_one_micro_batch_whatever_it_may_hold() -> None:
    """1F1B takes each back at once, and the walk sees it; the closed form must take the declared four."""
    plan = with_stages(NAMED_PLANS["pipeline of 2"]("fp32"), 8, in_flight=4)
    plan = plan.model_copy(update={"cluster": three_speeds(emulated=True)})
    compute, layout = compute_model(plan), lay_out(plan)
    first, last = layout.used
    found, bound = peaks(plan), device_memory(compute, layout)
    (_, stage) = layout.pipelines[0].stages
    shape = rank_shape(compute, stage.replicas[0], 0)
    one = stage_bytes(shape, stage.layers, "none")
    # Its input lies in the buffer of the message that brought it, and gradients leave from buffers too.
    assert found[last].activations == one.kept - one.entry
    assert bound[last].activations == 4 * (one.kept + one.entry)  # and a gradient that leaves
    program = compile_program(layout, compute)
    assert program.devices[last][found[last].action].kind in (Kind.FORWARD, Kind.BACKWARD)
    assert found[first].activations > found[last].activations


def test_all_micro_batches_are_held_at_the_end_of_gpipes_forwards() -> None:
    plan = NAMED_PLANS["gpipe"]("fp32")
    compute, layout = compute_model(plan), lay_out(plan)
    program = compile_program(layout, compute)
    found = program_memory(program, compute)
    stage = layout.pipelines[0].stages[0]
    one = stage_bytes(rank_shape(compute, stage.replicas[0], 0), stage.layers, "none")
    device = layout.used[0]
    assert found[device].activations >= 4 * (one.kept + one.output)
    kinds = [program.devices[device][i].kind for i in range(found[device].action)]
    assert kinds.count(Kind.FORWARD) >= 3 and kinds.count(Kind.BACKWARD) <= 1


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_saves_activations_in_the_walk_too(mode: str) -> None:
    plan = with_stages(NAMED_PLANS["uneven pipeline of 3"]("fp32"), 8, in_flight=3)
    kept, again = peaks(plan), peaks(with_stages(plan, 8, in_flight=3, recompute=mode))
    first = lay_out(plan).used[0]
    assert again[first].live_bytes < kept[first].live_bytes


@settings(max_examples=60)
@given(plan=plans())
def test_everything_is_released_and_parts_add_up(plan: Plan) -> None:
    """A second walk over the same program would find the same peak: nothing leaks from step to step. The walk's own
    second step is that already, so peaks of a program and of its twin agree, and live bytes never pass the total."""
    for device, peak in peaks(plan).items():
        parts = (peak.weights, peak.gradients, peak.optimizer, peak.activations, peak.stash)
        assert all(part >= 0 for part in parts), device
        assert peak.weights > 0 and peak.gradients == peak.weights  # fp32
        assert peak.total - peak.workspace <= peak.live_bytes <= peak.total


@settings(max_examples=100)
@given(plan=plans())
def test_the_closed_form_is_an_upper_bound_and_no_wild_one(plan: Plan) -> None:
    """Of the walk, but for what is of no model's size: the trailers of emulated messages, norms and totals. Seen: 1.0
    to 3.0 times the walk, 1.3 in the middle; most where a schedule never has in flight what it may."""
    compute, layout = compute_model(plan), lay_out(plan)
    program = compile_program(layout, compute)
    bound = device_memory(compute, layout, *program.ownership.updates)
    for device, peak in program_memory(program, compute).items():
        messages = sum(len(program.order[channel]) for channel in program.order if device in channel[:2])
        trailers = 8 * messages + 48 * len(layout.used)
        assert peak.optimizer == bound[device].optimizer, device
        assert peak.total - trailers <= bound[device].total <= 4 * peak.total, device


@settings(max_examples=60)
@given(plan=plans())
def test_answers_tell_only_of_what_has_been_received(plan: Plan) -> None:
    """Whoever gets a message may wait for the sends that it acknowledges: they have a receiver that is done with
    them, in this step or, behind a part of the norm, the one before."""
    program = compile_program(lay_out(plan), compute_model(plan))
    for message, answered in acknowledged(program, program.layout.used).items():
        transfer = program.transfer(message)
        actions = program.devices[transfer.source]
        at = next(i for i, a in enumerate(actions) if a.kind == Kind.SEND and a.message == message)
        before = {a.message for a in actions[:at] if a.kind == Kind.RECEIVE}
        for other in answered:
            back = program.transfer(other)
            assert (back.source, back.destination) == (transfer.destination, transfer.source)
            assert other in before or (transfer.what == What.NORM and back.what == What.TOTAL)


@settings(max_examples=60)
@given(plan=plans())
def test_the_norms_total_comes_when_all_before_it_has_been_received(plan: Plan) -> None:
    """So that its receiver may wait for every send. Each device takes all messages but the total before it tells its
    part of the norm."""
    program = compile_program(lay_out(plan), compute_model(plan))
    root = program.layout.used[0]
    for device in program.layout.used[1:]:
        told = [
            program.transfer(a.message).what
            for a in program.devices[device]
            if a.kind in (Kind.RECEIVE, Kind.SEND)
        ]
        assert told.index(What.TOTAL) == told.index(What.NORM) + 1
        assert set(told[told.index(What.TOTAL) + 1 :]) <= {What.WEIGHTS}
    own = [a for a in program.devices[root] if a.kind == Kind.RECEIVE]
    kinds = [program.transfer(a.message).what for a in own]
    if What.NORM in kinds:
        assert set(kinds[kinds.index(What.NORM) :]) == {What.NORM}


def test_a_long_program_is_walked_quickly() -> None:
    """A few microseconds an action; the limit is loose, for machines that do other things too."""
    plan = with_stages(NAMED_PLANS["deep and narrow: a stage per layer"]("fp32"), 512, in_flight=4)
    compute = compute_model(plan)
    program = compile_program(lay_out(plan), compute)
    start = time.process_time()
    program_memory(program, compute)
    assert time.process_time() - start < 100e-6 * sum(map(len, program.devices))
