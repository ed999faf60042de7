"""The one table of metrics: every name, its labels, its values known beforehand, its unit and what it means.

Exporters may only serve what stands here; dashboards, rules and docs/telemetry.md are checked against it.

Times are of the wall clock, so that the rate of a device's seconds is a share of elapsed time. Where devices are
emulated, predicted seconds are multiplied by `hethub_time_scale_ratio`, and predicted rates, peaks and capacities
divided by it, so that measured over predicted needs no conversion. What the modelled cluster would show (tokens/s,
watts, dollars an hour) is a rate times `hethub_time_scale_ratio`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from types import MappingProxyType
from typing import Literal

from hethub.checkpoints.restarts import Cause

__all__ = [
    "ACTIVITY_OF_KIND",
    "LOST_CAUSES",
    "METRICS",
    "RUN_STATES",
    "SCOPE_LABELS",
    "SERIES_PER_DEVICE",
    "STEP_BUCKETS_SECONDS",
    "Metric",
    "Scope",
]

SERIES_PER_DEVICE = 32
"""Most series of device scope that one device may have."""


class Scope(StrEnum):
    """What a series is of. Device, link and node series are served by the node's agent, the others by the driver."""

    DEVICE = "device"
    LINK = "link"
    NODE = "node"
    STAGE = "stage"
    RUN = "run"
    PROCESS = "process"  # of HetHub's own processes: no run label


SCOPE_LABELS: Mapping[Scope, tuple[str, ...]] = MappingProxyType(
    {
        # `device` is the index on its node; `pipeline` and `stage` are where the plan has it ("0,3" where it stands in
        # several stages).
        Scope.DEVICE: ("run", "node", "device", "device_type", "vendor", "pipeline", "stage"),
        # `node` is the receiver's; `link` is "intra GROUP", "inter GROUP" or "GROUP-GROUP", sender's group first.
        Scope.LINK: ("run", "node", "link", "transport", "src_type", "dst_type"),
        Scope.NODE: ("run", "node"),
        Scope.STAGE: ("run", "pipeline", "stage", "device_type"),
        Scope.RUN: ("run",),
        Scope.PROCESS: (),
    }
)

ACTIVITY_OF_KIND: Mapping[str, str] = MappingProxyType(
    {
        "forward": "busy",
        "backward": "busy",
        "backward_input": "busy",
        "backward_weight": "busy",
        "reduce": "busy",
        "norm": "busy",
        "update": "busy",
        "gather": "busy",
        "recompute": "recompute",
        "collective": "exposed_communication",
        "send": "exposed_communication",
        "receive": "exposed_communication",
        "bubble": "bubble",
        "idle": "idle",
        "unaccounted": "unaccounted",
        "checkpoint": "checkpoint",
        "evaluation": "evaluation",
        "stalled": "stalled",
    }
)
"""The kinds of `hethub_device_seconds_total` and the activity that each belongs to.

The first six activities are the shares of `hethub.timeline.summary`: busy is useful compute. checkpoint is standing
still for one, evaluation the time outside of training for it, stalled the time from the last finished step of an
attempt that failed to the begin of the next. Together they are the elapsed time.
"""

STEP_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
RUN_STATES = ("starting", "training", "evaluating", "recovering", "ended", "stopped", "failed")
LOST_CAUSES = ("start", "checkpoint", *(cause.value for cause in Cause))

MetricKind = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    `labels` come after those of its scope. `values` are the values of a label known beforehand: their series begin
    at 0. `unit` is the Prometheus base unit at the name's end, empty for counts. `optional` metrics have no series
    where nothing measures or predicts them.
    """

    name: str
    kind: MetricKind
    scope: Scope
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: bool = False

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels, in the order in which values are given."""
        return (*SCOPE_LABELS[self.scope], *self.labels)

    def known_labels(self) -> Iterator[tuple[str, ...]]:
        """Values of `labels` that are known beforehand; nothing where some label's are not."""
        if all(label in self.values for label in self.labels):
            yield from product(*(self.values[label] for label in self.labels))


