"""Most memory of every device of a run, as its counters have it: of a run that goes on, and of one that ended badly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hethub.telemetry.counters import FIELDS, CountersFile
from hethub.telemetry.folder import COUNTERS, NODES

__all__ = ["Peak", "peaks_in"]

_PEAK = FIELDS.index("memory_peak_bytes")


class Peak(NamedTuple):
    """Most memory in use, bytes; None where it is not known."""

    predicted: float | None
    measured: float | None


def peaks_in(folder: Path) -> Mapping[str, Peak]:
    """By device, from a run's telemetry folder; empty where there is none. Raises ValueError or KeyError for files that
    another version wrote."""
    found: dict[str, Peak] = {}
    for file in sorted((folder / NODES).glob("*.json")):
        node = json.loads(file.read_text(encoding="utf-8"))
        for device in node["devices"]:
            name = f"{node['node']}/{device['labels']['device']}"
            predicted = device["constants"].get("hethub_device_predicted_memory_bytes")
            found[name] = Peak(predicted, _measured(folder / COUNTERS / device["file"]))
    return found


def _measured(file: Path) -> float | None:
    try:
        counters = CountersFile(file)
    except OSError:
        return None
    try:
        peak = counters.read()[_PEAK]
    finally:
        counters.close()
    return None if math.isnan(peak) or peak == 0 else peak
