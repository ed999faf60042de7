"""A real Prometheus scrapes a running emulated job of three device types: every metric of the table is there, and every
expression of the boards and rules has an answer.

Seen to catch what no check of the text does: a quotient without group_left (the server refuses it), a misspelt value of
a label (no data), shares of a step whose whole had evaluation in it (0.89 of their prediction).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from hethub.telemetry.metrics import ACTIVITY_OF_KIND, LOST_CAUSES, METRICS
from tests.processes import until
from tests.telemetry.prometheus import ScrapedRun, quick_rules, scraped
from tests.telemetry.promql import (
    Expression,
    panel_expressions,
    rule_expressions,
    selectors,
    variable_expressions,
)

WINDOW = "20s"  # some of the run's steps
PANELS = panel_expressions()
RECORDED = [rule for name, rule in rule_expressions().items() if ":" in name]
ALERTS = [rule for name, rule in rule_expressions().items() if ":" not in name and "hethub_" not in name]
SENSED = {"hethub_device_power_watts", "hethub_device_temperature_celsius"}  # which emulated devices have not
GIVEN_BY_PROMETHEUS = {"__name__", "instance", "job"}


@pytest.fixture(scope="module")
def scraped_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScrapedRun]:
    folder = tmp_path_factory.mktemp("scraped")
    with scraped(folder, rules=quick_rules(folder / "rules")) as found:
        yield found


def answer(run: ScrapedRun, expression: Expression) -> list[tuple[dict[str, str], float]]:
    found = run.prometheus.query(expression.promql(run="run", window=WINDOW))
    return [(sample.labels, sample.value) for sample in found]


@pytest.mark.parametrize("expression", PANELS, ids=lambda expression: expression.place)
def test_every_panel_has_data_in_a_sane_range(scraped_run: ScrapedRun, expression: Expression) -> None:
    found = answer(scraped_run, expression)
    if any(name in expression.text for name in SENSED):
        assert not found  # test_exporters.py has samples of them
        return
    assert found
    low, high = RANGES.get(expression.title, RANGE_OF_UNIT[expression.unit])

    def is_sane() -> bool:
        now = answer(scraped_run, expression)
        return bool(now) and all(
            expression.labels <= labels.keys() and math.isfinite(value) and low <= value <= high
            for labels, value in now
        )

    # What a host that others kept busy did leaves the window with its seconds.
    until(is_sane, 60, f"{low} to {high}, at first {found}")


RANGE_OF_UNIT = {
    "percentunit": (0.0, 1.0),
    "none": (0.0, 1e3),
    "short": (0.0, 1e6),
    "string": (1.0, 1.0),
    "s": (0.0, 600.0),
    "dtdurations": (0.0, 1e7),
    "sci": (1e-8, 1.0),
    "bytes": (1.0, 1e9),
    "Bps": (0.0, 1e9),
    "watt": (1.0, 1e4),
    "joule": (1e-6, 1e6),
    "currencyUSD": (1e-9, 1e3),
}
# Measured over predicted: near 1, with room for a machine that does other things too.
RANGES = dict.fromkeys(
    (
        "Compute time over prediction, device by device",
        "Peak memory over prediction",
    ),
    (0.5, 2.0),
)
RANGES["Transfer time over prediction"] = (0.0, 10.0)  # a busy host keeps a message of some bytes far longer
RANGES["Busy share over its prediction, by stage"] = (0.7, 1.1)


@pytest.mark.parametrize("expression", variable_expressions(), ids=lambda expression: expression.place)
def test_every_variable_has_values(scraped_run: ScrapedRun, expression: Expression) -> None:
    found = answer(scraped_run, expression)
    assert found and all(expression.labels <= labels.keys() for labels, _ in found)


@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule.place)
def test_every_recorded_series_is_there(scraped_run: ScrapedRun, rule) -> None:
    recorded = scraped_run.prometheus.query(rule.place)
    assert recorded
    for sample in recorded:
        # Seconds beyond what was predicted may be fewer.
        least = -1.0 if "beyond" in rule.place else 0.0
        assert math.isfinite(sample.value) and least <= sample.value < 100, sample


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.place)
def test_every_series_that_an_alert_watches_is_there(scraped_run: ScrapedRun, rule) -> None:
    watched = selectors(rule.text)
    assert watched
    for selector in watched:
        assert scraped_run.prometheus.query(selector), selector


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.place)
def test_every_alert_can_be_asked_and_is_silent_in_a_healthy_run(scraped_run: ScrapedRun, rule) -> None:
    # A host that others keep busy for a while makes a run slower than these quick rules allow.
    until(lambda: answer(scraped_run, rule) == [], 60, f"{rule.place} is silent")


def test_alerts_are_loaded_and_none_fires(scraped_run: ScrapedRun) -> None:
    groups = scraped_run.prometheus.get("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {rule.place for rule in ALERTS} <= rules.keys()
    assert all(rule["health"] != "err" for rule in rules.values()), rules
    # The seconds in which agents start are minutes to rules that are so quick.
    until(lambda: not scraped_run.firing(), 60, f"alerts end: {scraped_run.firing()}")


@pytest.mark.parametrize("title", ["Where the time goes", "Busy and communication, by kind of action"])
def test_shares_of_time_are_the_whole(scraped_run: ScrapedRun, title: str) -> None:
    (panel,) = [each for each in PANELS if each.title == title]
    total = sum(value for _, value in answer(scraped_run, panel))
    assert total == pytest.approx(1.0, abs=0.01)


# -- metrics ------------------------------------------------------------------------------------------------------


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

    def agree() -> bool:
        per_token = server.value("sum(hethub_device_flops_total) / scalar(hethub_tokens_total)")
        mfu = server.value("hethub_mfu_ratio")
        speed = server.value("hethub_bound_share_ratio{bound='physical'}") * server.value(
            "hethub_bound_tokens_per_second{bound='physical'}"
        )
        peak = server.value("sum(hethub_device_peak_flops_per_second)")
        return bool(mfu * peak / speed == pytest.approx(per_token, rel=0.1))

    # Between two queries there may be a scrape, and a step that a busy host held up.
    until(agree, 60, "FLOPs of a token by the counters and by the gauges of the last step are within 10 %")
