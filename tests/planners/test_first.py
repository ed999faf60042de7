"""The first planner's certificate: its plans are valid, their figures true, and no bound is beaten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.bounds import physical_step_seconds
from hethub.cost.memory import device_memory, usable_bytes
from hethub.errors import InfeasibleError
from hethub.planners.even import EvenPlanner
from hethub.planners.finalists import simulate_plan, simulate_with_room
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.program.compile import compile_program
from hethub.program.prove import prove
from hethub.program.updaters import own_by_strength
from hethub.simulate.engine import simulate
from hethub.specs.constraints import Constraints
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from tests.plan_strategies import three_speeds, tiny_model
from tests.planners.examples import one_two_four, problems, workload


@settings(max_examples=25)
@given(problem=problems())
def test_a_plan_is_valid_executable_and_no_quicker_than_physics(problem: Problem) -> None:
    try:
        found = FirstPlanner().plan(problem)
    except InfeasibleError as error:
        assert "short" in error.message
        return
    assert check_plan(found.plan) == []
    prove(found.modelled.program)
    assert found.step_seconds >= physical_step_seconds(problem.compute)
    assert all(loser.step_seconds >= found.step_seconds for loser in found.runners_up)


@settings(max_examples=15)
@given(problem=problems())
def test_where_an_even_split_fits_the_planner_finds_a_plan(problem: Problem) -> None:
    even = EvenPlanner().search(problem)
    if even is not None:
        assert check_plan(even.plan) == []
        assert FirstPlanner().search(problem) is not None


@settings(max_examples=25)
@given(
    problem=st.one_of(problems(), st.builds(one_two_four)),
    schedule=st.sampled_from(["1f1b", "1f1b-split", "list", "zb-h1"]),
)
def test_no_schedule_is_quicker_than_a_candidates_least_seconds(problem: Problem, schedule: str) -> None:
    """By which finalists are left unsimulated. Seen to catch: half a micro-batch of a stage's own work too much."""
    choice = FirstPlanner().choose(problem)
    for finalist in () if choice is None else choice.finalists:
        modelled = simulate_plan(_under(finalist.plan, schedule), problem.compute)
        if modelled is not None:
            least = finalist.candidate.least_seconds * (1 - 1e-9)
            assert modelled.simulation.step_seconds >= least
            assert modelled.steady().simulation.step_seconds >= least


def test_the_same_problem_has_the_same_answer() -> None:
    one, other = (FirstPlanner().plan(one_two_four()) for _ in range(2))
    assert one.plan == other.plan
    assert one.considered == other.considered


def test_the_step_is_the_simulators() -> None:
    problem = one_two_four()
    found = FirstPlanner().plan(problem)
    program = compile_program(lay_out(found.plan), problem.compute)
    assert simulate(program, problem.compute, record=False, steps=3).step_seconds == found.step_seconds


def _under(plan: Plan, schedule: str) -> Plan:
    pipelines = [pipeline.model_copy(update={"schedule": schedule}) for pipeline in plan.pipelines]
    return plan.model_copy(update={"pipelines": pipelines})


