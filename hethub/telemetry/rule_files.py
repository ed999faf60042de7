"""The rule files that Prometheus reads, as text."""

from __future__ import annotations

from typing import Any

import yaml

from hethub.telemetry.alerts import RUNBOOK, alerts
from hethub.telemetry.rules import Durations, recording_rules

__all__ = ["alert_file", "recording_file"]

_HEADER = "# Written by `hethub dashboards --rules`; edit hethub/telemetry/{source} instead.\n"


def recording_file(durations: Durations) -> str:
    """The recording rules."""
    entries = [rule.entry() for rule in recording_rules(durations)]
    return _text("hethub-recording", entries, "rules.py")


def alert_file(durations: Durations, runbook: str = RUNBOOK) -> str:
    """The alert rules; `runbook` is the address of docs/dashboards.md."""
    entries = [alert.entry(durations, runbook) for alert in alerts(durations)]
    return _text("hethub-alerts", entries, "alerts.py")


def _text(name: str, entries: list[dict[str, Any]], source: str) -> str:
    document = {"groups": [{"name": name, "rules": entries}]}
    return _HEADER.format(source=source) + yaml.safe_dump(document, sort_keys=False, width=110)
