"""Predicted memory: what each purpose takes, and how it moves with the plan."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.cost.memory import MemoryUse, RankShape, device_memory, layer_bytes, stage_bytes, usable_bytes
from hethub.cost.shapes import model_parameters
from hethub.planners.shares import even_shares
from hethub.program.ownership import own
from hethub.specs.layout import Share, lay_out
from hethub.specs.plan import Plan
from tests.plan_strategies import NAMED_PLANS, compute_model, plans, tiny_model


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


def on_accelerators(plan: Plan) -> Plan:
    """The plan on devices that messages must be copied to."""
    cluster = plan.cluster
    types = {name: replace(t, vendor="nvidia") for name, t in cluster.device_types.items()}
    return plan.model_copy(update={"cluster": replace(cluster, device_types=types)})


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


@settings(max_examples=50)
@given(plan=plans())
def test_optimizer_state_exists_once_in_the_whole_cluster(plan: Plan) -> None:
    """Two moments of every element, and where slices of a matrix do not lie in one piece a copy of master and gradient
    of those that are cut inside."""
    state = sum(use.optimizer for use in memory(plan).values())
    assert 8 * parameters(plan) <= state <= 2 * 8 * parameters(plan)


@settings(max_examples=50)
@given(plan=plans())
def test_without_the_table_every_holder_counts_as_updater(plan: Plan) -> None:
    upper = device_memory(compute_model(plan), lay_out(plan))
    for device, use in memory(plan).items():
        assert 2 * use.gradients == upper[device].optimizer
        assert upper[device].total == replace(use, optimizer=2 * use.gradients).total


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


def test_reduction_comes_beside_the_last_micro_batch() -> None:
    """With four micro-batches in flight, gradients may take the room of three."""
    plan = on_accelerators(with_stage(NAMED_PLANS["single device"]("fp32"), in_flight=4))
    layout, compute = lay_out(plan), compute_model(plan)

    def use(incoming: int) -> MemoryUse:
        elements = parameters(plan)
        return device_memory(compute, layout, {0: elements}, {0: incoming})[0]

    plain = use(0)
    assert plain.activations == 4 * plain.one
    room = 3 * plain.one // 4  # elements of fp32
    assert use(room).total == plain.total
    assert use(room + 250).total == plain.total + 1000


def test_new_weights_count_where_others_update_most() -> None:
    plan = on_accelerators(NAMED_PLANS["single device"]("fp32"))
    ((use),) = device_memory(compute_model(plan), lay_out(plan), {0: 0}, {0: 0}).values()
    assert use.reduction == use.weights


def test_a_host_has_buffers_for_what_comes_and_what_goes() -> None:
    """Of all elements it updates a quarter, whose gradients come from one other holder: the new weights wait to be
    answered all through the step, the others' gradients and weights only beside the last micro-batch."""
    plan = NAMED_PLANS["single device"]("fp32")
    elements = parameters(plan)
    mine = elements // 4
    (use,) = device_memory(compute_model(plan), lay_out(plan), {0: mine}, {0: mine}).values()
    assert use.buffers == 4 * mine
    assert use.reduction == 4 * mine + 2 * 4 * (elements - mine)


@pytest.mark.parametrize(("ways", "stage"), [(1, 0), (2, 1), (1, 2)])
def test_on_a_host_every_micro_batch_has_messages_that_wait_for_an_answer(ways: int, stage: int) -> None:
    plan = NAMED_PLANS["uneven pipeline of 3"]("fp32")
    device = lay_out(plan).used[stage]
    host, accelerator = (memory(p)[device] for p in (plan, on_accelerators(plan)))
    boundary = plan.pipelines[0].micro_batch_rows * plan.workload.sequence_length * 16 * 4
    held = plan.pipelines[0].stages[stage].in_flight
    assert host.activations - accelerator.activations == held * ways * boundary
    assert accelerator.buffers - host.buffers == ways * boundary


@pytest.mark.parametrize("tokens_of_shard", [8, 0])
def test_a_member_keeps_its_shard_of_what_lies_between_blocks(tokens_of_shard: int) -> None:
    """And of what it gathered the whole. The fifth member of five has none of a row's 16 tokens: 4 + 4 + 4 + 4."""
    model = tiny_model(heads=8, kv_heads=8)
    workload = replace(NAMED_PLANS["single device"]("fp32").workload, model=model)
    members, member = (2, 1) if tokens_of_shard else (5, 4)
    shape = RankShape(workload, even_shares(model, 2)[0], 4, 4, members, member)
    assert shape.shard_tokens == 4 * tokens_of_shard
    alone = layer_bytes(replace(shape, members=1, member=0), "decoder")
    shared = layer_bytes(shape, "decoder")
    less = (shape.tokens - shape.shard_tokens) * 2 * (model.hidden_size * 4 + 4)
    assert shared.kept == alone.kept - less + 2 * shape.tokens * model.hidden_size * 4


def test_recompute_modes_keep_less_and_make_the_same_again() -> None:
    workload = NAMED_PLANS["single device"]("fp32").workload
    model = workload.model
    shape = RankShape(workload, Share.whole(model), 2, 4)
    none, selective, full = (stage_bytes(shape, (1, 4), mode) for mode in ("none", "selective", "full"))
    assert none.again == 0 and none.kept == selective.kept + selective.again == full.kept + full.again
    assert selective.again == 3 * shape.tokens * (model.heads * model.head_dim + model.heads) * 4
    assert full.kept == full.entry == shape.tokens * model.hidden_size * 4


def test_a_split_backward_holds_its_deferred_products() -> None:
    """They are more than what was kept: the output gradients come on top."""
    plan = NAMED_PLANS["single device"]("fp32")
    split = plan.model_copy(
        update={"pipelines": [plan.pipelines[0].model_copy(update={"schedule": "zb-h1"})]}
    )
    shape = RankShape(plan.workload, Share.whole(plan.workload.model), 2, 4)
    found = stage_bytes(shape, (0, 5), "none")
    whole, apart = (memory(p)[0] for p in (plan, split))
    held = plan.pipelines[0].stages[0].in_flight
    assert found.stash > found.kept
    beside = stage_bytes(shape, (0, 5), "full").kept  # tokens and targets
    assert apart.activations - whole.activations == held * (found.stash + beside - found.kept)
    one = plan.model_copy(
        update={"pipelines": [plan.pipelines[0].model_copy(update={"schedule": "1f1b-split"})]}
    )
    assert memory(one)[0].activations - whole.activations == found.stash + beside - found.kept


def test_the_head_holds_a_chunk_of_logits_and_no_more() -> None:
    workload = NAMED_PLANS["single device"]("fp32").workload
    model = replace(workload.model, vocab_size=10**6)
    shape = RankShape(replace(workload, model=model), Share.whole(model), 2, 4)
    found = layer_bytes(shape, "head")
    assert found.kept == shape.tokens * model.hidden_size * 4 + 8  # and the loss
    assert 16e6 <= found.forward_workspace <= 2**22 * 4 + 10_000


def test_the_reserve_is_not_for_plans() -> None:
    device_type = NAMED_PLANS["single device"]("fp32").cluster.device_types["fast"]
    assert usable_bytes(replace(device_type, memory_bytes=1000, memory_reserve_bytes=300)) == 700