def test_a_big_plans_schedule_is_quicker_than_1f1b_by_the_whole_simulation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As big are taken all candidates here, so that only parts of them are simulated before one is chosen. Seeded bug
    that it saw: parts simulated under 1F1B."""
    monkeypatch.setattr("hethub.planners.finalists._WHOLE_ACTIONS", 0)
    problem = one_two_four()
    found = FirstPlanner().plan(problem)
    assert check_plan(found.plan) == []
    prove(found.modelled.program)
    plain = simulate_plan(_under(found.plan, "1f1b"), problem.compute)
    assert plain is not None
    assert found.step_seconds < plain.steady().simulation.step_seconds
    assert all(loser.step_seconds >= found.step_seconds for loser in found.runners_up)


def test_what_lacks_memory_for_split_backwards_goes_one_less_far_ahead() -> None:
    problem = replace(one_two_four(), types=frozenset(["middle"]))
    plan = _under(FirstPlanner().plan(problem).plan, "1f1b")
    pipelines = [
        pipeline.model_copy(
            update={"stages": [s.model_copy(update={"in_flight": 4}) for s in pipeline.stages]}
        )
        for pipeline in plan.pipelines
    ]
    plan = plan.model_copy(update={"pipelines": pipelines})
    layout = lay_out(plan)
    updates = own_by_strength(layout, problem.compute).updates
    devices = problem.compute.graph.devices
    needed = {d: use.total for d, use in device_memory(problem.compute, layout, *updates).items()}
    least = max(needed, key=lambda d: needed[d])
    reserve = {devices[least].type.name: usable_bytes(devices[least].type) - needed[least]}
    roomy = simulate_with_room(plan, problem.compute, reserve_bytes=reserve)
    assert roomy is not None
    assert roomy[0] == plan
    split = _under(plan, "1f1b-split")
    assert simulate_plan(split, problem.compute, reserve_bytes=reserve) is None
    roomy = simulate_with_room(split, problem.compute, reserve_bytes=reserve)
    assert roomy is not None
    before, after = (
        [stage.in_flight for pipeline in one.pipelines for stage in pipeline.stages]
        for one in (split, roomy[0])
    )
    less = {b - a for b, a in zip(before, after, strict=True)}
    assert {1} <= less <= {0, 1}


def test_uneven_beats_even_where_speeds_are_one_two_four() -> None:
    problem = one_two_four()
    even = EvenPlanner().plan(problem)
    assert FirstPlanner().plan(problem).step_seconds < 0.8 * even.step_seconds


def test_a_faster_device_gets_more_layers_or_rows() -> None:
    found = FirstPlanner().plan(one_two_four())
    busy = {"a": 0.0, "b": 0.0, "c": 0.0}  # group -> layers x rows
    for pipeline in found.plan.pipelines:
        for stage in pipeline.stages:
            layers = stage.layers[1] - stage.layers[0]
            for replica in stage.replicas:
                group = (replica.ranks[0].device or replica.ranks[0].devices or "")[0]
                busy[group] += (
                    layers * replica.rows * replica.repeat * pipeline.repeat * pipeline.micro_batches
                )
    assert busy["a"] > busy["b"] > busy["c"]


@pytest.mark.parametrize("count", [8, 16])
def test_devices_of_which_no_two_are_alike_are_planned(count: int) -> None:
    """As where every device has a pace of its own. Seen to catch: stages of any of the 65,535 sets of 16 types, with
    which the search did not end, or where hundreds of its pipelines lacked memory found no plan."""
    base = three_speeds()
    kind, group = base.device_types["fast"], base.node_groups[0]
    types = {
        f"type{n}": replace(
            kind,
            name=f"type{n}",
            peak_flops_per_second={"fp32": (10.0 + n) * 1e8},
            memory_bytes=1 << 20,
        )
        for n in range(count)
    }
    groups = tuple(
        replace(group, name=f"group{n}", device_type=f"type{n}", nodes=1, devices_per_node=1)
        for n in range(count)
    )
    cluster = replace(base, device_types=types, node_groups=groups, links=())
    problem = Problem.of(cluster, workload(tiny_model(layers=12, heads=4), batch=32))
    choice = FirstPlanner().choose(problem)
    assert choice is not None
    assert not check_plan(choice.plan)
    assert len(lay_out(choice.plan).used) > 1


def test_types_left_out_are_not_used() -> None:
    problem = replace(one_two_four(), types=frozenset(["slow"]))
    found = FirstPlanner().plan(problem)
    devices = problem.compute.graph.devices
    assert {devices[d].type.name for d in lay_out(found.plan).used} == {"slow"}


@pytest.mark.parametrize("batch", [1, 7, 13])
def test_awkward_batches_are_done_to_the_row(batch: int) -> None:
    problem = Problem.of(three_speeds(), workload(tiny_model(layers=5), batch=batch))
    found = FirstPlanner().plan(problem)
    assert sum(p.repeat * p.micro_batches * p.micro_batch_rows for p in found.plan.pipelines) == batch


@settings(max_examples=25)
@given(problem=problems())
def test_without_time_a_plan_is_found_wherever_one_fits(problem: Problem) -> None:
    """A constraint that all plans keep leaves the even split out. Seen to catch: the end before the first price (a real
    bug: constraints were said to contradict each other)."""
    own = replace(problem, constraints=Constraints(max_pipeline=64))
    hurried = FirstPlanner().search(replace(own, seconds=0.0))
    assert (hurried is None) == (FirstPlanner().search(own) is None)
