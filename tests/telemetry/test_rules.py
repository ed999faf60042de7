"""The shipped rules, by promtool: each alert fires in the run that it is for, and in no other."""

from __future__ import annotations

import re
from dataclasses import dataclass

import promql_parser
import pytest
import yaml

from hethub.telemetry.alerts import RUNBOOK, alerts
from hethub.telemetry.rule_files import alert_file, recording_file
from hethub.telemetry.rules import Durations
from tests.telemetry.promql import (
    ROOT,
    RULES,
    labels_of,
    needs_promtool,
    promtool,
    recorded_labels,
    rule_expressions,
)

ALERTS = alerts(Durations())
DEVICE = 'run="r", node="a/0", device="1", device_type="fast"'
LINK = 'run="r", node="b/0", link="a-b", transport="host-staged"'
HEALTHY = {  # a run as planned, two hours of it, sampled every 30 s; three steps between two samples
    'up{job="hethub", instance="one"}': "1x240",
    'hethub_run_state{run="r", state="training"}': "1x240",
    'hethub_run_state{run="r", state="evaluating"}': "0x240",
    'hethub_last_step_timestamp_seconds{run="r"}': "0+30x240",
    'hethub_predicted_step_seconds{run="r"}': "10x240",
    'hethub_step_duration_seconds_sum{run="r"}': "0+30x240",
    'hethub_step_duration_seconds_count{run="r"}': "0+3x240",
    f"hethub_device_compute_seconds_total{{{DEVICE}}}": "0+20x240",
    f"hethub_device_predicted_compute_seconds_total{{{DEVICE}}}": "0+20x240",
    f"hethub_link_transfer_seconds_total{{{LINK}}}": "0+2x240",
    f"hethub_link_predicted_transfer_seconds_total{{{LINK}}}": "0+2x240",
    'hethub_loss{run="r"}': "3x240",
    'hethub_faults_total{run="r", kind="not-a-number"}': "0x240",
    'hethub_run_step{run="r"}': "0+3x240",
    'hethub_steps_total{run="r"}': "0+3x240",
    'hethub_checkpoint_last_success_step{run="r"}': "0+3x240",
    'hethub_checkpoint_interval_steps{run="r"}': "20x240",
    'hethub_lost_seconds_total{run="r", cause="start"}': "90x240",
    'hethub_lost_seconds_total{run="r", cause="worker"}': "0x240",
    f"hethub_device_memory_peak_bytes{{{DEVICE}}}": "96x240",
    f"hethub_device_memory_limit_bytes{{{DEVICE}}}": "100x240",
    f"hethub_device_predicted_memory_bytes{{{DEVICE}}}": "96x240",
    'hethub_restarts_total{run="r"}': "0x240",
    'hethub_node_devices{run="r", node="a/0"}': "2x240",
}


@dataclass(frozen=True, slots=True)
class Case:
    """What differs from a healthy run, the time to look, and the one alert that then fires."""

    alert: str
    at: str
    series: dict[str, str]
    fires: bool


def case(alert, at, series, fires=True):
    changed = {}
    for start, values in series.items():
        (name,) = [name for name in HEALTHY if name.startswith(start)]
        changed[name] = values
    return Case(alert, at, changed, fires)


