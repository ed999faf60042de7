"""Whether plans keep constraints and limits is read from the plan, not from the search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hethub.planners.baselines.by_speed import data_parallel_by_speed
from hethub.planners.baselines.planner import SplitPlanner
from hethub.planners.finalists import simulate_plan
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Planner
from hethub.planners.kept import broken_constraints, excess_watts
from hethub.simulate.what_if import Change, changed_graph
from hethub.specs.constraints import FREE, Constraints, Objective
from tests.planners.examples import one_two_four

# Each is broken by the plan that is best without it (which the test looks at first), and kept by the plan with it.
CONSTRAINTS = [
    Constraints(tensor_parallel={"fast": (2,), "middle": (2,)}),
    Constraints(max_pipeline=1),
    Constraints(use_all=True),
]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda c: c.names()[0])
def test_ours_keeps_what_it_is_told_and_the_check_sees_what_breaks_it(constraints: Constraints) -> None:
    problem = one_two_four()
    graph = problem.compute.graph
    kept = FirstPlanner().plan(replace(problem, constraints=constraints))
    assert broken_constraints(kept.plan, graph, constraints) == []
    impossible = Constraints(tensor_parallel={"fast": (64,), "middle": (64,), "slow": (64,)}, max_pipeline=0)
    assert "max_pipeline" in broken_constraints(kept.plan, graph, impossible)
    assert any(
        name.startswith("tensor_parallel") for name in broken_constraints(kept.plan, graph, impossible)
    )
    assert broken_constraints(kept.plan, graph, FREE) == []


def test_power_of_a_zone_counts_the_devices_in_use() -> None:
    problem = one_two_four()
    types = {name: replace(t, power_watts=100.0) for name, t in problem.cluster.device_types.items()}
    problem = type(problem).of(replace(problem.cluster, device_types=types), problem.workload)
    layout = FirstPlanner().plan(problem).modelled.layout
    zones = {group.name: group.zone for group in problem.cluster.node_groups}
    devices = problem.compute.graph.devices
    zone = zones[devices[layout.used[0]].group]
    watts = 100.0 * sum(zones[devices[d].group] == zone for d in layout.used)
    assert excess_watts(layout, problem.compute.graph, Objective(site_watts={zone: watts})) == {}
    over = excess_watts(layout, problem.compute.graph, Objective(site_watts={zone: watts - 1}))
    assert over == {f"site_watts.{zone}": (watts - 1, watts)}


@pytest.mark.parametrize(
    "planner", [FirstPlanner(), SplitPlanner("rows", data_parallel_by_speed)], ids=["ours", "a baseline"]
)
def test_what_is_fixed_of_a_type_holds_at_another_pace(planner: Planner) -> None:
    """As `hethub replan` and `--explain` ask for. Seen to catch: "fast at 0.8x" free of what is fixed of "fast" (a real
    bug)."""
    problem = one_two_four()
    paced = replace(
        problem, compute=problem.compute.on(changed_graph(problem.cluster, [Change("type", "fast", 0.8)]))
    )
    pairs = Constraints(tensor_parallel={"fast": (2,)}, max_pipeline=1)
    found = planner.plan(replace(paced, constraints=pairs))
    for graph in (problem.compute.graph, paced.compute.graph):
        assert broken_constraints(found.plan, graph, pairs) == []
        alone = Constraints(tensor_parallel={"fast": (4,)})
        assert broken_constraints(found.plan, graph, alone) == ["tensor_parallel.fast"]
    nothing_free = {"fast": problem.cluster.device_types["fast"].memory_bytes}
    assert simulate_plan(found.plan, paced.compute, reserve_bytes=nothing_free) is None
    spared = planner.plan(replace(paced, constraints=Constraints(memory_reserve_bytes=nothing_free)))
    devices = problem.compute.graph.devices
    assert "fast" not in {devices[d].type.name for d in spared.modelled.layout.used}
