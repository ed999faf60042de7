"""The third board: what links, memory, power and faults do."""

from __future__ import annotations

from hethub.telemetry.boards.expressions import DEVICES, RUN, rate, run_value, slowdown
from hethub.telemetry.boards.panels import Board, Look, Panel, Query, Row, Steps
from hethub.telemetry.boards.variables import CHOOSE_DEVICES, CHOOSE_RUN, WHAT_DEVICES

__all__ = ["HARDWARE_BOARD"]

_NODE = f'{RUN}, node=~"$node"'
_RECEIVED = rate("hethub_link_bytes_total", _NODE)
_LINK_LEGEND = "{{link}} {{transport}}"
_DEVICE_LEGEND = "{{node}}/{{device}} {{device_type}}"


def _gauge(metric: str) -> str:
    """A device's gauge, once, whoever served it."""
    return f"max by (node, device, device_type) ({metric}{{{DEVICES}}})"


_LINKS = (
    Panel(
        number=1,
        title="Bytes per second over each link",
        description="Payload that the chosen nodes' devices received, by link and transport. Collectives "
        "inside a tensor-parallel group are not in it. Emulated devices: in modelled time.",
        unit="Bps",
        queries=(
            Query(
                f"sum by (link, transport) ({_RECEIVED})"
                f" * on () group_left () max by () (hethub_time_scale_ratio{{{RUN}}})",
                _LINK_LEGEND,
            ),
        ),
        width=8,
    ),
    Panel(
        number=2,
        title="Load of each link",
        description="Bytes per second that a node received over a link, over the bandwidth of one path of "
        "it; of the nodes the most loaded. Above 100 % several paths are in use. High load and high "
        "waiting: the link is what limits.",
        unit="percentunit",
        queries=(
            Query(
                f"max by (link, transport) (sum by (node, link, transport) ({_RECEIVED})"
                " / on (node, link, transport)"
                f" max by (node, link, transport) (hethub_link_capacity_bytes_per_second{{{_NODE}}}))",
                _LINK_LEGEND,
            ),
        ),
        width=8,
    ),
    Panel(
        number=3,
        title="Transfer time over prediction",
        description="From sending to arrival of the messages that a device stood waiting for, over what the "
        "plan predicts for the same messages. 1: as planned; 4: the link gives a quarter. Above 2 for a "
        "while raises LinkSlow. No line: nothing waited for this link.",
        unit="none",
        queries=(
            Query(
                slowdown(
                    "hethub_link_transfer_seconds_total",
                    "hethub_link_predicted_transfer_seconds_total",
                    _NODE,
                    "link",
                    "transport",
                ),
                _LINK_LEGEND,
            ),
        ),
        steps=Steps(2.0, 1.5),
        decimals=2,
        width=8,
    ),
)
_MEMORY = (
    Panel(
        number=20,
        title="Peak memory over the limit",
        description="Most memory in use so far over what the plan may use of the device. At 100 % the next "
        "allocation fails.",
        unit="percentunit",
        queries=(
            Query(
                f"{_gauge('hethub_device_memory_peak_bytes')} / on (node, device, device_type)"
                f" {_gauge('hethub_device_memory_limit_bytes')}",
                _DEVICE_LEGEND,
            ),
        ),
        steps=Steps(0.98, 0.95),
        high=1.0,
        decimals=1,
        width=8,
    ),
    Panel(
        number=21,
        title="Peak memory over prediction",
        description="1: as planned. Above 1: the memory model is short of something, and a plan that just "
        "fits may not. Well below 1: the plan could have used larger micro-batches.",
        unit="none",
        queries=(
            Query(
                f"{_gauge('hethub_device_memory_peak_bytes')} / on (node, device, device_type)"
                f" {_gauge('hethub_device_predicted_memory_bytes')}",
                _DEVICE_LEGEND,
            ),
        ),
        decimals=2,
        width=8,
    ),
    Panel(
        number=22,
        title="Memory in use",
        description="At the end of the last step. It should not grow from step to step: growth is a leak.",
        unit="bytes",
        queries=(Query(_gauge("hethub_device_memory_used_bytes"), _DEVICE_LEGEND),),
        width=8,
    ),
)
_POWER = (
    Panel(
        number=30,
        title="Power by device type",
        description="From the energy counters of the chosen devices. source is what measured: nvml and the "
        "like, a vendor's exporter, or estimate, the cost model's power for what each device does. "
        "Emulated devices: in modelled time.",
        unit="watt",
        queries=(
            Query(
                f"sum by (device_type, source) ({rate('hethub_device_energy_joules_total', DEVICES)})"
                f" * on () group_left () max by () (hethub_time_scale_ratio{{{RUN}}})",
                "{{device_type}} ({{source}})",
            ),
        ),
        width=8,
    ),
    Panel(
        number=31,
        title="Power that sensors read",
        description="Of each device, now. Power that falls while the device is busy: it is throttled. Empty "
        "where no sensor is, as on emulated devices.",
        unit="watt",
        queries=(
            Query(
                f"max by (node, device, device_type, source) (hethub_device_power_watts{{{DEVICES}}})",
                _DEVICE_LEGEND + " ({{source}})",
            ),
        ),
        width=8,
    ),
    Panel(
        number=32,
        title="Temperature",
        description="Of each device, now. A device far hotter than its neighbours will be throttled: look at "
        "its cooling. Empty where no sensor is, as on emulated devices.",
        unit="celsius",
        queries=(
            Query(
                f"max by (node, device, device_type, source) (hethub_device_temperature_celsius{{{DEVICES}}})",
                _DEVICE_LEGEND + " ({{source}})",
            ),
        ),
        low=None,
        width=8,
    ),
)
_FAULTS = (
    Panel(
        number=40,
        title="Lost seconds by cause",
        description="Time without new steps since the driver started. start: until the first step. "
        "checkpoint: standing still for them. The others: from the last step that was kept until it is "
        "passed again, by why the attempt failed.",
        unit="s",
        look=Look.BARS,
        queries=(Query(f"max by (cause) (hethub_lost_seconds_total{{{RUN}}})", "{{cause}}"),),
        decimals=1,
        width=6,
    ),
    Panel(
        number=41,
        title="Faults by cause",
        description="Attempts that failed since the driver started. node: all workers of a node. link: a "
        "connection was lost and nobody died. The driver's log names the device.",
        unit="short",
        look=Look.BARS,
        queries=(Query(f"max by (kind) (hethub_faults_total{{{RUN}}})", "{{kind}}"),),
        steps=Steps(1.0, 0.5),
        width=6,
    ),
    Panel(
        number=42,
        title="Goodput",
        description="Share of the time since the driver started in which new steps were made. Each fall is "
        "something lost; the panel beside it says to what.",
        unit="percentunit",
        queries=(Query(run_value("hethub_goodput_ratio"), "goodput"),),
        steps=Steps(0.8, 0.9),
        high=1.0,
        width=6,
    ),
    Panel(
        number=43,
        title="Restarts, and this attempt",
        description="Attempts begun after a failure, and the number of the one that runs. More than three in "
        "half an hour raise RestartLoop.",
        unit="short",
        look=Look.STAT,
        queries=(
            Query(run_value("hethub_restarts_total"), "restarts"),
            Query(run_value("hethub_run_attempt"), "attempt"),
        ),
        width=6,
    ),
    Panel(
        number=50,
        title="Steps since the last checkpoint",
        description="What a failure now would cost, beside what the job asks for. More than three intervals "
        "raise CheckpointTooOld. Empty where the job makes none.",
        unit="short",
        queries=(
            Query(
                f"{run_value('hethub_run_step')} - on (run) {run_value('hethub_checkpoint_last_success_step')}",
                "steps",
            ),
            Query(run_value("hethub_checkpoint_interval_steps"), "interval"),
        ),
        width=6,
    ),
    Panel(
        number=51,
        title="Time of a checkpoint, and its age",
        description="Until the last one's bytes were on disk, and how long ago that was. A time near the "
        "age: the disk keeps up only just. Empty where the job makes none.",
        unit="s",
        queries=(
            Query(run_value("hethub_checkpoint_duration_seconds"), "duration"),
            Query(f"time() - {run_value('hethub_checkpoint_last_success_timestamp_seconds')}", "age"),
        ),
        width=6,
    ),
    Panel(
        number=52,
        title="Checkpoints",
        description="Made, and given up. One that was given up leaves the one before in place.",
        unit="short",
        look=Look.STAT,
        queries=(Query(f"max by (result) (hethub_checkpoints_total{{{RUN}}})", "{{result}}"),),
        width=6,
    ),
    Panel(
        number=53,
        title="Last sign of each device type",
        description="How long ago the slowest device of the type ended its last step. One type far above the "
        "others stands still; the others wait for it.",
        unit="s",
        queries=(
            Query(
                f"time() - min by (device_type) (hethub_device_heartbeat_timestamp_seconds{{{DEVICES}}})",
                "{{device_type}}",
            ),
        ),
        width=6,
    ),
)

HARDWARE_BOARD = Board(
    uid="hethub-hardware",
    title="HetHub: links, memory, power, faults",
    description="What links, memory, power and faults do, beside the prediction.",
    variables=(CHOOSE_RUN, *CHOOSE_DEVICES, WHAT_DEVICES),
    rows=(
        Row("$run, $what devices: links", _LINKS),
        Row("$run, $what devices: memory", _MEMORY),
        Row("$run, $what devices: power", _POWER),
        Row("$run, $what devices: faults", _FAULTS),
    ),
)
