"""The alerts: what a person must act on, measured against the plan's own prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hethub.telemetry.rules import JOB, Durations

__all__ = ["RUNBOOK", "Alert", "alerts"]

RUNBOOK = "docs/dashboards.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An alert rule; `wait_seconds` is how long it must hold, `keep_seconds` how long it stays after it no longer does.

    `summary` says what is, `description` what to do.
    """

    name: str
    severity: Literal["warning", "critical"]
    expression: str
    wait_seconds: float
    keep_seconds: float = 300.0
    summary: str
    description: str

    def entry(self, durations: Durations, runbook: str = RUNBOOK) -> dict[str, Any]:
        """As it stands in a rule file."""
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": durations(self.wait_seconds),
            "keep_firing_for": durations(self.keep_seconds),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook}#{self.name.lower()}",
            },
        }


def _slow(what: str, labels: str, times: float) -> str:
    """So many times the prediction, and costing over 5 % of a device's time.

    On a busy host what is small may well take much longer than predicted, and costs nobody anything.
    """
    return f"{what}:over_predicted5m > {times:g} and on ({labels}) {what}:beyond_predicted5m > 0.05"


_SLOW_DEVICE = _slow("device:hethub_device_compute_seconds", "run, node, device, device_type", 1.3)
_SLOW_LINK = _slow("link:hethub_link_transfer_seconds", "run, link, transport", 2)


def _in_state(states: str) -> str:
    return f'max by (run) (hethub_run_state{{state=~"{states}"}}) == 1'


def _standing_still(states: str, least: str) -> str:
    """No step for ten predicted ones, and not for `least` seconds."""
    return (
        "(time() - max by (run) (hethub_last_step_timestamp_seconds)"
        f" > on (run) clamp_min(10 * max by (run) (hethub_predicted_step_seconds), {least})"
        f" and on (run) {_in_state(states)})"
    )


