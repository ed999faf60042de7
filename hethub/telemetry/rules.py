"""Prometheus' recording rules: figures that alerts share, and vendors' exporters under HetHub's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["JOB", "DeviceExporter", "Durations", "RecordingRule", "recording_rules"]

JOB = "hethub"
"""The scrape job of docker/prometheus/prometheus.yml."""

_DEVICE_LABELS = ("run", "node", "device", "device_type", "vendor", "pipeline", "stage")
_COMPUTE = ("hethub_device_compute_seconds_total", "hethub_device_predicted_compute_seconds_total")
_TRANSFER = ("hethub_link_transfer_seconds_total", "hethub_link_predicted_transfer_seconds_total")
_OF_DEVICE = ("run", "node", "device", "device_type")
_OF_LINK = ("run", "link", "transport")
_USED = "hethub_device_memory_used_bytes"
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Durations:
    """Writes durations, `factor` times as long: rules that wait for minutes are tested in seconds."""

    factor: float = 1.0

    def __call__(self, seconds: float) -> str:
        """A PromQL duration of so many seconds."""
        milliseconds = round(seconds * self.factor * 1000)
        if not milliseconds:
            return "0s"
        sizes = ((3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms"))
        size, unit = next((size, unit) for size, unit in sizes if milliseconds % size == 0)
        return f"{milliseconds // size}{unit}"

    def seconds(self, seconds: float) -> str:
        """The same as a number of seconds."""
        return f"{seconds * self.factor:g}"


@dataclass(frozen=True, slots=True)
class RecordingRule:
    """A series that Prometheus computes: level:metric:operation."""

    record: str
    expression: str
    labels: dict[str, str] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As it stands in a rule file."""
        entry: dict[str, Any] = {"record": self.record, "expr": self.expression}
        return entry if not self.labels else entry | {"labels": self.labels}


@dataclass(frozen=True, slots=True)
class DeviceExporter:
    """A vendor's exporter: the label that names a device as `hethub_device_info` does (`uuid`), and its sensors as
    expressions in base units."""

    source: str
    uuid_label: str
    sensors: dict[str, str]


DEVICE_EXPORTERS = (
    DeviceExporter(  # NVIDIA's: MiB, W, mJ; UUID became uuid in 2026
        "dcgm-exporter",
        "UUID",
        {
            "hethub_device_power_watts": "DCGM_FI_DEV_POWER_USAGE",
            "hethub_device_temperature_celsius": "DCGM_FI_DEV_GPU_TEMP",
            "hethub_device_energy_joules_total": "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION / 1000",
            _USED: f"DCGM_FI_DEV_FB_USED * {_MIB}",
        },
    ),
    DeviceExporter(  # AMD's device-metrics-exporter: MB, W, uJ; names may have a prefix, and the power has two
        "amd-device-metrics-exporter",
        "gpu_uuid",
        {
            "hethub_device_power_watts": '{__name__=~"(amd_)?gpu_(package_power|power_usage)"}',
            "hethub_device_temperature_celsius": '{__name__=~"(amd_)?gpu_junction_temperature"}',
            "hethub_device_energy_joules_total": '{__name__=~"(amd_)?gpu_energy_consumed"} / 1000000',
            _USED: f'{{__name__=~"(amd_)?gpu_used_vram"}} * {_MIB}',
        },
    ),
    DeviceExporter(  # Huawei's npu-exporter: MB, W; no energy
        "npu-exporter",
        "vdie_id",
        {
            "hethub_device_power_watts": "npu_chip_info_power",
            "hethub_device_temperature_celsius": "npu_chip_info_temperature",
            _USED: f"npu_chip_info_hbm_used_memory * {_MIB}",
        },
    ),
)


def recording_rules(durations: Durations) -> list[RecordingRule]:
    """All of them, in the order in which they need each other."""
    return [*_shared(durations), *_exporters()]


def _shared(durations: Durations) -> list[RecordingRule]:
    window = durations(300)

    def rate(metric: str) -> str:
        return f"rate({metric}[{window}])"

    def quotient(above: str, below: str, *by: str) -> str:
        labels = ", ".join(by)
        return f"sum by ({labels}) ({rate(above)}) / (sum by ({labels}) ({rate(below)}) > 0)"

    def difference(above: str, below: str, *by: str) -> str:
        return f"sum by ({', '.join(by)}) ({rate(above)} - {rate(below)})"

    return [
        RecordingRule(
            "run_device_type_activity:hethub_device_seconds:share5m",
            f"sum by (run, device_type, activity) ({rate('hethub_device_seconds_total')})"
            " / on (run, device_type) group_left ()"
            f" (sum by (run, device_type) ({rate('hethub_device_seconds_total')}) > 0)",
        ),
        RecordingRule(
            "device:hethub_device_compute_seconds:over_predicted5m", quotient(*_COMPUTE, *_OF_DEVICE)
        ),
        RecordingRule(
            # Seconds a second, so 1 is all of its time.
            "device:hethub_device_compute_seconds:beyond_predicted5m",
            difference(*_COMPUTE, *_OF_DEVICE),
        ),
        RecordingRule("link:hethub_link_transfer_seconds:over_predicted5m", quotient(*_TRANSFER, *_OF_LINK)),
        RecordingRule(
            # Of the node that it costs most.
            "link:hethub_link_transfer_seconds:beyond_predicted5m",
            f"max by ({', '.join(_OF_LINK)}) ({difference(*_TRANSFER, 'node', *_OF_LINK)})",
        ),
        RecordingRule(
            "run:hethub_step_duration_seconds:mean5m",
            quotient("hethub_step_duration_seconds_sum", "hethub_step_duration_seconds_count", "run"),
        ),
        RecordingRule(
            "run:hethub_step_duration_seconds:over_predicted5m",
            "run:hethub_step_duration_seconds:mean5m / on (run) max by (run) (hethub_predicted_step_seconds)",
        ),
        RecordingRule(
            "run:hethub_lost_seconds:ratio1h",
            # Starting happens once and says nothing of how the run goes.
            f'sum by (run) (rate(hethub_lost_seconds_total{{cause!="start"}}[{durations(3600)}]))',
        ),
    ]


def _exporters() -> list[RecordingRule]:
    """Vendors' sensors with a device's labels, so that one board serves all.

    A device is found by the uuid that its worker reports. Used memory is the run's own where its worker tells.
    """
    info = f'max by ({", ".join((*_DEVICE_LABELS, "uuid"))}) (hethub_device_info{{uuid!=""}})'
    rules = []
    memory = []
    for exporter in DEVICE_EXPORTERS:
        for name, sensor in exporter.sensors.items():
            labelled = f'label_replace({sensor}, "uuid", "$1", "{exporter.uuid_label}", "(.+)")'
            read = f"sum without (uuid) ({info} * on (uuid) group_left () max by (uuid) ({labelled}))"
            if name == _USED:
                memory.append(read)
            else:
                rules.append(RecordingRule(name, read, {"source": exporter.source}))
    own = f'on (run, node, device) {_USED}{{job="{JOB}"}}'
    return [*rules, RecordingRule(_USED, f"({' or '.join(memory)}) unless {own}")]
