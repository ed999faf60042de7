"""Compute prices: a roofline per operator, groups that wait for their slowest, rings for their sums."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.compute import ComputeModel, all_reduce_seconds, gradient_bytes, state_bytes
from hethub.cost.graph import CostGraph
from hethub.cost.shapes import (
    LayerKind,
    layer_parameters,
    layer_segments,
    model_flops_per_token,
    model_parameters,
)
from hethub.specs.layout import Share, lay_out
from hethub.specs.plan import Plan
from hethub.specs.workload import Model
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, compute_model, models, plans, three_speeds

KINDS: tuple[LayerKind, ...] = ("embedding", "decoder", "head")


def products(model: Model) -> int:
    """Elements of the matrices that every token is multiplied with: all but norms and the embedding table."""
    matrices = sum(p.shape[0] * p.shape[1] for p in model_parameters(model) if len(p.shape) == 2)
    return matrices if model.tied else matrices - model.vocab_size * model.hidden_size


@settings(max_examples=50, deadline=None)
@given(model=models(), seq=st.sampled_from([16, 128]))
def test_model_flops_are_six_a_weight_and_attention_twelve_a_position(model: Model, seq: int) -> None:
    attention = 12 * model.layers * model.heads * model.head_dim * seq
    assert model_flops_per_token(model, seq) == pytest.approx(6 * products(model) + attention)


def test_llama_7b_has_its_published_number_of_parameters() -> None:
    model = Model(
        name="llama-7b", hidden_size=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn_size=11008,
        vocab_size=32000, tied=False, rope_theta=1e4, norm_epsilon=1e-6, rope_scaling=None,
    )  # fmt: skip
    assert sum(p.shape[p.axis] * p.elements_per_index for p in model_parameters(model)) == 6_738_415_616
    assert len(layer_parameters(model, 1)) == 9


@settings(max_examples=100, deadline=None)
@given(model=models(), kind=st.sampled_from(KINDS), rows=st.integers(1, 20), device=st.integers(0, 5))
def test_more_rows_take_longer_but_never_longer_per_row(
    model: Model, kind: LayerKind, rows: int, device: int
) -> None:
    workload = replace(NAMED_PLANS["single device"]("fp32").workload, model=model)
    compute = ComputeModel(CostGraph(three_speeds()), workload)
    device_type = compute.graph.devices[device].type
    one, more = (compute.layer_seconds(device_type, kind, Share.whole(model), n) for n in (rows, rows + 1))
    assert more > one
    assert more / (rows + 1) <= one / rows * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(model=models(), kind=st.sampled_from(KINDS), rows=st.integers(1, 4))
def test_backward_is_twice_the_forward_and_the_sum_of_its_parts(
    model: Model, kind: LayerKind, rows: int
) -> None:
    forward, backward, inputs, weights = (
        [
            o
            for segment in layer_segments(model, kind, Share.whole(model), rows, seq=16, size=4, work=work)
            for o in segment.operations
        ]
        for work in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    )
    assert sum(o.flops for o in backward) == 2 * sum(o.flops for o in forward)
    assert sum(o.flops for o in inputs + weights) == sum(o.flops for o in backward)
    if kind != "embedding":
        assert sum(o.bytes for o in inputs + weights) == pytest.approx(sum(o.bytes for o in backward))


def test_an_operator_is_bound_by_the_slower_of_arithmetic_and_memory() -> None:
    """Ten times the arithmetic leaves memory-bound work as it is; ten times both is ten times as fast."""
    plan = NAMED_PLANS["single device"]("fp32")
    compute = compute_model(plan)
    device_type = compute.graph.devices[0].type
    peak = device_type.peak_flops_per_second["fp32"]
    bandwidth = device_type.memory_bandwidth_bytes_per_second
    whole = Share.whole(plan.workload.model)
    quick = replace(device_type, name="quick", peak_flops_per_second={"fp32": 10 * peak})
    both = replace(quick, name="both", memory_bandwidth_bytes_per_second=10 * bandwidth)
    slow, middle, fast = (compute.layer_seconds(t, "decoder", whole, 4) for t in (device_type, quick, both))
    assert fast == pytest.approx(slow / 10)
    assert fast < middle < slow
    embedding = [compute.layer_seconds(t, "embedding", whole, 4) for t in (device_type, quick)]
    assert embedding[0] == embedding[1]


def test_a_ring_takes_twice_its_members_less_one_steps_over_the_slowest_hop() -> None:
    graph = CostGraph(three_speeds())
    size = 3e6
    assert all_reduce_seconds(graph, [0], size) == 0
    assert all_reduce_seconds(graph, [0, 1], size) == pytest.approx(2 * graph.path(0, 1).seconds(size / 2))
    slowest = graph.path(1, 4).seconds(size / 3)
    assert all_reduce_seconds(graph, [0, 1, 4], size) == pytest.approx(4 * slowest)


@settings(max_examples=100, deadline=None)
@given(plan=plans())
def test_a_group_takes_its_slowest_member_segment_by_segment(plan: Plan) -> None:
    compute = compute_model(plan)
    for pipeline in lay_out(plan).pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                price = compute.group_price(replica.ranks, stage.layers, replica.rows[1], Kind.FORWARD)
                assert price.seconds >= max(price.busy_seconds) * (1 - 1e-12)
                if len(replica.ranks) == 1:
                    assert price.seconds == pytest.approx(price.busy_seconds[0])
                    assert all(s.collective_seconds == 0 for s in price.segments)
                else:
                    slowest = sum(max(s.member_seconds) for s in price.segments)
                    assert price.seconds > slowest


@pytest.mark.parametrize(
    ("precision", "gradient", "state"), [("fp64", 8, 16), ("fp32", 4, 8), ("bf16", 4, 12), ("fp16", 4, 12)]
)
def test_bytes_of_gradients_and_optimizer_state(precision: str, gradient: int, state: int) -> None:
    """Adam's two moments, and a master copy beside 16-bit weights."""
    assert gradient_bytes(precision) == gradient
    assert state_bytes(precision) == state


def test_a_tied_table_that_stands_twice_in_a_stage_is_held_once() -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp32")
    model = plan.workload.model
    compute = compute_model(plan)
    held = compute.stage_parameters(Share.whole(model), (0, model.layers + 2))
    assert held == sum(p.shape[p.axis] * p.elements_per_index for p in model_parameters(model))
