"""What goes wrong in a running job raises its alert, names the culprit, and raises no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.processes import until
from tests.telemetry.prometheus import ScrapedRun, quick_rules, scraped

FAULTS: dict[str, dict[str, Any]] = {
    "DeviceSlowerThanItsPrediction": {"device": "c/0/1", "action": "compute", "factor": 2.0},
    "LinkSlow": {"link": "desk-shelf", "factor": 4.0},
}
OF_THE_LINK = {"a-c", "c-a", "b-c", "c-b"}  # between the groups of the desk and the shelf's
ALERT_SECONDS = 120.0


@pytest.mark.parametrize("alert", FAULTS)
def test_a_fault_raises_its_alert_and_no_other(tmp_path: Path, alert: str) -> None:
    """It fires and others do not; and none even waits to, as RunSlowerThanPredicted does for longer than these two."""
    fault = {**FAULTS[alert], "do": "slow", "step": 3, "steps": 100_000}
    rules = quick_rules(tmp_path / "rules")
    with scraped(tmp_path, steps=4, rules=rules, fault=fault, evaluate=None) as run:
        check_alert(run, alert, fault)


def check_alert(run: ScrapedRun, alert: str, fault: dict[str, Any]) -> None:
    fired: set[str] = set()

    def alone() -> bool:
        states = {(each["labels"]["alertname"], each["state"]) for each in run.prometheus.alerts()}
        if (alert, "firing") in states:  # before, seconds of the start are minutes to such quick rules
            fired.update(name for name, state in states if state == "firing")
        return states == {(alert, "firing")}

    until(alone, ALERT_SECONDS, f"{alert} fires and no other waits to")
    assert fired == {alert}
    assert run.prometheus.value("run:hethub_step_duration_seconds:over_predicted5m") > 1.2
    named = {
        each["labels"].get("link") or f"{each['labels']['node']}/{each['labels']['device']}"
        for each in run.prometheus.alerts()
        if each["state"] == "firing"
    }
    if "device" in fault:
        assert named == {fault["device"]}
    else:
        assert named and named <= OF_THE_LINK
