"""Sensors of vendors that are not here: what their commands print, and a library that is played."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hethub.telemetry.sensors import (
    ADAPTERS,
    Adapter,
    Reading,
    Sensors,
    parse_hl_smi,
    parse_npu_smi,
    parse_rocm_smi,
    parse_xpu_smi,
)

ROCM_SMI = {
    "card0": {
        "Unique ID": "0x9f2a6e1c",
        "Temperature (Sensor edge) (C)": "N/A",
        "Temperature (Sensor junction) (C)": "58.0",
        "Temperature (Sensor memory) (C)": "49.0",
        "Current Socket Graphics Package Power (W)": "412.0",
    },
    # As older releases name it.
    "card1": {"Temperature (Sensor edge) (C)": "41.0", "Average Graphics Package Power (W)": "88.5"},
    "system": {"Driver version": "6.10.5"},
}
NPU_SMI = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.0                   Version: 24.1.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.5        41                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3345 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | -           43                0    / 0             |
| 0                         | 0000:01:00.0  | 12          0    / 0          45292/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 1       0                 | 2024          | python                   | 41000                   |
+===========================+===============+====================================================+
"""
HL_SMI = """\
0, 01P0-HL2080A0-15-TF8A71-11-01-00, 31 C, 92 W
1, 01P0-HL2080A0-15-TF8A71-12-01-00, 29 C, N/A
"""
XPU_SMI = """\
Timestamp, DeviceId, GPU Power (W), GPU Core Temperature (Celsius Degree)
06:14:46.000,    0, 118.20, 45.00
06:14:46.000,    1,   N/A, 44.50
"""


def test_rocm_smi() -> None:
    assert parse_rocm_smi(json.dumps(ROCM_SMI)) == {
        0: Reading(source="rocm-smi", watts=412.0, celsius=58.0, uuid="0x9f2a6e1c"),
        1: Reading(source="rocm-smi", watts=88.5, celsius=41.0),
    }


def test_npu_smi() -> None:
    assert parse_npu_smi(NPU_SMI) == {
        0: Reading(source="npu-smi", watts=93.5, celsius=41.0),
        1: Reading(source="npu-smi", watts=None, celsius=43.0),
    }


def test_hl_smi() -> None:
    assert parse_hl_smi(HL_SMI) == {
        0: Reading(source="hl-smi", watts=92.0, celsius=31.0, uuid="01P0-HL2080A0-15-TF8A71-11-01-00"),
        1: Reading(source="hl-smi", watts=None, celsius=29.0, uuid="01P0-HL2080A0-15-TF8A71-12-01-00"),
    }


def test_xpu_smi() -> None:
    assert parse_xpu_smi(XPU_SMI) == {
        0: Reading(source="xpu-smi", watts=118.2, celsius=45.0),
        1: Reading(source="xpu-smi", watts=None, celsius=44.5),
    }
    with pytest.raises(ValueError, match="no header"):
        parse_xpu_smi("Error: no device")


def test_nvml_gives_base_units_and_leaves_out_what_a_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def energy(handle: int) -> int:
        if handle == 1:
            raise NVMLError("not supported")
        return 5_000_000

    played = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetPowerUsage=lambda handle: 310_500,
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", played)
    assert ADAPTERS["nvidia"].read() == {
        0: Reading(source="nvml", watts=310.5, celsius=61.0, joules=5000.0, uuid="GPU-0"),
        1: Reading(source="nvml", watts=310.5, celsius=61.0, joules=None, uuid="GPU-1"),
    }


def test_power_alone_adds_up_to_energy() -> None:
    watts = iter((100.0, 200.0, 200.0))
    clock = iter((10.0, 12.0, 15.0))
    adapter = Adapter("rocm-smi", lambda: {0: Reading(source="rocm-smi", watts=next(watts))})
    sensors = Sensors({"amd": adapter}, now=lambda: next(clock))
    joules = []
    for _ in range(3):
        assert sensors.read("amd")
        reading = sensors._readings["amd"][0]
        joules.append(reading.joules)
    assert joules == [0.0, 300.0, 900.0]


def test_a_missing_command_is_asked_once_and_gives_nothing() -> None:
    asked: list[int] = []

    def missing() -> Any:
        asked.append(1)
        raise FileNotFoundError("npu-smi")

    sensors = Sensors({"huawei": Adapter("npu-smi", missing)})
    assert sensors.read("huawei") is False
    assert asked == [1]


def test_emulated_devices_and_vendors_without_an_adapter_have_no_readings() -> None:
    sensors = Sensors({"amd": Adapter("rocm-smi", lambda: {0: Reading(source="rocm-smi", watts=1.0)})})
    assert sensors.of("amd", 0, emulated=True) is None
    assert sensors.of("cpu", 0, emulated=False) is None
