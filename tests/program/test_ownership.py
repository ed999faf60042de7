"""The ownership table: every element held where the plan says, summed once, updated once."""

import math
from collections import defaultdict

import pytest
from hypothesis import given, settings

from hethub.cost.shapes import Parameter
from hethub.program.ownership import Ownership, own
from hethub.specs.layout import Layout, Span, lay_out
from hethub.specs.plan import Plan
from tests.plan_strategies import NAMED_PLANS, plans


def held(layout: Layout, parameter: Parameter) -> dict[int, Span]:
    """Device -> span of the cut axis, from the layout alone."""
    spans: dict[int, Span] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            if not any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers):
                continue
            for replica in stage.replicas:
                for rank in replica.ranks:
                    whole = (0, parameter.shape[parameter.axis])
                    start, stop = whole if parameter.cut == "none" else getattr(rank.share, parameter.cut)
                    unit = 1 if parameter.cut == "none" else parameter.unit
                    spans[rank.device] = (start * unit, stop * unit)
    return spans


def rows_at(layout: Layout, device: int, layer: int) -> int:
    """Rows of the global batch whose gradient a device computes for a layer."""
    rows = 0
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                here = stage.layers[0] <= layer < stage.layers[1]
                if here and any(rank.device == device for rank in replica.ranks):
                    rows += pipeline.micro_batches * (replica.rows[1] - replica.rows[0])
    return rows


def tables(plan: Plan) -> tuple[Layout, Ownership]:
    layout = lay_out(plan)
    return layout, own(layout)


@settings(max_examples=100)
@given(plan=plans())
def test_slices_partition_every_parameter(plan: Plan) -> None:
    _, table = tables(plan)
    at: dict[int, int] = defaultdict(int)
    for entry in table.slices:
        parameter = table.parameters[entry.parameter]
        assert entry.start == at[entry.parameter] < entry.stop
        assert entry.elements * parameter.shape[parameter.axis] == (entry.stop - entry.start) * math.prod(
            parameter.shape
        )
        at[entry.parameter] = entry.stop
    assert dict(at) == {i: p.shape[p.axis] for i, p in enumerate(table.parameters)}


@settings(max_examples=100)
@given(plan=plans())
def test_holders_hold_exactly_their_span_and_one_of_them_updates(plan: Plan) -> None:
    layout, table = tables(plan)
    spans = [held(layout, parameter) for parameter in table.parameters]
    for entry in table.slices:
        inside = [d for d, (a, b) in spans[entry.parameter].items() if a <= entry.start and entry.stop <= b]
        touching = [d for d, (a, b) in spans[entry.parameter].items() if a < entry.stop and entry.start < b]
        assert sorted(inside) == sorted(touching) == list(entry.holders)
        assert entry.updater in entry.holders
    assert sum(table.owned_elements.values()) == sum(math.prod(p.shape) for p in table.parameters)


@settings(max_examples=100)
@given(plan=plans())
def test_holders_sum_every_row_of_the_batch_at_each_place(plan: Plan) -> None:
    """Once for each replica; a norm weight, which every member of a group holds for its own tokens, once a member."""
    layout, table = tables(plan)
    for entry in table.slices:
        for layer in table.parameters[entry.parameter].layers:
            rows = sum(rows_at(layout, device, layer) for device in entry.holders)
            members = rows / plan.workload.global_batch
            assert members == 1 or table.parameters[entry.parameter].cut == "none"


@settings(max_examples=50)
@given(plan=plans())
def test_routes_carry_each_gradient_in_and_each_weight_out(plan: Plan) -> None:
    _, table = tables(plan)
    gradients = {(d, n) for (d, _), numbers in table.gradient_routes.items() for n in numbers}
    weights = {(d, n) for (_, d), numbers in table.weight_routes.items() for n in numbers}
    for number, entry in enumerate(table.slices):
        assert {d for d, n in gradients if n == number} == set(entry.holders) - {entry.updater}
        assert {d for d, n in weights if n == number} == set(entry.holders) - {entry.updater}
    assert all(one != other for one, other in [*table.gradient_routes, *table.weight_routes])


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_the_table_depends_on_the_plan_only(name: str) -> None:
    plan = NAMED_PLANS[name]("fp32")
    assert own(lay_out(plan)).slices == own(lay_out(plan)).slices


def test_a_tied_table_is_one_parameter_held_at_both_ends() -> None:
    layout, table = tables(NAMED_PLANS["tied embedding on the first and last stage"]("fp32"))
    names = [parameter.name for parameter in table.parameters]
    assert "lm_head.weight" not in names
    tied = [entry for entry in table.slices if names[entry.parameter] == "model.embed_tokens.weight"]
    ends = {layout.pipelines[0].stages[i].replicas[0].ranks[0].device for i in (0, 2)}
    assert {entry.holders for entry in tied} == {tuple(sorted(ends))}
