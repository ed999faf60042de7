"""Baselines under our cost model: valid plans, judged by our simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hethub.errors import InfeasibleError
from hethub.planners.baselines.by_speed import data_parallel_by_speed, pipeline_by_speed
from hethub.planners.baselines.comparison import OURS, compare, contenders
from hethub.planners.baselines.metis_like import metis_like
from hethub.planners.baselines.planner import SplitPlanner, whole_batch
from hethub.planners.baselines.sailor_like import sailor_like
from hethub.planners.baselines.split import Band, Group, Side, Split
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.specs.constraints import Constraints
from tests.plan_strategies import three_speeds, tiny_model
from tests.planners.baselines.made_up import MadeUpPrices, kind
from tests.planners.examples import one_two_four, workload

SEARCHES = [data_parallel_by_speed, pipeline_by_speed, metis_like, sailor_like]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.__name__)
def test_every_baseline_makes_a_valid_plan(search):
    found = SplitPlanner("baseline", search).plan(one_two_four())
    assert check_plan(found.plan) == []
    assert found.step_seconds > 0


def test_rows_go_by_speed():
    """Types 1 : 2 : 4 fast, two devices each: of a whole batch of 24 in one micro-batch 12 rows a pair's share of 7."""
    found = SplitPlanner("rows", data_parallel_by_speed).plan(one_two_four())
    (pipeline,) = found.plan.pipelines
    rows = {replica.rows for replica in pipeline.stages[0].replicas}
    assert max(rows) >= 2 * min(rows)


def test_layers_go_by_speed():
    """A node of each of two kinds, 3 : 1 fast, and eight decoders."""
    prices = MadeUpPrices([kind("a", 2), kind("b", 2)], [3.0, 1.0], decoders=8)
    (_, split), *_ = pipeline_by_speed(prices)
    assert split.bounds == (0, 7, 10)


def test_a_baseline_that_finds_nothing_says_so():
    tight = one_two_four(memory_bytes=1024)
    with pytest.raises(InfeasibleError, match=r"rows: none of its 0 splits .* fits"):
        SplitPlanner("rows", data_parallel_by_speed).plan(tight)


def test_rounded_micro_batches_become_the_whole_batch():
    """3 replicas of 2 rows: 4 micro-batches each would be 24 rows of 20."""
    split = Split((0, 6), (Band(((Side(Group(0, 1), 2, 3),),), 4),))
    exact = whole_batch(split, 20)
    assert exact is not None
    assert exact.total_rows == 20
    assert sorted((band.micro_batches, band.repeat) for band in exact.bands) == [(3, 2), (4, 1)]
    assert whole_batch(split, 21) is None


def test_ours_comes_first_and_no_vendor_twice():
    names = [contender.name for contender in contenders(one_two_four())]
    assert names[0] == OURS
    assert len(set(names)) == len(names)
    assert "fast alone" in names


def test_a_baseline_without_a_plan_is_a_row_with_its_reason():
    results = compare(one_two_four())
    assert all((result.found is None) == (result.failure is not None) for result in results)
    best = max(result.tokens_per_second for result in results)
    assert results[0].tokens_per_second == pytest.approx(best, rel=0.05)
    with pytest.raises(InfeasibleError):
        compare(one_two_four(memory_bytes=1024))


def test_nodes_that_groups_do_not_divide_are_no_reason_to_fail():
    """Two nodes of three, in pairs. Seen to catch: three pairs of six devices, and an AssertionError (a real bug)."""
    group = replace(three_speeds().node_groups[0], nodes=2, devices_per_node=3)
    types = {"fast": three_speeds().device_types["fast"]}
    cluster = replace(three_speeds(), device_types=types, node_groups=(group,), links=())
    problem = Problem.of(cluster, workload(tiny_model(layers=6), batch=12))
    constrained = replace(problem, constraints=Constraints(tensor_parallel={"fast": (2,)}))
    results = {result.name: result for result in compare(constrained)}
    assert all((result.found is None) == (result.failure is not None) for result in results.values())
    for name in (OURS, "Sailor-like", "rows by speed"):
        found = results[name].found
        assert found is not None
        assert check_plan(found.plan) == []
