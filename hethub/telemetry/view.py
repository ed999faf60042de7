"""What `hethub top` shows of a run: figures of the run and of every device, from two looks at its endpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hethub.telemetry.metrics import ACTIVITY_OF_KIND
from hethub.telemetry.scrape import Look, Samples, rates

__all__ = ["ACTIVITIES", "DeviceView", "RunView", "view_of"]

ACTIVITIES = tuple(dict.fromkeys(ACTIVITY_OF_KIND.values()))
"""What a device's time goes to, in the order of the bars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device. `shares` of its time between the looks by activity add up to 1, where it did a step; `pace` is its
    compute over the predicted. None: not known."""

    name: str
    device_type: str
    stage: str
    shares: dict[str, float]
    pace: float | None
    memory_bytes: float | None
    memory_limit_bytes: float | None
    watts: float | None
    celsius: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run. Tokens per second are modelled where devices are emulated; shares are of prediction and bounds."""

    run: str
    state: str
    emulated: bool
    step: int | None
    steps: int | None
    loss: float | None
    heldout_loss: float | None
    tokens_per_second: float | None
    predicted_tokens_per_second: float | None
    share_of_prediction: float | None
    share_of_homogeneous_bound: float | None
    share_of_physical_bound: float | None
    mfu: float | None
    goodput: float | None
    seconds_left: float | None
    devices: tuple[DeviceView, ...]
    alerts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def view_of(before: Look, after: Look, alerts: tuple[str, ...] = ()) -> RunView:
    """The figures between two looks; `alerts` are shown with those that the looks themselves give."""
    now, grown = after.samples, rates(before, after)
    info = next((labels for labels, _ in now.of("hethub_run_info")), {})
    scale = now.one("hethub_time_scale_ratio") or 1.0
    wall = grown.total("hethub_tokens_total")
    speed = None if wall is None else wall * scale
    predicted = now.one("hethub_predicted_tokens_per_second")
    # A rate of the exporter's table is of wall time; what the plan predicts is shown as modelled.
    expected = None if predicted is None else predicted * scale
    step, steps = now.one("hethub_run_step"), now.one("hethub_run_steps")
    pace = grown.total("hethub_steps_total")
    left = (steps - step) / pace if steps is not None and step is not None and pace else None
    state = next((labels["state"] for labels, value in now.of("hethub_run_state") if value == 1), "unknown")
    return RunView(
        run=info.get("run", "?"),
        state=state,
        emulated=info.get("emulated") == "true",
        step=None if step is None else int(step),
        steps=None if steps is None else int(steps),
        loss=now.one("hethub_loss"),
        heldout_loss=now.one("hethub_held_out_loss"),
        tokens_per_second=speed,
        predicted_tokens_per_second=expected,
        share_of_prediction=speed / expected if speed is not None and expected else None,
        share_of_homogeneous_bound=now.one("hethub_bound_share_ratio", bound="homogeneous"),
        share_of_physical_bound=now.one("hethub_bound_share_ratio", bound="physical"),
        mfu=now.one("hethub_mfu_ratio"),
        goodput=now.one("hethub_goodput_ratio"),
        seconds_left=left,
        devices=tuple(_devices(now, grown)),
        alerts=(*alerts, *(f"{target} does not answer" for target in after.silent)),
    )


def _devices(now: Samples, grown: Samples) -> list[DeviceView]:
    found = []
    for labels, _ in sorted(now.of("hethub_device_info"), key=lambda entry: _name(entry[0])):
        own = {key: labels[key] for key in ("node", "device")}
        times = {activity: grown.total("hethub_device_seconds_total", activity=activity, **own) or 0.0
                 for activity in ACTIVITIES}  # fmt: skip
        whole = sum(times.values())
        compute = grown.one("hethub_device_compute_seconds_total", **own)
        expected = grown.one("hethub_device_predicted_compute_seconds_total", **own)
        found.append(
            DeviceView(
                name=_name(labels),
                device_type=labels.get("device_type", "?"),
                stage=labels.get("stage", ""),
                shares={activity: seconds / whole for activity, seconds in times.items()} if whole else {},
                pace=compute / expected if compute is not None and expected else None,
                memory_bytes=now.one("hethub_device_memory_used_bytes", **own),
                memory_limit_bytes=now.one("hethub_device_memory_limit_bytes", **own),
                watts=now.one("hethub_device_power_watts", **own),
                celsius=now.one("hethub_device_temperature_celsius", **own),
            )
        )
    return found


def _name(labels: dict[str, str]) -> str:
    return f"{labels.get('node', '?')}/{labels.get('device', '?')}"
