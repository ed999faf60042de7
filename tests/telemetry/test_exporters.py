"""Vendors' exporters under HetHub's names: samples in their own formats, read by the shipped rules."""

from __future__ import annotations

import yaml

from hethub.telemetry.metrics import METRICS
from hethub.telemetry.rule_files import recording_file
from hethub.telemetry.rules import Durations
from tests.telemetry.promql import needs_promtool, panel_expressions, promtool, rule_expressions

INFO = 'hethub_device_info{run="r", node="a/0", device="%d", device_type="t", vendor="%s", pipeline="0", stage="0", rank="0", emulated="false", uuid="%s"}'  # noqa: E501
KEPT = '{%srun="r", node="a/0", device="%d", device_type="t", vendor="%s", pipeline="0", stage="0"%s}'
DCGM = '{gpu="0", UUID="GPU-1", pci_bus_id="00000000:37:00.0", device="nvidia0", modelName="NVIDIA A100", Hostname="h"}'
AMD = '{gpu_id="0", gpu_uuid="72ff740f", serial_number="692251001124", card_model="0x1002", hostname="h"}'
NPU = '{id="0", vdie_id="6A2C", model_name="910B", pcie_bus_info="0000:C1:00.0"}'
EXPORTED = {
    INFO % (0, "nvidia", "GPU-1"): "1x20",
    INFO % (1, "amd", "72ff740f"): "1x20",
    INFO % (2, "huawei", "6A2C"): "1x20",
    INFO % (3, "cpu", ""): "1x20",
    f"DCGM_FI_DEV_POWER_USAGE{DCGM}": "68.25x20",
    f"DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{DCGM}": "2000+1000x20",  # mJ
    f"DCGM_FI_DEV_FB_USED{DCGM}": "1024x20",  # MiB
    f"DCGM_FI_DEV_GPU_TEMP{DCGM.replace('UUID', 'uuid')}": "61x20",  # the label's newer name
    f"gpu_package_power{AMD}": "300x20",
    f"gpu_energy_consumed{AMD}": "5000000x20",  # uJ
    f"amd_gpu_junction_temperature{AMD}": "55x20",
    f"gpu_used_vram{AMD}": "2048x20",
    f"npu_chip_info_power{NPU}": "73.5x20",
    f"npu_chip_info_temperature{NPU}": "46x20",
    f"npu_chip_info_hbm_used_memory{NPU}": "512x20",
}
READ = {
    "hethub_device_power_watts": (68.25, 300, 73.5),
    "hethub_device_temperature_celsius": (61, 55, 46),
    "hethub_device_energy_joules_total": (2 + 10, 5, None),  # after ten samples
    "hethub_device_memory_used_bytes": (2**30, 2**31, 2**29),
}
VENDORS = (("nvidia", "dcgm-exporter"), ("amd", "amd-device-metrics-exporter"), ("huawei", "npu-exporter"))


def judged(folder, series, tests):
    """What promtool says of (expression, {labels: value}) after ten minutes of these series, a sample a minute."""
    (folder / "recording.yaml").write_text(recording_file(Durations()))
    document = {
        "rule_files": ["recording.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": "10m",
                        "exp_samples": [
                            {"labels": labels, "value": value} for labels, value in expected.items()
                        ],
                    }
                    for expression, expected in tests
                ],
            }
        ],
    }
    (folder / "tests.yaml").write_text(yaml.safe_dump(document))
    return promtool("test", "rules", "tests.yaml", folder=folder)


def sensed(values):
    """(number of the device, vendor, source, value) of those that have one."""
    found = [(index, *VENDORS[index], value) for index, value in enumerate(values)]
    return [each for each in found if each[-1] is not None]


@needs_promtool
def test_vendors_exporters_come_under_our_names_and_units(tmp_path):
    used = "hethub_device_memory_used_bytes"
    tests = []
    for name, values in READ.items():
        expected = {
            name + KEPT % ("", index, vendor, "" if name == used else f', source="{source}"'): value
            for index, vendor, source, value in sensed(values)
            if not (name == used and vendor == "amd")  # the run's own word is not joined by a second
        }
        tests.append((f'{name}{{job=""}}', expected))
    own = used + KEPT % ('job="hethub", ', 1, "amd", "")
    answer = judged(tmp_path, EXPORTED | {own: "7x20"}, tests)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_promtool
def test_panels_of_sensors_show_samples_of_agents_and_exporters(tmp_path):
    """Emulated devices have no sensors, so the running job of other tests leaves these panels empty."""
    tests = []
    series = dict(EXPORTED)
    for name in ("hethub_device_power_watts", "hethub_device_temperature_celsius"):
        (panel,) = [each for each in panel_expressions() if name in each.text]
        series[name + KEPT % ('job="hethub", ', 4, "nvidia", ', source="nvml"')] = "77x20"
        shown = {
            f'{{node="a/0", device="{index}", device_type="t", source="{source}"}}': value
            for index, _, source, value in [*sensed(READ[name]), (4, "nvidia", "nvml", 77)]
        }
        tests.append((panel.promql(run="r"), shown))
    (panel,) = [each for each in panel_expressions() if each.title == "Power by device type"]
    series['hethub_time_scale_ratio{run="r"}'] = "1x20"
    watts = {"dcgm-exporter": 1 / 60, "amd-device-metrics-exporter": 0}  # 1000 mJ a minute, and none
    shown = {f'{{device_type="t", source="{source}"}}': value for source, value in watts.items()}
    tests.append((panel.promql(run="r", window="5m"), shown))
    answer = judged(tmp_path, series, tests)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_what_exporters_are_mapped_to_stands_in_the_table():
    mapped = {name.split()[0] for name in rule_expressions() if name.startswith("hethub_device_")}
    assert mapped == set(READ) <= set(METRICS)
