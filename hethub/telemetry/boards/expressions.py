"""The PromQL that boards share: selectors, shares of time, and what belongs to the chosen run.

A device's counters advance once a step, so a rate over less than a few steps jumps between nothing and too much.
Shares are therefore quotients of two rates over one window, which holds for any window that has a step in it; its
length is the board's `window` variable. What only concerns the run is reduced with `max by (run)`, which does not fail
while two targets of one run are known.

Rates of an emulated run are of wall time. Multiplied by the time scale (1 on real devices) they are what the modelled
cluster would show.
"""

from __future__ import annotations

__all__ = ["DEVICES", "RUN", "SCALE", "WAITING", "predicted_share", "rate", "run_value", "share", "slowdown"]

RUN = 'run="$run"'
DEVICES = f'{RUN}, device_type=~"$device_type", node=~"$node", device=~"$device"'
IN_STEPS = 'activity!~"checkpoint|evaluation|stalled"'
WAITING = 'activity=~"exposed_communication|bubble|idle"'
_SECONDS = "hethub_device_seconds_total"


def rate(metric: str, selector: str = RUN) -> str:
    """The rate of a counter over the board's window."""
    return f"rate({metric}{{{selector}}}[$window])"


def run_value(metric: str, *labels: str) -> str:
    """A gauge of the chosen run, one series; `labels` are further matchers."""
    return f"max by (run) ({metric}{{{', '.join((RUN, *labels))}}})"


SCALE = run_value("hethub_time_scale_ratio")


def share(which: str, *by: str, of: str = IN_STEPS) -> str:
    """The share of the chosen devices' time that a matcher of activities takes, for each value of `by`.

    `of` matches what is the whole: the time in training steps, as of predictions, or all time where it is empty. With
    `activity` or `kind` in `by` each has a series of its own; they are shares of the same whole.
    """
    part = f"sum by ({', '.join(by)}) ({rate(_SECONDS, _joined(DEVICES, which))})"
    whole_by = [label for label in by if label not in {"activity", "kind"}]
    whole = f"sum by ({', '.join(whole_by)}) ({rate(_SECONDS, _joined(DEVICES, of))})"
    match = f"on ({', '.join(whole_by)})" + (" group_left ()" if len(whole_by) < len(by) else "")
    return f"{part} / {match} {whole}"


def _joined(*matchers: str) -> str:
    return ", ".join(filter(None, matchers))


def predicted_share(activities: str, *by: str) -> str:
    """What the plan predicts for the same: the mean over the devices of the stages, for each value of `by`."""
    chosen = f'{RUN}, device_type=~"$device_type"'
    devices = f"hethub_stage_devices{{{chosen}}}"
    part = (
        f"hethub_stage_predicted_ratio{{{chosen}, {activities}}}"
        f" * on (run, pipeline, stage, device_type) group_left () {devices}"
    )
    labels = ", ".join(by)
    return f"sum by ({labels}) ({part}) / on ({labels}) sum by ({labels}) ({devices})"


def slowdown(measured: str, predicted: str, selector: str, *by: str) -> str:
    """Measured over predicted seconds of the same work: 1 as planned, 2 twice as slow."""
    labels = ", ".join(by)
    return (
        f"sum by ({labels}) ({rate(measured, selector)})"
        f" / on ({labels}) (sum by ({labels}) ({rate(predicted, selector)}) > 0)"
    )
