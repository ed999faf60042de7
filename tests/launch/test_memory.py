"""What the tally of live storages counts, what a device out of memory says, and both against the cost model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hethub.cost.memory import device_memory
from hethub.launch.clock import Clock
from hethub.launch.devices import DeviceMemoryError, EmulatedDevice, StorageTally
from hethub.program.ownership import own
from hethub.simulate.engine import simulate
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.summary import step_seconds, summarize
from tests.launch.pool import Pool
from tests.plan_strategies import NAMED_PLANS, compile_plan, compute_model, three_speeds


def emulated(name: str) -> Plan:
    return NAMED_PLANS[name]("fp32").model_copy(update={"cluster": three_speeds(emulated=True)})


def tight(plan: Plan) -> Plan:
    """With `in_flight` as it happens: 1f1b's last stage takes each micro-batch back at once, whatever it may hold."""
    pipelines = []
    for pipeline in plan.pipelines:
        *rest, last = pipeline.stages
        held = pipeline.micro_batches if pipeline.schedule == "gpipe" else 1
        stages = [*rest, last.model_copy(update={"in_flight": held})]
        pipelines.append(pipeline.model_copy(update={"stages": stages}))
    return plan.model_copy(update={"pipelines": pipelines})


# -- the tally ----------------------------------------------------------------------------------------------


def test_a_storage_counts_once_however_many_tensors_view_it():
    tally = StorageTally(10_000, "device")
    whole = torch.zeros(100)
    keys = [tally.add(tensor) for tensor in (whole, whole[10:], whole.view(10, 10).T)]
    assert tally.live_bytes == 400
    for number, key in enumerate(keys):
        tally.drop(key, 400)
        assert tally.live_bytes == (0 if number == 2 else 400)
    assert tally.peak_bytes == 400


def test_saved_tensors_count_until_autograd_lets_go():
    tally = StorageTally(10_000, "device")
    weight = torch.ones(100, requires_grad=True)
    tally.add(weight)
    with tally.saving():
        result = (weight * 2).exp()  # keeps its output
    assert tally.live_bytes == 800
    result.sum().backward()
    del result
    assert (tally.live_bytes, tally.peak_bytes) == (400, 800)


def test_a_device_past_its_memory_names_itself_need_and_limit():
    device = EmulatedDevice(Clock(0.0), 1 << 20, "a/0/0 (fast, emulated)")
    device.tally.add(torch.zeros(1 << 17))
    with (
        pytest.raises(
            DeviceMemoryError,
            match=r"out of memory: 1\.50 MiB live, a/0/0 \(fast, emulated\) has 1\.00 MiB",
        ),
        device.tally.saving(),
    ):
        torch.zeros(1 << 18, requires_grad=True).exp()


# -- the cost model's figures -------------------------------------------------------------------------------

MEASURED = (
    "single device",
    "uneven pipeline of 3",
    "rows 3 + 1",
    "heads 6 + 2",
    "recompute full",
    "gpipe",
    "everything uneven at once",
)


@pytest.mark.parametrize("name", MEASURED)
def test_the_predicted_memory_holds_what_a_run_needs_and_little_more(pool: Pool, name: str) -> None:
    plan = tight(emulated(name))
    layout = lay_out(plan)
    ownership = own(layout)
    uses = device_memory(compute_model(plan), layout, ownership.owned_elements, ownership.incoming_elements)
    peaks = pool.train(plan, 2, held_out_rows=0, time_scale=1.0).peaks
    for device, peak in enumerate(peaks):
        if device not in uses:
            assert peak is None
            continue
        use = uses[device]
        # Message buffers and temporaries are predicted on top; the tally does not see them.
        lasting = use.weights + use.gradients + use.optimizer + use.activations
        assert 0.95 * lasting <= peak <= use.total, plan.cluster.devices()[device].name


def test_emulation_changes_the_time_and_not_the_training(pool: Pool) -> None:
    """A tensor-parallel group of unlike devices, which has one start and one deadline for each action."""
    plan, steps = emulated("heads 6 + 2"), 3
    trained = pool.train(plan, steps, held_out_rows=0, time_scale=50.0)
    real = pool.train(NAMED_PLANS["heads 6 + 2"]("fp32"), steps, held_out_rows=0)
    np.testing.assert_allclose(trained.losses, real.losses, rtol=1e-6)
    predicted = simulate(compile_plan(plan), compute_model(plan), steps=1).step_seconds
    assert step_seconds(trained.timeline).min() >= 0.999 * predicted
    for device in summarize(trained.timeline, 1, steps - 1):
        shares = (device.unaccounted_ratio, device.overrun_ratio, device.busy_ratio)
        assert all(0 <= share <= 1 for share in shares)
    busy = [d.busy_ratio for d in summarize(trained.timeline, 1, steps - 1) if d.actions]
    assert len(busy) == 2 and min(busy) > 0