def alerts(durations: Durations) -> list[Alert]:
    """The ten of them; their thresholds are quotients of measured and planned."""
    restarts = "hethub_restarts_total"
    return [
        Alert(
            name="NoProgress",
            severity="critical",
            # Loading weights and evaluating are no steps and may take minutes.
            expression=f"{_standing_still('training', durations.seconds(60))}"
            f" or {_standing_still('starting|recovering|evaluating', durations.seconds(600))}",
            wait_seconds=30,
            summary="{{ $labels.run }}: no step for {{ $value | humanizeDuration }}",
            description="That is more than ten predicted steps. The driver's log and `hethub status` name "
            "the device that keeps the others. If no worker moves, stop the run and resume it from the "
            "newest checkpoint.",
        ),
        Alert(
            name="RunSlowerThanPredicted",
            severity="warning",
            # Where one device or link explains it, its own alert says so.
            expression="run:hethub_step_duration_seconds:over_predicted5m > 1.2"
            f" unless on (run) ({_SLOW_DEVICE}) unless on (run) ({_SLOW_LINK})",
            wait_seconds=900,
            summary='{{ $labels.run }}: steps take {{ $value | printf "%.2f" }} times as long as predicted',
            description="No single device or link explains it. Compare busy and waiting with their "
            "prediction on the board Who waits; `hethub validate` shows which prediction is off, `hethub "
            "replan` calibrates and plans anew.",
        ),
        Alert(
            name="DeviceSlowerThanItsPrediction",
            severity="warning",
            expression=_SLOW_DEVICE,
            wait_seconds=600,
            summary="{{ $labels.run }}: {{ $labels.node }}/{{ $labels.device }} ({{ $labels.device_type }}) "
            'computes {{ $value | printf "%.2f" }} times as long as predicted',
            description="It is throttled, shares its host, or its profile is wrong; the rest of its pipeline "
            "waits for it. Look at temperature and power. If it stays, `hethub replan` gives it less "
            "work, and `exclude` in the cluster file none.",
        ),
        Alert(
            name="LinkSlow",
            severity="warning",
            expression=_SLOW_LINK,
            wait_seconds=600,
            summary="{{ $labels.run }}: link {{ $labels.link }} ({{ $labels.transport }}) takes {{ $value | "
            'printf "%.2f" }} times as long as predicted',
            description="It gives less than half of its calibrated bandwidth to messages that devices wait "
            "for. Look for another user of the network, a port that fell back to a lower rate, a changed "
            "route. If it stays, `hethub replan`.",
        ),
        Alert(
            name="LossNotFinite",
            severity="critical",
            expression="count by (run) (hethub_loss != hethub_loss or abs(hethub_loss) == Inf)"
            f' or max by (run) (increase(hethub_faults_total{{kind="not-a-number"}}[{durations(600)}])) > 0',
            wait_seconds=0,
            summary="{{ $labels.run }}: loss or gradient is no number",
            description="Look at the gradient norm before it. Go back to a checkpoint with a lower learning "
            "rate or clip_norm, or set on_failure.not_a_number.",
        ),
        Alert(
            name="CheckpointTooOld",
            severity="warning",
            # A run that stands still has its own alert, so age is counted in steps.
            expression="((max by (run) (hethub_run_step) - on (run) max by (run) "
            "(hethub_checkpoint_last_success_step)) or max by (run) (hethub_steps_total)) > on (run) 3 * "
            "max by (run) (hethub_checkpoint_interval_steps)",
            wait_seconds=60,
            summary="{{ $labels.run }}: {{ $value }} steps since the last checkpoint",
            description="That is more than three of the job's intervals, and all of it is lost with the next "
            "failure. The driver's log says why checkpoints are given up: mostly a full or slow disk.",
        ),
        Alert(
            name="GoodputLow",
            severity="warning",
            expression="1 - run:hethub_lost_seconds:ratio1h < 0.9",
            wait_seconds=300,
            summary="{{ $labels.run }}: {{ $value | humanizePercentage }} goodput over the last hour",
            description="Failures or checkpoints take the rest. The panel Lost seconds by cause says which. "
            "Failures: exclude the device that fails. Checkpoints: make them less often.",
        ),
        Alert(
            name="MemoryNearLimit",
            severity="warning",
            # A plan may fill a device on purpose; what matters is that it is fuller than planned.
            expression="max by (run, node, device, device_type) (hethub_device_memory_peak_bytes) / on (run, "
            "node, device, device_type) max by (run, node, device, device_type) "
            "(hethub_device_memory_limit_bytes) > 0.95 and on (run, node, device, device_type) max by "
            "(run, node, device, device_type) (hethub_device_memory_peak_bytes) > on (run, node, device, "
            "device_type) 1.01 * max by (run, node, device, device_type) "
            "(hethub_device_predicted_memory_bytes)",
            wait_seconds=300,
            summary="{{ $labels.run }}: {{ $labels.node }}/{{ $labels.device }} ({{ $labels.device_type }}) "
            "has used {{ $value | humanizePercentage }} of its memory, more than planned",
            description="The next longer batch may not fit. Look for another process on the device; raise "
            "memory_reserve_gib of the type in the cluster file and plan anew.",
        ),
        Alert(
            name="RestartLoop",
            severity="critical",
            # increase() extrapolates, so that three restarts might count as more.
            expression=f"max by (run) ({restarts} - min_over_time({restarts}[{durations(1800)}])) > 3",
            wait_seconds=0,
            summary="{{ $labels.run }}: {{ $value }} restarts in half an hour",
            description="The run fails again and again. The panel Faults by cause and the driver's log say "
            "why and on which device: exclude it, or stop the run.",
        ),
        Alert(
            name="TargetMissing",
            severity="warning",
            expression=f'up{{job="{JOB}"}} == 0'
            f" or {_in_state('training')} unless on (run) hethub_node_devices",
            wait_seconds=120,
            summary="{{ $labels.run }}{{ $labels.instance }}: no metrics",
            description="The driver or a node's agent does not answer: it died, or a firewall stands "
            "between. `hethub status` says whether the run goes on; figures of the devices behind it are "
            "missing on all boards.",
        ),
    ]
