"""Constraints that contradict each other, objectives and their limits, and the difference of two plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hethub.cost.shapes import Parameter, layer_parameters, model_parameters
from hethub.errors import InfeasibleError, InputError
from hethub.planners.conflicts import conflict
from hethub.planners.diff import diff_plans
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Found, Problem
from hethub.planners.objective import best_plan
from hethub.specs.cluster import load_planning
from hethub.specs.constraints import Constraints, Objective
from hethub.specs.plan import Plan
from tests.plan_strategies import six_plans, three_speeds, tiny_model
from tests.planners.examples import one_two_four, only_across_nodes, workload

LAPTOP = Path(__file__).parents[2] / "cluster_specs" / "laptop.yaml"


def _priced(usd: dict[str, float]) -> Problem:
    problem = one_two_four()
    types = {
        name: replace(t, usd_per_hour=usd[name], power_watts=100.0 * usd[name])
        for name, t in problem.cluster.device_types.items()
    }
    return Problem.of(replace(problem.cluster, device_types=types), problem.workload)


def test_the_cheapest_plan_leaves_dear_devices_out() -> None:
    problem = _priced({"fast": 100.0, "middle": 1.0, "slow": 100.0})
    found = best_plan(FirstPlanner(), problem, Objective(best="usd_per_million_tokens"))
    devices = problem.compute.graph.devices
    assert {devices[d].type.name for d in found.modelled.layout.used} == {"middle"}


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    problem = _priced({"fast": 3.0, "middle": 2.0, "slow": 1.0})
    objective = Objective(best="throughput", tokens=1e9, budget_usd=1e-6)
    with pytest.raises(InfeasibleError, match=r"budget_usd: 1e-06: .* the nearest takes [\d.,]+ usd"):
        best_plan(FirstPlanner(), problem, objective)


def test_a_deadline_that_can_be_met_is_met() -> None:
    problem = _priced({"fast": 3.0, "middle": 2.0, "slow": 1.0})
    fastest = FirstPlanner().plan(problem)
    tokens = problem.workload.global_batch * problem.workload.sequence_length
    hours = 1.2 * fastest.step_seconds / 3600
    objective = Objective(best="usd_per_million_tokens", tokens=tokens, deadline_hours=hours)
    found = best_plan(FirstPlanner(), problem, objective)
    assert found.step_seconds <= hours * 3600


def test_a_zones_power_is_kept() -> None:
    problem = _priced({"fast": 3.0, "middle": 2.0, "slow": 1.0})
    zone = problem.cluster.node_groups[0].zone
    found = best_plan(FirstPlanner(), problem, Objective(site_watts={zone: 500.0}))
    zones = {group.name: group.zone for group in problem.cluster.node_groups}
    devices = problem.compute.graph.devices
    used = [devices[d] for d in found.modelled.layout.used]
    assert sum(d.type.power_watts or 0.0 for d in used if zones[d.group] == zone) <= 500.0


def test_the_smallest_set_of_constraints_that_conflict_is_named() -> None:
    """Two constraints each leave room for a plan, together they do not; a third has no part in it."""
    types = ("fast", "middle", "slow")
    alone = dict.fromkeys(types, (1,))
    constraints = Constraints(max_pipeline=1, same_stage=False, tensor_parallel=alone)
    for memory in range(300, 1500, 50):
        problem = one_two_four(memory_bytes=memory << 10)
        planner = FirstPlanner()

        def fits(*names: str, problem: Problem = problem, planner: FirstPlanner = planner) -> bool:
            return (
                planner.search(replace(problem, constraints=constraints.only(names), finalists=1)) is not None
            )

        degrees = [f"tensor_parallel.{name}" for name in types]
        if fits("max_pipeline") and not fits("max_pipeline", *degrees):
            break
    else:
        pytest.fail("no memory makes these constraints conflict")
    error = conflict(planner, replace(problem, constraints=constraints))
    assert error is not None
    assert "constraints.max_pipeline" in error.message
    assert "constraints.tensor_parallel" in error.message
    assert "same_stage" not in error.message
    assert "cannot hold together" in error.message


def test_constraints_are_read_with_their_places(tmp_path: Path) -> None:
    text = LAPTOP.read_text().replace(
        "laptop-model/config.json", str(LAPTOP.parent / "laptop-model/config.json")
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(
        text + "constraints: {tensor_parallel: {fast: [1]}, use_all: true}\nobjective: {best: throughput}\n"
    )
    told = load_planning(file)
    assert told.constraints.names() == ("tensor_parallel.fast", "use_all")
    assert all(place.startswith(f"{file}:") for place in told.constraints.places.values())
    file.write_text(text + "constraints: {tensor_parallel: {fats: [1]}}\n")
    with pytest.raises(InputError, match='"fats" is no device type of this cluster'):
        load_planning(file)
    file.write_text(text + "objective: {best: cheapness}\n")
    with pytest.raises(InputError, match="cheapness"):
        load_planning(file)


def test_a_plan_and_itself_do_not_differ_and_others_move_bytes() -> None:
    problem = one_two_four()
    one = FirstPlanner().plan(problem).plan
    other = FirstPlanner().plan(replace(problem, constraints=Constraints(max_pipeline=1))).plan
    same = diff_plans(one, one)
    assert (same.changed_devices, same.moved_layers, same.weight_bytes, same.state_bytes) == (0, 0, 0, 0)
    changed = diff_plans(one, other)
    assert (changed.weight_bytes > 0) == (changed.changed_devices > 0)


def test_a_tied_table_that_a_device_holds_twice_moves_once() -> None:
    """Seeded bug that it saw: counted with the embedding and with the head, also where it lay there already."""
    plans = six_plans()
    staged, alone = plans["unequal stages"], plans["one device"]
    model = alone.workload.model
    elements = [
        sum(_elements(p) for p in layer_parameters(model, layer)) for layer in range(model.layers + 2)
    ]
    (table,) = (_elements(p) for p in model_parameters(model) if len(p.layers) == 2)
    whole = sum(elements) - table
    assert diff_plans(staged, alone).weight_bytes == 4 * (whole - sum(elements[:3]))
    assert diff_plans(alone, _on(alone, "a/0/1")).weight_bytes == 4 * whole


def _elements(parameter: Parameter) -> int:
    return parameter.shape[parameter.axis] * parameter.elements_per_index


def _on(plan: Plan, device: str) -> Plan:
    """A plan of one device on another one."""
    (pipeline,) = plan.pipelines
    (stage,) = pipeline.stages
    (replica,) = stage.replicas
    (rank,) = replica.ranks
    replica = replica.model_copy(update={"ranks": [rank.model_copy(update={"device": device})]})
    stage = stage.model_copy(update={"replicas": [replica]})
    return plan.model_copy(update={"pipelines": [pipeline.model_copy(update={"stages": [stage]})]})


def test_power_that_is_too_little_for_any_choice_is_told_with_what_the_fastest_plan_takes() -> None:
    """No device of the laptop holds the model alone, and the zones have power for one. Seen to catch: the plan of all
    devices as the answer, without a word of the limits (a real bug)."""
    told = load_planning(LAPTOP)
    types = {name: replace(t, power_watts=100.0) for name, t in told.cluster.device_types.items()}
    problem = Problem.of(replace(told.cluster, device_types=types), told.workload)
    objective = Objective(site_watts={"desk": 100.0, "shelf": 50.0})
    with pytest.raises(
        InfeasibleError, match=r"site_watts.desk: 100 .*the fastest takes [2-4]00 watts in desk"
    ):
        best_plan(FirstPlanner(), problem, objective)


def test_limits_are_held_against_the_even_split_that_stands_in() -> None:
    """Seen to catch: an answer that misses its deadline (a real bug)."""
    problem = only_across_nodes()
    tokens = problem.workload.global_batch * problem.workload.sequence_length
    hours = FirstPlanner().plan(problem).step_seconds / 3600
    assert best_plan(
        FirstPlanner(), problem, Objective(tokens=tokens, deadline_hours=1.01 * hours)
    ).step_seconds
    with pytest.raises(InfeasibleError, match=r"deadline_hours: .* the fastest takes [\d.e-]+ hours"):
        best_plan(FirstPlanner(), problem, Objective(tokens=tokens, deadline_hours=0.99 * hours))


def test_where_all_must_work_the_cheapest_plan_leaves_none_out() -> None:
    """Seen to catch: all devices of the cheapest choice, not of the cluster (a real bug)."""
    problem = _priced({"fast": 100.0, "middle": 1.0, "slow": 100.0})
    constrained = replace(problem, constraints=Constraints(use_all=True))
    found = best_plan(FirstPlanner(), constrained, Objective(best="usd_per_million_tokens"))
    assert len(found.modelled.layout.used) == len(problem.compute.graph.devices)


def _node_of_six(degrees: tuple[int, ...]) -> Problem:
    """Of which all must work, in groups of these degrees."""
    group = replace(three_speeds().node_groups[0], devices_per_node=6)
    cluster = replace(
        three_speeds(),
        device_types={"fast": three_speeds().device_types["fast"]},
        node_groups=(group,),
        links=(),
    )
    constraints = Constraints(use_all=True, tensor_parallel={"fast": degrees})
    return Problem.of(cluster, workload(tiny_model(layers=6), batch=12), constraints=constraints)


def test_devices_that_a_group_leaves_over_do_not_work() -> None:
    """Groups of four on a node of six. Seen to catch: all six counted as in use (a real bug)."""
    problem = _node_of_six((4,))
    assert FirstPlanner().search(problem) is None
    error = conflict(FirstPlanner(), problem)
    assert error is not None
    assert "constraints.use_all" in error.message
    assert "constraints.tensor_parallel.fast" in error.message


def test_where_all_must_work_groups_that_leave_some_over_do_not_stand_in_the_way_of_others() -> None:
    found = FirstPlanner().search(_node_of_six((2, 4)))
    assert found is not None
    assert len(found.modelled.layout.used) == 6


class _Patient(FirstPlanner):
    """Our planner, by whose clock every search takes all the time that it may."""

    now = 0.0
    searches = 0

    def estimate(self, problem: Problem) -> tuple[float, dict[int, int]] | None:
        self.now += problem.seconds
        return super().estimate(problem)

    def search(self, problem: Problem) -> Found | None:
        self.now += problem.seconds
        self.searches += 1
        return super().search(problem)


def test_all_searches_for_an_objective_share_the_time_limit() -> None:
    """Seen to catch: the whole limit for each of a dozen searches (a real bug)."""
    problem = _priced({"fast": 3.0, "middle": 2.0, "slow": 1.0})
    planner, limit = _Patient(), 1e6
    best_plan(
        planner,
        replace(problem, seconds=limit),
        Objective(best="usd_per_million_tokens"),
        clock=lambda: planner.now,
    )
    assert planner.searches > 1
    assert planner.now == pytest.approx(limit)


def test_constraints_are_not_doubted_where_only_the_objective_is_not_met() -> None:
    """Seen to catch: a search for each of all their subsets (a real bug)."""
    constraints = Constraints(max_pipeline=2, same_stage=False, tensor_parallel={"fast": (1, 2)})
    planner = _Patient()
    assert conflict(planner, replace(one_two_four(), constraints=constraints)) is None
    assert planner.searches == 1
