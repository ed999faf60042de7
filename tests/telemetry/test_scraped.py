"""A real Prometheus scrapes a running emulated job of three device types."""

from __future__ import annotations

from pathlib import Path

import pytest

from hethub.telemetry.metrics import ACTIVITY_OF_KIND, LOST_CAUSES, METRICS
from hethub.timeline.record import Timeline
from hethub.timeline.summary import summarize
from tests.telemetry.prometheus import ScrapedRun, scraped, until

SENSED = {
    "hethub_device_power_watts",
    "hethub_device_temperature_celsius",
}  # emulated devices have no sensors
GIVEN_BY_PROMETHEUS = {"__name__", "instance", "job"}


def sample_name(name: str) -> str:
    return f"{name}_count" if METRICS[name].kind == "histogram" else name


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_of_the_table_is_there_with_its_labels(scraped_run: ScrapedRun, name: str) -> None:
    found = scraped_run.prometheus.query(sample_name(name))
    assert bool(found) == (name not in SENSED)
    for sample in found:
        # To Prometheus an empty label is none: the uuid of a device that has no sensor.
        labels = set(sample.labels) | ({"uuid"} if name == "hethub_device_info" else set())
        assert labels - GIVEN_BY_PROMETHEUS == set(METRICS[name].label_names)


def test_nothing_is_served_that_is_not_in_the_table(scraped_run: ScrapedRun) -> None:
    known = {sample_name(name) for name in METRICS} | {
        f"{name}_{end}"
        for name, entry in METRICS.items()
        if entry.kind == "histogram"
        for end in ("sum", "bucket")
    }
    names = scraped_run.prometheus.get("label/__name__/values")
    assert {name for name in names if name.startswith("hethub_")} == known - SENSED


def test_every_kind_and_cause_has_a_series_from_the_start(scraped_run: ScrapedRun) -> None:
    server = scraped_run.prometheus
    assert server.value("count(count by (kind) (hethub_device_seconds_total))") == len(ACTIVITY_OF_KIND)
    assert server.value("count(hethub_lost_seconds_total)") == len(LOST_CAUSES)


def test_a_devices_seconds_are_all_of_its_time(scraped_run: ScrapedRun) -> None:
    """Between two scrapes they grow by as much as the moment up to which they are counted."""
    server = scraped_run.prometheus
    grown = server.query(
        "sum by (node, device) (hethub_device_seconds_total - hethub_device_seconds_total offset 6s)"
        " / sum by (node, device) (hethub_device_heartbeat_timestamp_seconds"
        " - hethub_device_heartbeat_timestamp_seconds offset 6s)"
    )
    assert len(grown) == 5
    for sample in grown:
        assert sample.value == pytest.approx(1.0, abs=0.01), sample


def test_ratios_lie_between_0_and_1(scraped_run: ScrapedRun) -> None:
    names = [name for name, entry in METRICS.items() if entry.unit == "ratio" and "time_scale" not in name]
    assert names
    for name in names:
        for sample in scraped_run.prometheus.query(name):
            assert 0 <= sample.value <= 1, sample
    shares = scraped_run.prometheus.query(
        "sum by (pipeline, stage, device_type) (hethub_stage_predicted_ratio)"
    )
    assert [sample.value for sample in shares] == pytest.approx([1.0] * len(shares))


def test_flops_are_the_models_for_every_token(scraped_run: ScrapedRun) -> None:
    """Devices count alike: each has done as many steps' FLOPs of its part, give or take the step that is going on."""
    server = scraped_run.prometheus
    per_token = server.value("sum(hethub_device_flops_total) / scalar(hethub_tokens_total)")
    mfu = server.value("hethub_mfu_ratio")
    speed = server.value("hethub_bound_share_ratio{bound='physical'}") * server.value(
        "hethub_bound_tokens_per_second{bound='physical'}"
    )
    peak = server.value("sum(hethub_device_peak_flops_per_second)")
    assert mfu * peak / speed == pytest.approx(per_token, rel=0.1)


def test_a_failure_is_counted_with_its_cause_and_its_cost(tmp_path: Path) -> None:
    """A worker is killed: a fault, a restart, lost seconds of that cause alone; devices have stalled meanwhile."""
    fault = {"device": "c/0/1", "step": 4, "action": 2, "do": "kill"}
    policy = {"restart": "same", "max_restarts": 1}
    with scraped(tmp_path, steps=8, fault=fault, on_failure=policy) as run:
        server = run.prometheus
        assert server.value("hethub_faults_total{kind='worker'}") == 1
        assert server.value("sum(hethub_faults_total)") == server.value("hethub_restarts_total") == 1
        assert server.value("hethub_run_attempt") == 2
        assert server.value("hethub_lost_seconds_total{cause='worker'}") > 0
        assert server.value("sum(hethub_lost_seconds_total{cause!~'worker|start|checkpoint'})") == 0
        stalled = server.query("hethub_device_seconds_total{kind='stalled'}")
        assert [sample.value > 0 for sample in stalled] == [True] * 5
        assert 0 < server.value("hethub_goodput_ratio") < 1


def test_utilization_is_the_timelines(tmp_path: Path) -> None:
    """Of a whole run, to a hundredth: what Prometheus has when all steps are done, and what the run folder says.

    Evaluation after the last step gives it the time to see them all.
    """
    steps = 10
    evaluation = {"every": steps, "rows": 100}
    with scraped(tmp_path, steps=steps, evaluate=evaluation, checkpoint=None, last=steps) as run:
        server = run.prometheus
        # Devices end their last step one after the other, and are scraped a second later.
        settled = (
            "max(hethub_device_heartbeat_timestamp_seconds"
            " - hethub_device_heartbeat_timestamp_seconds offset 2s) == 0"
            " and on () hethub_run_state{state='evaluating'} == 1"
        )
        until(lambda: bool(server.query(settled)), 60, "all is counted while the last evaluation goes on")
        counted = {
            (f"{sample.labels['node']}/{sample.labels['device']}", sample.labels["activity"]): sample.value
            for sample in server.query("sum by (node, device, activity) (hethub_device_seconds_total)")
        }
        scale = server.value("hethub_time_scale_ratio")
        result = run.launch.end()
    assert result.exit_code == 0, result.err
    timeline = Timeline.load(run.run / "measured.npz")
    for summary in summarize(timeline, 0, steps - 1):
        for share in ("busy", "exposed_communication", "bubble", "unaccounted"):
            expected = getattr(summary, f"{share}_ratio") * summary.seconds * scale
            assert counted[summary.device, share] == pytest.approx(
                expected, abs=0.01 * summary.seconds * scale
            )
