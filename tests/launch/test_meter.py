"""Workers count while they train: what their counters say is what the timeline says of the same steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hethub.cost.shapes import model_flops_per_token
from hethub.telemetry.agent import Agent
from hethub.telemetry.counters import FIELDS, CountersFile
from hethub.telemetry.describe import counters_file, model_flops, used_nodes
from hethub.telemetry.metrics import ACTIVITY_OF_KIND
from hethub.timeline.record import Kind
from hethub.timeline.summary import summarize
from tests.launch.pool import Pool, Trained
from tests.plan_strategies import NAMED_PLANS, compile_plan, six_plans

SHARES = ("busy", "recompute", "exposed_communication", "bubble", "unaccounted")
STEPS = 4
PLANS = six_plans()


def counted(folder: Path, trained: Trained, device: int) -> dict[str, float]:
    file = CountersFile(counters_file(folder, trained.task.graph.devices[device]))
    try:
        return dict(zip(FIELDS, file.read(), strict=False))
    finally:
        file.close()


def by_activity(counters: dict[str, float]) -> dict[str, float]:
    found = dict.fromkeys(ACTIVITY_OF_KIND.values(), 0.0)
    for kind, activity in ACTIVITY_OF_KIND.items():
        found[activity] += counters[f"seconds.{kind}"]
    return found


@pytest.mark.parametrize("time_scale", [None, 3.0])
@pytest.mark.parametrize("name", ["unequal stages", "unlike pipelines", "everything uneven"])
def test_counters_agree_with_the_timeline(
    pool: Pool, tmp_path: Path, name: str, time_scale: float | None
) -> None:
    """Every share but idle time to a thousandth: the timeline's window also holds what comes after a device's own end.

    Seen to fail with the sender's moment read at the end of the step, when the next step's message may have left.
    """
    trained = pool.train(
        PLANS[name], STEPS, time_scale=time_scale, telemetry=tmp_path, held_out_rows=0, read_in_place=False
    )
    scale = time_scale or 1.0
    summaries = summarize(trained.timeline, 0, STEPS - 1)
    for device in trained.program.layout.used:
        own, summary = counted(tmp_path, trained, device), summaries[device]
        seconds = by_activity(own)
        for share in SHARES:
            expected = getattr(summary, f"{share}_ratio") * summary.seconds * scale
            assert seconds[share] == pytest.approx(expected, abs=1e-3 * summary.seconds * scale), share
        assert sum(seconds.values()) == pytest.approx(own["step_seconds"], rel=1e-6)
        assert own["steps"] == STEPS
        assert sum(own[name] for name in FIELDS if name.startswith("step_bucket.")) == STEPS


def test_bytes_are_those_of_the_messages_received(pool: Pool, tmp_path: Path) -> None:
    trained = pool.train(
        PLANS["unlike pipelines"], STEPS, time_scale=3.0, telemetry=tmp_path, held_out_rows=0
    )
    records = trained.timeline.records
    received = int(records["bytes"][records["kind"] == Kind.RECEIVE].sum())
    series = Agent(tmp_path, used_nodes(trained.task.graph.devices)).series()
    assert series.total("hethub_link_bytes_total") == received
    taken = series.total("hethub_link_transfer_seconds_total")
    predicted = series.total("hethub_link_predicted_transfer_seconds_total")
    assert 0 < predicted < taken


def test_a_second_training_goes_on_counting(pool: Pool, tmp_path: Path) -> None:
    """As after a failure: the time between the two is nobody's work, and nothing begins at 0 again."""
    plan = PLANS["unequal stages"]
    pool.train(plan, 2, time_scale=3.0, telemetry=tmp_path, held_out_rows=0)
    trained = pool.train(plan, 2, time_scale=3.0, telemetry=tmp_path, held_out_rows=0)
    for device in trained.program.layout.used:
        own = counted(tmp_path, trained, device)
        assert own["steps"] == 4
        assert own["seconds.stalled"] > 0
        assert own["seconds.evaluation"] == 0


def test_evaluation_is_counted_apart(pool: Pool, tmp_path: Path) -> None:
    """The clock begins anew after an evaluation: what it skips is not training."""
    begin = time.monotonic()
    trained = pool.train(PLANS["one device"], 2, time_scale=3.0, telemetry=tmp_path, held_out_rows=0)
    (device,) = trained.program.layout.used
    before = counted(tmp_path, trained, device)
    now = time.monotonic()
    pool.call("start_clock", now, 3.0)
    after = counted(tmp_path, trained, device)
    assert before["seconds.evaluation"] == 0
    assert 0 < after["seconds.evaluation"] <= now - begin
    gap = after["heartbeat_unix_seconds"] - before["heartbeat_unix_seconds"]
    assert after["seconds.evaluation"] == pytest.approx(gap, abs=1e-3)
    pool.call("start_clock", now - 3600.0, 3.0)  # never less than nothing
    assert counted(tmp_path, trained, device)["seconds.evaluation"] == after["seconds.evaluation"]


@pytest.mark.parametrize("name", sorted(NAMED_PLANS))
def test_the_devices_flops_are_the_models(name: str) -> None:
    plan = NAMED_PLANS[name]("fp32")
    layout = compile_plan(plan).layout
    workload = plan.workload
    tokens = workload.global_batch * workload.sequence_length
    total = sum(model_flops(layout, workload, device) for device in layout.used)
    per_token = model_flops_per_token(workload.model, workload.sequence_length)
    assert total == pytest.approx(per_token * tokens, rel=1e-9)
