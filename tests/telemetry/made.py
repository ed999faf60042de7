"""A telemetry folder as a driver and its workers would leave it, without either."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from hethub.telemetry.counters import FIELDS, CountersFile, size_of
from hethub.telemetry.describe import write_nodes
from hethub.telemetry.folder import COUNTERS

LINK = {
    "link": "intra a",
    "transport": "native",
    "src_type": "fast",
    "dst_type": "fast",
    "capacity_bytes_per_second": 1e9,
}


def described_device(
    node: str, index: int, *, vendor: str = "cpu", emulated: bool = True, links: int = 1
) -> dict[str, Any]:
    """One device as `describe` writes it."""
    return {
        "labels": {
            "device": str(index),
            "device_type": "fast",
            "vendor": vendor,
            "pipeline": "0",
            "stage": "0",
        },
        "rank": index,
        "emulated": emulated,
        "file": f"{node.replace('/', '-')}-{index}.bin",
        "constants": {
            "hethub_device_memory_limit_bytes": 1e9,
            "hethub_device_predicted_memory_bytes": 9e8,
            "hethub_device_peak_flops_per_second": 1e12,
        },
        "links": [{**LINK, "link": f"intra {number}"} for number in range(links)],
    }


def write_folder(folder: Path, nodes: dict[str, list[dict[str, Any]]]) -> None:
    """Nodes with their devices, each of whose counters reads 1, 2, 3, ..."""
    write_nodes(
        folder,
        {name: {"run": "run", "node": name, "devices": devices} for name, devices in nodes.items()},
    )
    for devices in nodes.values():
        for device in devices:
            count(folder, device, [float(n + 1) for n in range(size_of(len(device["links"])) - 2)])


def count(folder: Path, device: dict[str, Any], numbers: list[float]) -> None:
    """Write a device's counters."""
    file = CountersFile(folder / COUNTERS / device["file"], write=True)
    file.write(array("d", numbers))
    file.close()


def numbers_of(**values: float) -> list[float]:
    """Counters of a device without links: 0 but for those named, with `.` written as `__`."""
    given = {name.replace("__", "."): value for name, value in values.items()}
    assert given.keys() <= set(FIELDS)
    return [given.get(name, 0.0) for name in FIELDS]