SLOW = "hethub_step_duration_seconds_sum"
PEAK, PREDICTED = "hethub_device_memory_peak_bytes", "hethub_device_predicted_memory_bytes"
LAST = "hethub_last_step"
TRAINING, EVALUATING = (
    'hethub_run_state{run="r", state="training"}',
    'hethub_run_state{run="r", state="evaluating"}',
)
COMPUTE = "hethub_device_compute"
TRANSFER = "hethub_link_transfer"
SAVED = "hethub_checkpoint_last_success_step"
LOST = 'hethub_lost_seconds_total{run="r", cause="worker"}'
CASES = [
    case("NoProgress", "3m", {LAST: "0x240"}),
    case("NoProgress", "90s", {LAST: "0x240"}, fires=False),  # not ten steps yet
    case("NoProgress", "9m", {LAST: "0x240", "hethub_predicted_step": "60x240"}, fires=False),
    case("NoProgress", "9m", {LAST: "0x240", TRAINING: "0x240", EVALUATING: "1x240"}, fires=False),
    case("NoProgress", "12m", {LAST: "0x240", TRAINING: "0x240", EVALUATING: "1x240"}),
    case("RunSlowerThanPredicted", "25m", {SLOW: "0+37x240"}),
    case("RunSlowerThanPredicted", "25m", {SLOW: "0+35x240"}, fires=False),
    case("RunSlowerThanPredicted", "12m", {SLOW: "0+37x240"}, fires=False),  # not long enough
    case("DeviceSlowerThanItsPrediction", "25m", {COMPUTE: "0+27x240"}),
    case("DeviceSlowerThanItsPrediction", "25m", {COMPUTE: "0+40x240", SLOW: "0+60x240"}),
    case("DeviceSlowerThanItsPrediction", "25m", {COMPUTE: "0+25x240"}, fires=False),
    case(
        "DeviceSlowerThanItsPrediction",
        "25m",
        {COMPUTE: "0+2x240", "hethub_device_predicted_compute": "0+1x240"},
        fires=False,
    ),  # it has next to nothing to do
    case("DeviceSlowerThanItsPrediction", "8m", {COMPUTE: "0+27x240"}, fires=False),
    case("LinkSlow", "25m", {TRANSFER: "0+4.2x240"}),
    case("LinkSlow", "25m", {TRANSFER: "0+8x240", SLOW: "0+60x240"}),
    case("LinkSlow", "25m", {TRANSFER: "0+3.8x240"}, fires=False),
    case(
        "LinkSlow",
        "25m",
        {TRANSFER: "0+0.4x240", "hethub_link_predicted": "0+0.1x240"},
        fires=False,
    ),  # of small messages
    case("LinkSlow", "8m", {TRANSFER: "0+4.2x240"}, fires=False),
    case("LossNotFinite", "10m", {"hethub_loss": "3x18" + " NaN" * 200}),
    case("LossNotFinite", "10m", {"hethub_loss": "3x18" + " Inf" * 200}),
    case("LossNotFinite", "10m", {"hethub_faults": "0x15 1x200"}),
    case("LossNotFinite", "10m", {"hethub_loss": "30000x240"}, fires=False),
    case("LossNotFinite", "30m", {"hethub_faults": "0x15 1x200"}, fires=False),  # long ago
    case("CheckpointTooOld", "12m", {SAVED: "0x240"}),
    case("CheckpointTooOld", "12m", {SAVED: "_x240"}),  # none was ever made
    case("CheckpointTooOld", "10m", {SAVED: "0x240"}, fires=False),
    case("CheckpointTooOld", "30m", {SAVED: "0x240", "hethub_checkpoint_interval": "_x240"}, fires=False),
    case("GoodputLow", "100m", {LOST: "0+3.6x240"}),
    case("GoodputLow", "100m", {LOST: "0+2.4x240"}, fires=False),
    case(
        "GoodputLow", "100m", {'hethub_lost_seconds_total{run="r", cause="start"}': "0+20x240"}, fires=False
    ),
    case("MemoryNearLimit", "10m", {PEAK: "96x240", PREDICTED: "90x240"}),
    case("MemoryNearLimit", "10m", {PEAK: "99x240", PREDICTED: "98.5x240"}, fires=False),  # as planned
    case("MemoryNearLimit", "10m", {PEAK: "94x240", PREDICTED: "80x240"}, fires=False),
    case("MemoryNearLimit", "4m", {PEAK: "96x240", PREDICTED: "90x240"}, fires=False),
    case("RestartLoop", "40m", {"hethub_restarts": "0x20 1x9 2x9 3x9 4x200"}),
    case("RestartLoop", "40m", {"hethub_restarts": "0x20 1x9 2x9 3x200"}, fires=False),
    case(
        "RestartLoop", "110m", {"hethub_restarts": "0x20 1x59 2x59 3x29 4x200"}, fires=False
    ),  # days between
    case("TargetMissing", "10m", {"up": "1x10 0x200"}),
    case("TargetMissing", "10m", {"hethub_node_devices": "2x8 stale"}),
    case("TargetMissing", "6m", {"up": "1x10 0x200"}, fires=False),
    case(
        "TargetMissing",
        "10m",
        {"hethub_node_devices": "2x8 stale", TRAINING: "0x240", EVALUATING: "1x240"},
        fires=False,
    ),  # it ended
]


def _samples(at):
    """How many samples it is until then: more would only take time."""
    return round(promql_parser.parse_duration(at).total_seconds() / 30) + 1


def judged(folder, cases, change=lambda text: text):
    """What promtool says of these cases, with the alert rules changed so."""
    (folder / "recording.yaml").write_text(recording_file(Durations()))
    (folder / "alerts.yaml").write_text(change(alert_file(Durations())))
    tests = [
        {
            "name": f"{each.alert} {'fires' if each.fires else 'is silent'}, {each.at}, {each.series}",
            "interval": "30s",
            "input_series": [
                {"series": name, "values": values.replace("x240", f"x{_samples(each.at)}")}
                for name, values in (HEALTHY | each.series).items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": each.at,
                    "exp_samples": [{"labels": f'{{alertname="{each.alert}"}}', "value": 1}]
                    if each.fires
                    else [],
                }
            ],
        }
        for each in cases
    ]
    document = {"rule_files": ["recording.yaml", "alerts.yaml"], "evaluation_interval": "30s", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(document))
    return promtool("test", "rules", "tests.yaml", folder=folder)


