"""A real Prometheus scrapes a running emulated job of three device types."""

from __future__ import annotations

import pytest

from hethub.telemetry.metrics import ACTIVITY_OF_KIND, LOST_CAUSES, METRICS
from tests.telemetry.prometheus import ScrapedRun

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
