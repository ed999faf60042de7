"""The homogeneous bound: each type by itself, added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hethub.cost.bounds import physical_bound
from hethub.planners.answer import answer
from hethub.planners.first import FirstPlanner
from hethub.planners.homogeneous import HomogeneousBound, type_alone
from hethub.planners.interface import Problem
from hethub.specs.constraints import Constraints, Objective
from hethub.specs.layout import lay_out
from tests.planners.examples import one_two_four, with_memory


def homogeneous_bound(problem: Problem) -> HomogeneousBound:
    """Every type of the cluster by itself."""
    planner, physical = FirstPlanner(), physical_bound(problem.compute)
    names = problem.cluster.counts()
    return HomogeneousBound.of(type_alone(planner, problem, physical, name) for name in names)


def test_it_is_the_sum_of_the_types_own_best_plans() -> None:
    problem = one_two_four()
    bound = homogeneous_bound(problem)
    assert [entry.device_type for entry in bound.types] == ["fast", "middle", "slow"]
    assert bound.tokens_per_second == pytest.approx(sum(entry.tokens_per_second for entry in bound.types))
    assert bound.not_a_bound == ()
    for entry in bound.types:
        alone = replace(
            problem,
            types=frozenset([entry.device_type]),
            workload=replace(problem.workload, global_batch=entry.global_batch),
        )
        found = FirstPlanner().plan(alone)
        tokens = entry.global_batch * problem.workload.sequence_length
        assert entry.tokens_per_second == pytest.approx(tokens / found.step_seconds, rel=0.1)


def test_batches_are_the_shares_rounded_and_at_least_one_row() -> None:
    problem = one_two_four()
    small = replace(problem, workload=replace(problem.workload, global_batch=2))
    bound = homogeneous_bound(small)
    assert [entry.global_batch for entry in bound.types] == [1, 1, 1]
    assert sum(entry.exact_batch for entry in bound.types) == pytest.approx(2.0)


def test_a_type_that_cannot_hold_the_model_counts_nothing_and_is_named() -> None:
    problem = one_two_four()
    types = dict(problem.cluster.device_types)
    types["slow"] = replace(types["slow"], memory_bytes=100 * 1024)
    tight = Problem.of(replace(problem.cluster, device_types=types), problem.workload)
    bound = homogeneous_bound(tight)
    assert bound.not_a_bound == ("slow",)
    assert bound.types[2].tokens_per_second == 0.0


def test_one_type_alone_is_its_own_bound() -> None:
    problem = one_two_four()
    only = replace(problem.cluster, node_groups=problem.cluster.node_groups[:1], links=())
    single = Problem.of(with_memory(only, 64 << 20), problem.workload)
    found = answer(single.cluster, single.workload)
    assert found.homogeneous.tokens_per_second == pytest.approx(found.figures["tokens_per_second"])
    assert len(lay_out(found.plan).used) == 2


@pytest.mark.parametrize(
    "fixed",
    [
        {"objective": Objective(best="usd_per_million_tokens")},
        {"constraints": Constraints(tensor_parallel={"fast": (4,)})},
    ],
)
def test_a_plan_that_the_user_limits_is_not_its_own_bound(fixed: dict[str, Any]) -> None:
    """Of a single type. Seeded bug that it saw: the cheap, or constrained, plan stood for the best of the type."""
    problem = one_two_four()
    group = replace(problem.cluster.node_groups[0], devices_per_node=8)
    fast = replace(problem.cluster.device_types["fast"], usd_per_hour=1.0)
    cluster = replace(problem.cluster, node_groups=(group,), links=(), device_types={"fast": fast})
    free, limited = answer(cluster, problem.workload), answer(cluster, problem.workload, **fixed)
    assert limited.homogeneous.tokens_per_second == pytest.approx(
        free.homogeneous.tokens_per_second, rel=0.05
    )
    assert limited.figures["tokens_per_second"] < 0.9 * free.homogeneous.tokens_per_second