_DEVICE, _LINK, _NODE, _STAGE, _RUN = Scope.DEVICE, Scope.LINK, Scope.NODE, Scope.STAGE, Scope.RUN

_DEVICES = (
    Metric(
        name="hethub_device_info", kind="info", scope=_DEVICE, labels=("rank", "emulated", "uuid"),
        help="1; what the device is: its rank, emulated true or false, the vendor's uuid (empty where unknown).",
    ),
    Metric(
        name="hethub_device_seconds_total", kind="counter", scope=_DEVICE, unit="seconds", labels=("activity", "kind"),
        help="Where the device's time went, up to its last finished step.",
    ),
    Metric(
        name="hethub_device_compute_seconds_total", kind="counter", scope=_DEVICE, unit="seconds",
        help="The device's own compute: busy and recompute.",
    ),
    Metric(
        name="hethub_device_predicted_compute_seconds_total", kind="counter", scope=_DEVICE, unit="seconds",
        help="What the plan predicts for the same actions.",
    ),
    Metric(
        name="hethub_device_flops_total", kind="counter", scope=_DEVICE,
        help="Model FLOPs done (forward and backward of the matrix products; recomputation does not count).",
    ),
    Metric(
        name="hethub_device_peak_flops_per_second", kind="gauge", scope=_DEVICE, optional=True,
        help="Peak FLOP/s of the data sheet in the run's precision.",
    ),
    Metric(
        name="hethub_device_memory_used_bytes", kind="gauge", scope=_DEVICE, unit="bytes", optional=True,
        help="Memory in use at the end of the last step.",
    ),
    Metric(
        name="hethub_device_memory_peak_bytes", kind="gauge", scope=_DEVICE, unit="bytes", optional=True,
        help="Most memory in use so far.",
    ),
    Metric(
        name="hethub_device_memory_limit_bytes", kind="gauge", scope=_DEVICE, unit="bytes",
        help="Memory that the plan may use of the device.",
    ),
    Metric(
        name="hethub_device_predicted_memory_bytes", kind="gauge", scope=_DEVICE, unit="bytes",
        help="Predicted peak.",
    ),
    Metric(
        name="hethub_device_energy_joules_total", kind="counter", scope=_DEVICE, unit="joules", labels=("source",),
        optional=True,
        help="Energy; source is what measured it, or estimate: the spec's power by activity, in modelled time.",
    ),
    Metric(
        name="hethub_device_power_watts", kind="gauge", scope=_DEVICE, unit="watts", labels=("source",), optional=True,
        help="Power that a sensor reads now.",
    ),
    Metric(
        name="hethub_device_temperature_celsius", kind="gauge", scope=_DEVICE, unit="celsius", labels=("source",),
        optional=True,
        help="Temperature that a sensor reads now.",
    ),
    Metric(
        name="hethub_device_heartbeat_timestamp_seconds", kind="gauge", scope=_DEVICE, unit="seconds",
        help="Unix time up to which the device's seconds are counted: the end of its last step.",
    ),
)  # fmt: skip

_LINKS = (
    Metric(
        name="hethub_link_bytes_total", kind="counter", scope=_LINK, unit="bytes",
        help="Payload that the node's devices received; collectives inside a tensor-parallel group do not count.",
    ),
    Metric(
        name="hethub_link_transfer_seconds_total", kind="counter", scope=_LINK, unit="seconds",
        help="From sending to arrival, of the messages that a device stood waiting for when they arrived.",
    ),
    Metric(
        name="hethub_link_predicted_transfer_seconds_total", kind="counter", scope=_LINK, unit="seconds",
        help="What the plan predicts for the same messages.",
    ),
    Metric(
        name="hethub_link_capacity_bytes_per_second", kind="gauge", scope=_LINK,
        help="Bandwidth of one path over this link.",
    ),
)  # fmt: skip