@needs_promtool
def test_prometheus_takes_the_shipped_rules(tmp_path):
    answer = promtool("check", "rules", "--lint-fatal", *RULES, folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_promtool
def test_each_alert_fires_in_its_run_and_in_no_other(tmp_path):
    answer = judged(tmp_path, CASES)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_each_alert_has_a_run_in_which_it_fires_and_one_in_which_it_is_silent():
    assert len(ALERTS) == 10
    for fires in (True, False):
        assert {each.alert for each in CASES if each.fires == fires} == {alert.name for alert in ALERTS}


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "old", "new"),
    [
        ("NoProgress", "clamp_min(10 *", "clamp_min(2 *"),
        ("NoProgress", "clamp_min(10 *", "clamp_min(40 *"),
        ("RunSlowerThanPredicted", "> 1.2", "> 1.15"),
        ("RunSlowerThanPredicted", "> 1.2", "> 1.25"),
        ("RunSlowerThanPredicted", "unless on (run) (device", "or (device"),
        ("DeviceSlowerThanItsPrediction", "> 1.3", "> 1.2"),
        ("DeviceSlowerThanItsPrediction", "> 1.3", "> 1.4"),
        ("LinkSlow", "> 2", "> 1.8"),
        ("LinkSlow", "> 2", "> 2.2"),
        ("LinkSlow", "> 0.05", "> 0.005"),
        ("LinkSlow", "> 0.05", "> 0.2"),
        ("DeviceSlowerThanItsPrediction", "> 0.05", "> 0.005"),
        ("DeviceSlowerThanItsPrediction", "> 0.05", "> 0.5"),
        ("LossNotFinite", "hethub_loss != hethub_loss or", "hethub_loss > 1e6 or"),
        ("LossNotFinite", "[10m]", "[60m]"),
        ("CheckpointTooOld", "> on (run) 3 *", "> on (run) 2 *"),
        ("CheckpointTooOld", "> on (run) 3 *", "> on (run) 4 *"),
        ("CheckpointTooOld", "or max by (run) (hethub_steps_total)", "or max by (run) (hethub_loss)"),
        ("GoodputLow", "< 0.9", "< 0.95"),
        ("GoodputLow", "< 0.9", "< 0.85"),
        ("MemoryNearLimit", "> 0.95", "> 0.93"),
        ("MemoryNearLimit", "> 0.95", "> 0.97"),
        ("MemoryNearLimit", "1.01 *", "1.0 *"),
        ("RestartLoop", "> 3", "> 2"),
        ("RestartLoop", "> 3", "> 4"),
        ("RestartLoop", "[30m]", "[3h]"),
        ("TargetMissing", "== 0", "== 2"),
        ("TargetMissing", 'state=~"training"', 'state=~".*"'),
    ],
)
def test_a_threshold_that_moves_is_seen(tmp_path, alert, old, new):
    def change(text):
        document = yaml.safe_load(text)
        (rule,) = [rule for rule in document["groups"][0]["rules"] if rule["alert"] == alert]
        assert old in rule["expr"]
        rule["expr"] = rule["expr"].replace(old, new)
        return yaml.safe_dump(document)

    # What explains a slow run is in the cases of its causes.
    causes = {"DeviceSlowerThanItsPrediction", "LinkSlow"} if alert == "RunSlowerThanPredicted" else set()
    cases = [each for each in CASES if each.alert in {alert, *causes}]
    assert judged(tmp_path, cases, change).returncode == 1


@pytest.mark.parametrize("rule", rule_expressions().values(), ids=lambda rule: rule.place)
def test_a_rule_is_over_registered_metrics_and_labels(rule):
    labels = labels_of(rule.text, recorded_labels())
    assert labels is None or rule.labels <= labels


def test_every_alert_says_what_to_do_and_where_more_stands():
    headings = re.findall(r"^### (\w+)$", (ROOT / RUNBOOK).read_text(), re.MULTILINE)
    assert [alert.name for alert in ALERTS] == headings
    for alert in ALERTS:
        entry = alert.entry(Durations())
        assert entry["labels"]["severity"] in {"warning", "critical"} and entry["keep_firing_for"] == "5m"
        assert entry["annotations"]["summary"] and len(entry["annotations"]["description"]) > 60
        assert entry["annotations"]["runbook_url"] == f"{RUNBOOK}#{alert.name.lower()}"


@pytest.mark.parametrize(
    ("factor", "seconds", "text"),
    [(1, 300, "5m"), (1, 5400, "90m"), (0.01, 300, "3s"), (1, 0, "0s"), (0.01, 30, "300ms")],
)
def test_durations_are_prometheus_own(factor, seconds, text):
    assert Durations(factor)(seconds) == text
