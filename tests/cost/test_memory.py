"""Predicted memory: what each purpose takes, and how it moves with the plan."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.cost.memory import MemoryUse, device_memory, usable_bytes
from hethub.cost.shapes import model_parameters
from hethub.program.ownership import own
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from tests.plan_strategies import NAMED_PLANS, compute_model, plans


def memory(plan: Plan) -> dict[int, MemoryUse]:
    layout = lay_out(plan)
    return device_memory(compute_model(plan), layout, own(layout).owned_elements)


def parameters(plan: Plan) -> int:
    return sum(p.shape[p.axis] * p.elements_per_index for p in model_parameters(plan.workload.model))


def with_stage(plan: Plan, **changes: object) -> Plan:
    """All stages of the plan's pipelines changed alike."""
    pipelines = [
        p.model_copy(update={"stages": [stage.model_copy(update=changes) for stage in p.stages]})
        for p in plan.pipelines
    ]
    return plan.model_copy(update={"pipelines": pipelines})


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp64", 8)])
def test_one_device_holds_weights_gradients_and_two_moments(precision: str, width: int) -> None:
    plan = NAMED_PLANS["single device"](precision)
    (use,) = memory(plan).values()
    assert (use.weights, use.gradients, use.optimizer) == tuple(
        k * width * parameters(plan) for k in (1, 1, 2)
    )
    assert use.buffers == 0  # nothing comes from or goes to another stage


def test_sixteen_bit_weights_have_a_master_copy_in_the_optimizer() -> None:
    plan = NAMED_PLANS["single device"]("bf16")
    cluster = plan.cluster
    types = {n: replace(t, peak_flops_per_second={"bf16": 1e9}) for n, t in cluster.device_types.items()}
    (use,) = memory(plan.model_copy(update={"cluster": replace(cluster, device_types=types)})).values()
    assert (use.weights, use.gradients, use.optimizer) == tuple(k * parameters(plan) for k in (2, 4, 12))


@settings(max_examples=50, deadline=None)
@given(plan=plans())
def test_optimizer_state_exists_once_in_the_whole_cluster(plan: Plan) -> None:
    assert sum(use.optimizer for use in memory(plan).values()) == 8 * parameters(plan)


@settings(max_examples=50, deadline=None)
@given(plan=plans())
def test_without_the_table_every_holder_counts_as_updater(plan: Plan) -> None:
    upper = device_memory(compute_model(plan), lay_out(plan))
    for device, use in memory(plan).items():
        assert upper[device].optimizer >= use.optimizer
        assert upper[device].total >= use.total
        assert 2 * use.gradients == upper[device].optimizer


def test_activations_grow_with_micro_batches_in_flight() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    one, two, four = (memory(with_stage(plan, in_flight=n))[0].activations for n in (1, 2, 4))
    assert (two, four) == (2 * one, 4 * one)
    assert memory(with_stage(plan, in_flight=9))[0].activations == four  # there are only four micro-batches


def test_recomputation_keeps_inputs_only() -> None:
    plan = NAMED_PLANS["deep and narrow: a stage per layer"]("fp32")
    kept, again = (memory(with_stage(plan, recompute=r)) for r in ("none", "full"))
    middle = 1  # the device of stage 1, a decoder
    assert again[middle].activations < kept[middle].activations / 2
    assert again[middle].weights == kept[middle].weights


def test_a_tensor_parallel_group_divides_what_one_device_would_hold() -> None:
    plan = NAMED_PLANS["heads 6 + 2"]("fp32")
    large, small = (memory(plan)[device] for device in lay_out(plan).used)
    assert large.weights > 2 * small.weights
    norms = 4 * (2 * plan.workload.model.layers + 1) * plan.workload.model.hidden_size
    assert large.weights + small.weights == 4 * parameters(plan) + norms  # each holds all norms


def test_a_device_in_two_stages_holds_both() -> None:
    plan = NAMED_PLANS["chunks: one device in stages 0 and 2"]("fp32")
    twice, once = (memory(plan)[device] for device in lay_out(plan).used)
    assert twice.weights + once.weights == 4 * parameters(plan)
    assert twice.weights > once.weights


def test_reduction_comes_when_activations_are_gone() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    layout, compute = lay_out(plan), compute_model(plan)
    (plain,) = device_memory(compute, layout).values()
    hidden = plain.activations + plain.buffers + plain.workspace
    (less,) = device_memory(compute, layout, incoming_elements={0: hidden // 4}).values()
    (more,) = device_memory(compute, layout, incoming_elements={0: hidden // 4 + 250}).values()
    assert less.total == plain.total
    assert more.total == plain.total + 1000


def test_the_reserve_is_not_for_plans() -> None:
    device_type = NAMED_PLANS["single device"]("fp32").cluster.device_types["fast"]
    assert usable_bytes(replace(device_type, memory_bytes=1000, memory_reserve_bytes=300)) == 700