_NODES = (
    Metric(
        name="hethub_node_devices", kind="gauge", scope=_NODE,
        help="Devices of the run whose counters this node's agent serves.",
    ),
)  # fmt: skip

_STAGES = (
    Metric(
        name="hethub_stage_info", kind="info", scope=_STAGE, labels=("layers", "recompute"),
        help="1; layers is the half-open range, such as 0-6.",
    ),
    Metric(
        name="hethub_stage_devices", kind="gauge", scope=_STAGE,
        help="Devices of the type in the stage.",
    ),
    Metric(
        name="hethub_stage_predicted_ratio", kind="gauge", scope=_STAGE, unit="ratio", labels=("activity",),
        values={"activity": ("busy", "recompute", "exposed_communication", "bubble", "idle", "unaccounted")},
        help="Predicted shares of a step, mean over the stage's devices of the type; they sum to 1.",
    ),
    Metric(
        name="hethub_stage_predicted_memory_bytes", kind="gauge", scope=_STAGE, unit="bytes",
        help="Predicted peak, largest over the stage's devices of the type.",
    ),
)  # fmt: skip

_RUNS = (
    Metric(
        name="hethub_run_info", kind="info", scope=_RUN,
        labels=("run_id", "plan", "model", "precision", "objective", "cluster", "emulated", "devices"),
        help="1; which plan runs: its digest's first 12 digits, what it was searched for, how many devices it uses.",
    ),
    Metric(
        name="hethub_run_state", kind="gauge", scope=_RUN, labels=("state",), values={"state": RUN_STATES},
        help="1 for the state that the run is in, 0 for the others.",
    ),
    Metric(
        name="hethub_run_start_timestamp_seconds", kind="gauge", scope=_RUN, unit="seconds",
        help="Unix time when the driver started.",
    ),
    Metric(
        name="hethub_run_attempt", kind="gauge", scope=_RUN,
        help="Number of the attempt, counted from 1.",
    ),
    Metric(
        name="hethub_time_scale_ratio", kind="gauge", scope=_RUN, unit="ratio",
        help="Wall seconds per modelled second: 1 on real devices.",
    ),
    Metric(
        name="hethub_run_steps", kind="gauge", scope=_RUN,
        help="Steps that the job asks for.",
    ),
    Metric(
        name="hethub_run_step", kind="gauge", scope=_RUN,
        help="Steps done, as the newest weights have it; goes back when a checkpoint is gone back to.",
    ),
    Metric(
        name="hethub_steps_total", kind="counter", scope=_RUN,
        help="Steps done by this driver, those done again included.",
    ),
    Metric(
        name="hethub_tokens_total", kind="counter", scope=_RUN,
        help="Tokens trained on, those of steps done again included.",
    ),
    Metric(
        name="hethub_samples_total", kind="counter", scope=_RUN,
        help="Rows trained on, those of steps done again included.",
    ),
    Metric(
        name="hethub_last_step_timestamp_seconds", kind="gauge", scope=_RUN, unit="seconds",
        help="Unix time when the driver last heard of a finished step; its start before the first.",
    ),
    Metric(
        name="hethub_step_duration_seconds", kind="histogram", scope=_RUN, unit="seconds",
        help="Time of a step.",
    ),
    Metric(
        name="hethub_loss", kind="gauge", scope=_RUN, optional=True,
        help="Training loss of the last step, nats per token.",
    ),
    Metric(
        name="hethub_held_out_loss", kind="gauge", scope=_RUN, optional=True,
        help="Last loss on held-out rows, nats per token.",
    ),
    Metric(
        name="hethub_gradient_norm", kind="gauge", scope=_RUN, optional=True,
        help="Global gradient norm of the last step, before clipping.",
    ),
    Metric(
        name="hethub_learning_rate", kind="gauge", scope=_RUN, optional=True,
        help="Learning rate of the last step.",
    ),
    Metric(
        name="hethub_predicted_step_seconds", kind="gauge", scope=_RUN, unit="seconds",
        help="Predicted time of a step.",
    ),
    Metric(
        name="hethub_predicted_tokens_per_second", kind="gauge", scope=_RUN,
        help="Predicted tokens a second.",
    ),
    Metric(
        name="hethub_predicted_joules_per_token", kind="gauge", scope=_RUN, optional=True,
        help="Predicted energy of a token, in modelled time.",
    ),
    Metric(
        name="hethub_predicted_usd_per_million_tokens", kind="gauge", scope=_RUN, optional=True,
        help="Predicted price of a million tokens, in modelled time.",
    ),
    Metric(
        name="hethub_bound_tokens_per_second", kind="gauge", scope=_RUN, labels=("bound",), optional=True,
        values={"bound": ("homogeneous", "physical")},
        help="The two bounds; homogeneous: the sum over device types of each type's own best plan, predicted.",
    ),
    Metric(
        name="hethub_bound_share_ratio", kind="gauge", scope=_RUN, unit="ratio", labels=("bound",), optional=True,
        values={"bound": ("homogeneous", "physical")},
        help="Tokens a second of the last 20 steps over the bound.",
    ),
    Metric(
        name="hethub_mfu_ratio", kind="gauge", scope=_RUN, unit="ratio", optional=True,
        help="Model FLOPs a second of the last 20 steps over the peak FLOP/s of all devices in use.",
    ),
    Metric(
        name="hethub_cost_usd_total", kind="counter", scope=_RUN, optional=True,
        help="Price of the devices in use and of priced links since the first step, in modelled time.",
    ),
    Metric(
        name="hethub_lost_seconds_total", kind="counter", scope=_RUN, unit="seconds", labels=("cause",),
        values={"cause": LOST_CAUSES},
        help="Time without new steps. start: until the first. checkpoint: standing still for them. "
        "Else the cause of a failure: from its attempt's last new step until that is passed.",
    ),
    Metric(
        name="hethub_goodput_ratio", kind="gauge", scope=_RUN, unit="ratio",
        help="1 - lost seconds over the seconds since the driver started.",
    ),
    Metric(
        name="hethub_faults_total", kind="counter", scope=_RUN, labels=("kind",),
        values={"kind": tuple(cause.value for cause in Cause)},
        help="Attempts that failed, by cause.",
    ),
    Metric(
        name="hethub_restarts_total", kind="counter", scope=_RUN,
        help="Attempts begun after a failure.",
    ),
    Metric(
        name="hethub_checkpoints_total", kind="counter", scope=_RUN, labels=("result",),
        values={"result": ("made", "failed")},
        help="Checkpoints made, and given up.",
    ),
    Metric(
        name="hethub_checkpoint_interval_steps", kind="gauge", scope=_RUN, optional=True,
        help="Steps between checkpoints that the job asks for.",
    ),
    Metric(
        name="hethub_checkpoint_duration_seconds", kind="gauge", scope=_RUN, unit="seconds", optional=True,
        help="Until the last checkpoint's bytes were on disk.",
    ),
    Metric(
        name="hethub_checkpoint_last_success_timestamp_seconds", kind="gauge", scope=_RUN, unit="seconds",
        optional=True,
        help="Unix time of the last checkpoint made; without one, of the first step: age counts from it.",
    ),
    Metric(
        name="hethub_checkpoint_last_success_step", kind="gauge", scope=_RUN, optional=True,
        help="Steps done when the last checkpoint was made.",
    ),
)  # fmt: skip

_PROCESSES = (
    Metric(
        name="hethub_build_info", kind="info", scope=Scope.PROCESS, labels=("version", "role"),
        help="1; the version, and whether the target is a driver or an agent.",
    ),
)  # fmt: skip

METRICS: Mapping[str, Metric] = MappingProxyType(
    {entry.name: entry for entry in (*_DEVICES, *_LINKS, *_NODES, *_STAGES, *_RUNS, *_PROCESSES)}
)
