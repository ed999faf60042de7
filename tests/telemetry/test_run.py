"""What the driver keeps: by a clock that the test moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hethub.telemetry.metrics import METRICS, STEP_BUCKETS_SECONDS, Scope
from hethub.telemetry.run import PlanFacts, RunMetrics, StageFacts, StepTimes

SCALE = 4.0
STAGE = StageFacts(
    pipeline=0,
    stage=0,
    device_type="fast",
    layers="0-3",
    recompute="none",
    devices=2,
    predicted={"busy": 0.8, "idle": 0.2},
    peak_bytes=1000,
)
PLAN = PlanFacts(
    digest="0123456789abcdef",
    model="tiny",
    precision="fp32",
    objective="throughput",
    cluster="desk",
    emulated=True,
    devices=2,
    rows_per_step=8,
    tokens_per_step=128,
    model_flops_per_token=1e6,
    peak_flops_per_second=1e9,
    step_seconds=0.5,
    bounds={"homogeneous": None, "physical": 512.0},
    joules_per_token=0.1,
    usd_per_million_tokens=1000.0,
    stages=[STAGE, replace(STAGE, stage=1, device_type="slow")],
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def times(steps: int, seconds: float) -> StepTimes:
    buckets = [0.0] * (len(STEP_BUCKETS_SECONDS) + 1)
    buckets[6] = float(steps)
    return StepTimes(float(steps), seconds, buckets)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> RunMetrics:
    return RunMetrics("demo", run_id="1", steps=100, checkpoint_every=10, now=clock)


def served(metrics: RunMetrics) -> dict[tuple[str, ...], float]:
    """(sample, label values other than the run's) -> value."""
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "run")): sample.value
        for family in metrics.families()
        for sample in family.samples
    }


def test_every_metric_that_is_always_there_is_there_when_a_plan_begins(metrics: RunMetrics) -> None:
    metrics.plan(PLAN, time_scale=SCALE, attempt=1)
    names = {name.removesuffix("_count") for name, *_ in served(metrics)}
    wanted = {
        entry.name
        for entry in METRICS.values()
        if entry.scope in (Scope.RUN, Scope.STAGE, Scope.PROCESS) and not entry.optional
    }
    assert wanted <= names


def test_predictions_are_of_the_wall_clock(metrics: RunMetrics) -> None:
    metrics.plan(PLAN, time_scale=SCALE, attempt=1)
    found = served(metrics)
    assert found["hethub_predicted_step_seconds",] == 0.5 * SCALE
    assert found["hethub_predicted_tokens_per_second",] == 256 / SCALE
    assert found["hethub_bound_tokens_per_second", "physical"] == 512 / SCALE
    assert ("hethub_bound_tokens_per_second", "homogeneous") not in found


def test_steps_tokens_and_shares(metrics: RunMetrics, clock: Clock) -> None:
    metrics.plan(PLAN, time_scale=SCALE, attempt=1)
    clock.now += 30
    metrics.steps([(0, 5.0, 2.0)], 1e-3, times(1, 2.0))
    clock.now += 4
    metrics.steps([(1, 4.0, 1.0), (2, 3.0, 0.5)], 2e-3, times(3, 6.0))
    found = served(metrics)
    assert found["hethub_steps_total",] == found["hethub_run_step",] == 3
    assert found["hethub_tokens_total",] == 3 * 128
    assert found["hethub_samples_total",] == 3 * 8
    assert (found["hethub_loss",], found["hethub_gradient_norm",], found["hethub_learning_rate",]) == (
        3,
        0.5,
        2e-3,
    )
    # 2 steps in 4 s of wall time are 256 tokens in a modelled second
    assert found["hethub_bound_share_ratio", "physical"] == pytest.approx(256 / 512)
    assert found["hethub_mfu_ratio",] == pytest.approx(256 * 1e6 / 1e9)
    assert found["hethub_step_duration_seconds_count",] == 3
    assert found["hethub_step_duration_seconds_sum",] == 6.0
    # 1000 USD for a million tokens at 256 tokens/s: 0.256 USD a modelled second, of which 1.5 have passed
    assert found["hethub_cost_usd_total",] == pytest.approx(0.256 * 6.0 / SCALE)


