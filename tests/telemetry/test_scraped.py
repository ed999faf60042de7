"""A real Prometheus scrapes emulated jobs that fail, and that come to their end (`test_live_run.py` has one that goes
on)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hethub.timeline.record import Timeline
from hethub.timeline.summary import summarize
from tests.processes import until
from tests.telemetry.prometheus import scraped


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
