"""The first planner's certificate: its plans are valid, their figures true, and no bound is beaten."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.cost.bounds import physical_step_seconds
from hethub.errors import InfeasibleError
from hethub.planners.even import EvenPlanner
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.program.compile import compile_program
from hethub.program.prove import prove
from hethub.simulate.engine import simulate
from hethub.specs.layout import lay_out
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


def test_the_same_problem_has_the_same_answer() -> None:
    one, other = (FirstPlanner().plan(one_two_four()) for _ in range(2))
    assert one.plan == other.plan
    assert one.considered == other.considered


def test_the_step_is_the_simulators() -> None:
    problem = one_two_four()
    found = FirstPlanner().plan(problem)
    program = compile_program(lay_out(found.plan), problem.compute)
    assert simulate(program, problem.compute, record=False).step_seconds == found.step_seconds


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