def test_a_loss_that_is_no_number_is_served_as_none(metrics: RunMetrics) -> None:
    metrics.plan(PLAN, time_scale=1.0, attempt=1)
    metrics.steps([(0, math.nan, math.inf)], 1e-3, times(1, 2.0))
    found = served(metrics)
    assert math.isnan(found["hethub_loss",])
    assert found["hethub_gradient_norm",] == math.inf


def test_a_failure_before_the_first_step_is_time_of_the_start(metrics: RunMetrics, clock: Clock) -> None:
    """Seeded bug: it is counted twice."""
    metrics.plan(PLAN, time_scale=1.0, attempt=1)
    clock.now += 20
    metrics.failed("worker", restarts=True)
    clock.now += 10
    metrics.plan(PLAN, time_scale=1.0, attempt=2)
    metrics.recovered("worker", 10.0)
    metrics.steps([(0, 5.0, 2.0)], None, times(1, 2.0))
    found = served(metrics)
    assert found["hethub_lost_seconds_total", "start"] == 30
    assert found["hethub_lost_seconds_total", "worker"] == 0


def test_lost_time_by_cause_and_goodput(metrics: RunMetrics, clock: Clock) -> None:
    metrics.plan(PLAN, time_scale=1.0, attempt=1)
    assert served(metrics)["hethub_goodput_ratio",] == 0.0
    clock.now += 20
    metrics.steps([(0, 5.0, 2.0)], None, times(1, 2.0))
    metrics.checkpoint(1, seconds=3.0, stall_seconds=0.5)
    clock.now += 40
    metrics.failed("worker", restarts=True)
    assert served(metrics)["hethub_run_state", "recovering"] == 1
    clock.now += 20
    metrics.plan(PLAN, time_scale=1.0, attempt=2)
    metrics.state("training")
    metrics.recovered("worker", 19.5)
    clock.now += 20
    found = served(metrics)
    assert found["hethub_lost_seconds_total", "start"] == 20
    assert found["hethub_lost_seconds_total", "checkpoint"] == 0.5
    assert found["hethub_lost_seconds_total", "worker"] == 19.5
    assert found["hethub_lost_seconds_total", "stall"] == 0
    assert found["hethub_goodput_ratio",] == pytest.approx(1 - 40 / 100)
    assert found["hethub_faults_total", "worker"] == found["hethub_restarts_total",] == 1
    assert found["hethub_run_attempt",] == 2
    assert found["hethub_checkpoints_total", "made"] == 1
    assert found["hethub_checkpoint_last_success_step",] == 1
    assert found["hethub_checkpoint_last_success_timestamp_seconds",] == 1020


def test_the_run_is_in_one_state(metrics: RunMetrics) -> None:
    for state in METRICS["hethub_run_state"].values["state"]:
        metrics.state(state)
        found = served(metrics)
        states = {name[1]: value for name, value in found.items() if name[0] == "hethub_run_state"}
        assert states == {known: float(known == state) for known in states}
        assert len(states) == 7


def test_stages_of_the_plan_before_are_dropped(metrics: RunMetrics) -> None:
    metrics.plan(PLAN, time_scale=1.0, attempt=1)
    metrics.plan(replace(PLAN, digest="f" * 16, stages=[STAGE]), time_scale=1.0, attempt=2)
    found = served(metrics)
    assert ("hethub_stage_devices", "0", "0", "fast") in found
    assert ("hethub_stage_devices", "0", "1", "slow") not in found
    assert sum(name[0] == "hethub_run_info" for name in found) == 1


def test_unknown_peaks_and_prices_have_no_series(metrics: RunMetrics) -> None:
    plan = replace(PLAN, peak_flops_per_second=None, usd_per_million_tokens=None, joules_per_token=None)
    metrics.plan(plan, time_scale=1.0, attempt=1)
    metrics.steps([(0, 5.0, 2.0)], None, times(1, 2.0))
    metrics.steps([(1, 5.0, 2.0)], None, times(2, 4.0))
    names = {name for name, *_ in served(metrics)}
    assert not names & {
        "hethub_mfu_ratio",
        "hethub_cost_usd_total",
        "hethub_predicted_usd_per_million_tokens",
        "hethub_predicted_joules_per_token",
        "hethub_learning_rate",
    }
