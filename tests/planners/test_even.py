"""The even baseline: Megatron's split, the best of all degrees."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.memory import device_memory
from hethub.planners.even import EvenPlanner, _Pricing
from hethub.planners.finalists import simulate_plan
from hethub.planners.interface import Problem
from hethub.program.check import check_plan
from hethub.program.updaters import own_by_strength
from hethub.specs.layout import lay_out
from tests.plan_strategies import three_speeds, tiny_model
from tests.planners.examples import one_two_four, problems, with_memory, workload


def test_all_devices_take_equal_shares_in_spec_order() -> None:
    problem = one_two_four()
    plan = EvenPlanner().plan(problem).plan
    assert check_plan(plan) == []
    assert list(lay_out(plan).used) == list(range(len(problem.compute.graph.devices)))
    (pipeline,) = plan.pipelines
    assert len({r.rows for s in pipeline.stages for r in s.replicas}) == 1
    last = problem.workload.model.layers + 1
    decoders = [min(b, last) - max(a, 1) for a, b in (stage.layers for stage in pipeline.stages)]
    assert max(decoders) - min(decoders) <= 1


def test_all_shapes_are_tried() -> None:
    """6 devices, 12 layers, 8 key-value heads, 24 rows: 1x1x6, 1x2x3, 2x1x3, 3x1x2, 3x2x1, 6x1x1."""
    problem = one_two_four()
    rows = {copies: 24 // copies for copies in (1, 2, 3, 6)}
    divisors = {copies: sum(n % d == 0 for d in range(1, n + 1)) for copies, n in rows.items()}
    shapes = [6, 3, 3, 2, 1, 1]  # data-parallel copies of each
    assert EvenPlanner().plan(problem).considered == 2 * sum(divisors[copies] for copies in shapes)


def test_a_batch_that_cannot_be_split_evenly_has_no_even_split() -> None:
    cluster = three_speeds()
    five = replace(cluster, exclude=frozenset(["c/0/1"]))
    problem = Problem.of(five, workload(tiny_model(layers=3, heads=4), batch=8))
    assert (
        EvenPlanner().search(problem) is None
    )  # 5 stages of 3 layers, 5 shares of 4 heads, 5 copies of 8 rows


def test_without_memory_there_is_none() -> None:
    problem = one_two_four()
    tight = with_memory(problem.cluster, 16 * 1024)
    assert EvenPlanner().search(Problem.of(tight, problem.workload)) is None


@settings(max_examples=100)
@given(drawn=problems(), sizes_kib=st.lists(st.integers(8, 300), min_size=3, max_size=3))
def test_what_fits_may_fit(drawn: Problem, sizes_kib: list[int]) -> None:
    """Each type has memory of its own. Seeded bug that it saw: an even share of the updates asked of unlike copies."""
    types = {
        name: replace(device_type, memory_bytes=size << 10)
        for (name, device_type), size in zip(drawn.cluster.device_types.items(), sizes_kib, strict=False)
    }
    problem = Problem.of(replace(drawn.cluster, device_types=types), drawn.workload)
    pricing = _Pricing(problem)
    for split in pricing.splits():
        if not pricing.may_fit(split):
            assert simulate_plan(pricing.plan(split), problem.compute) is None, split


def test_with_the_memory_that_it_needs_a_split_may_fit() -> None:
    """Of four alike devices on a node. Seeded bug that it saw: a group counted as one rank, with messages and inputs
    of the whole sequence."""
    cluster = three_speeds()
    group = replace(cluster.node_groups[0], devices_per_node=4)
    problem = Problem.of(
        replace(cluster, node_groups=(group,), links=()), workload(tiny_model(layers=4, heads=8, kv_heads=8))
    )
    pricing, grouped = _Pricing(problem), 0
    for split in pricing.splits():
        layout = lay_out(pricing.plan(split))
        updates = own_by_strength(layout, problem.compute).updates
        needed = max(use.total for use in device_memory(problem.compute, layout, *updates).values())
        exact = with_memory(problem.cluster, needed)
        assert _Pricing(Problem.of(exact, problem.workload)).may_fit(split), split
        grouped += split.shape.degree > 1
    assert grouped > 10
