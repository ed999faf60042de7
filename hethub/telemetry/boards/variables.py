"""The choices at the top of the boards."""

from __future__ import annotations

from hethub.telemetry.boards.expressions import RUN
from hethub.telemetry.boards.panels import Variable

__all__ = ["CHOOSE_DEVICES", "CHOOSE_RUN", "WHAT_DEVICES"]

CHOOSE_RUN = Variable(name="run", label="Run", query="label_values(hethub_run_info, run)")

WHAT_DEVICES = Variable(
    name="what",
    label="Devices are",
    query='query_result(label_replace(label_replace(hethub_run_info{run="$run"}, "what", "emulated", '
    '"emulated", "true"), "what", "real", "emulated", "false"))',
    pattern='/what="([^"]+)"/',
    hidden=True,
)
"""`emulated` or `real`, for the titles of rows."""

CHOOSE_DEVICES = (
    Variable(
        name="device_type",
        label="Device type",
        query=f"label_values(hethub_device_info{{{RUN}}}, device_type)",
        several=True,
    ),
    Variable(
        name="node",
        label="Node",
        query=f'label_values(hethub_device_info{{{RUN}, device_type=~"$device_type"}}, node)',
        several=True,
    ),
    Variable(
        name="device",
        label="Device of the node",
        query=f'label_values(hethub_device_info{{{RUN}, device_type=~"$device_type", node=~"$node"}}, device)',
        several=True,
    ),
)
