"""What goes wrong in a running job raises its alert, names the culprit, and raises no other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.telemetry.prometheus import quick_rules, scraped, until

FAULTS: dict[str, dict[str, Any]] = {
    "DeviceSlowerThanItsPrediction": {"device": "c/0/1", "action": "compute", "factor": 2.0},
    "LinkSlow": {"link": "desk-shelf", "factor": 4.0},
}
OF_THE_LINK = {"a-c", "c-a", "b-c", "c-b"}  # between the groups of the desk and the shelf's
ALERT_SECONDS = 120.0
STAYS_SECONDS = 25.0  # RunSlowerThanPredicted would have had its time by then


@pytest.mark.parametrize("alert", FAULTS)
def test_a_fault_raises_its_alert_and_no_other(tmp_path: Path, alert: str) -> None:
    fault = {**FAULTS[alert], "do": "slow", "step": 3, "steps": 100_000}
    rules = quick_rules(tmp_path / "rules")
    with scraped(tmp_path, rules=rules, fault=fault, evaluate=None) as run:
        until(lambda: alert in run.firing(), ALERT_SECONDS, f"{alert} fires")
        end, others, named = time.monotonic() + STAYS_SECONDS, set(), set()

        def passed() -> bool:
            others.update(run.firing() - {alert})
            named.update(
                each["labels"].get("link") or f"{each['labels']['node']}/{each['labels']['device']}"
                for each in run.prometheus.alerts()
                if each["labels"]["alertname"] == alert and each["state"] == "firing"
            )
            return time.monotonic() > end

        until(passed, 60, "time passes")
        assert run.prometheus.value("run:hethub_step_duration_seconds:over_predicted5m") > 1.2
        assert others == set()
        if "device" in fault:
            assert named == {fault["device"]}
        else:
            assert named and named <= OF_THE_LINK
