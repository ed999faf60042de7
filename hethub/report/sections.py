"""The sections of a report. Each takes the runs that stand side by side; None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import PurePath

from hethub.cost.memory import usable_bytes
from hethub.report.charts import PALETTE, Bar, bars, heat_map, lines, stacked
from hethub.report.data import RunData
from hethub.report.markup import Html, element, joined, table
from hethub.report.pictures import gantt, split
from hethub.telemetry.peaks import Peak
from hethub.timeline.panels import panel_of
from hethub.timeline.waterfall import CAUSES

__all__ = ["SECTIONS"]

Runs = Sequence[RunData]

_MIB = 2.0**20
_MOST_BARS = 4000  # of one panel: then a page stays below a few MB
_MOST_ROWS = 64  # devices in a chart
_CAUSE_COLOURS = dict(
    zip(
        CAUSES,
        ("#0072B2", "#CC79A7", "#F5D0A9", "#E8A558", "#D9D9D9", "#D55E00", "#F0A07A", "#C2693B", "#009E73",
         "#7FBFA8", "#4FA3D1", "#332288", "#EFEFEF", "#555555"),
        strict=True,
    )
)  # fmt: skip
_SHARES = {
    "busy": PALETTE[0],
    "recompute": PALETTE[3],
    "exposed_communication": PALETTE[5],
    "bubble": "#C8CDD2",
    "idle": "#EBEEF0",
    "unaccounted": "#555555",
}


def _each(runs: Runs, make: Callable[[RunData], Html | None]) -> Html | None:
    """A block a run, under its name where there are several."""
    found = [(run, content) for run in runs if (content := make(run)) is not None]
    if not found:
        return None
    return joined(
        [joined(element("h3", run.name) if len(runs) > 1 else None, content) for run, content in found]
    )


# --- figures ------------------------------------------------------------------------------------------------------


def _summary(runs: Runs) -> Html:
    columns = [_facts(run) for run in runs]
    rows = [
        (name, *(column.get(name, "") for column in columns))
        for name in dict.fromkeys(name for column in columns for name in column)
    ]
    headings = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    lacking = [
        element("p", f"not shown of {run.name}: {words}", class_="how")
        for run in runs
        for words in run.lacking
    ]
    return joined(table(headings, rows), _gain(runs), lacking)


def _gain(runs: Runs) -> Html | None:
    speeds = [_speed(run) for run in runs]
    if len(runs) != 2 or speeds[0] is None or speeds[1] is None:
        return None
    return element("p", f"{runs[1].name} is {speeds[1] / speeds[0]:.3f} times as fast as {runs[0].name}.")


def _speed(run: RunData) -> float | None:
    """Measured tokens per second, in modelled time where devices are emulated."""
    if run.step_seconds is None or run.tokens_per_step is None:
        return None
    return run.tokens_per_step / run.step_seconds


def _facts(run: RunData) -> dict[str, str]:
    state = run.state
    facts = {"state": state.state + (f": {state.why}" if state.why else "")}
    facts["started"] = _moment(state.started_unix_seconds)
    if state.ended_unix_seconds is not None:
        facts["ended"] = _moment(state.ended_unix_seconds)
    facts["steps"] = f"{state.steps_done} of {'?' if state.steps is None else state.steps}"
    if run.plan is not None:
        work, cluster = run.plan.workload, run.plan.cluster
        facts["model"] = (
            f"{work.model.name}, {work.precision}, {work.global_batch} × {work.sequence_length} tokens"
        )
        facts["devices"] = f"{len(state.devices)} of {len(cluster.devices())} of {cluster.name}"
    facts |= _speeds(run)
    if state.loss is not None:
        facts["loss"] = f"{state.loss:.4f}"
    if state.heldout_loss is not None:
        facts["held-out loss"] = f"{state.heldout_loss:.4f}"
    if state.restarts:
        facts["began again"] = f"{state.restarts} times"
    return facts


def _speeds(run: RunData) -> dict[str, str]:
    found: dict[str, str] = {}
    tokens = run.tokens_per_step
    comparison, speed, seconds = run.comparison, _speed(run), run.step_seconds
    if comparison is not None and seconds is not None:
        found["step time, predicted"] = f"{comparison.predicted_step_seconds:.4g} s"
        found["step time, measured"] = f"{seconds:.4g} s (median)"
        found["steps that count"] = f"{comparison.first} to {comparison.last}"
        found["measured speed over predicted"] = _percent(comparison.predicted_step_seconds / seconds)
    elif run.plan is not None and run.plan.prediction is not None and tokens is not None:
        found["step time, predicted"] = f"{run.plan.prediction.get('step_seconds', float('nan')):.4g} s"
    if speed is not None:
        found["tokens per second"] = f"{speed:,.0f}"
        bounds = (run.plan.bounds if run.plan is not None else None) or {}
        for key, name in (("homogeneous", "homogeneous"), ("physical", "physical")):
            bound = bounds.get(f"{key}_tokens_per_second")
            if bound:
                found[f"share of the {name} bound"] = _percent(speed / bound)
    summary = run.summary or {}
    if summary.get("emulated"):
        valid = "" if summary.get("overrun_ratio", 0.0) <= 0.01 else ": THIS RUN IS INVALID"
        found["time scale"] = (
            f"{summary.get('time_scale', float('nan')):.4g} wall seconds per modelled second"
        )
        found["overruns"] = _percent(summary.get("overrun_ratio", float("nan")), 2) + " of actions" + valid
    return found


def _percent(ratio: float, digits: int = 1) -> str:
    return f"{100 * ratio:.{digits}f} %"


def _moment(unix_seconds: float | None) -> str:
    if unix_seconds is None:
        return "?"
    return datetime.fromtimestamp(unix_seconds).astimezone().isoformat(sep=" ", timespec="seconds")


# --- pictures -----------------------------------------------------------------------------------------------------


def _split(runs: Runs) -> Html | None:
    return _each(runs, lambda run: None if run.plan is None else split(run.plan))


def _gantt(runs: Runs) -> Html | None:
    def chart(run: RunData) -> Html | None:
        if run.predicted is None:
            return None
        panels = [panel_of(run.predicted, 0, "predicted step", _MOST_BARS)]
        if run.comparison is not None and run.step is not None:
            title = f"measured step {run.step}"
            panels.append(panel_of(run.comparison.measured, run.step, title, _MOST_BARS))
        return gantt(panels)

    return _each(runs, chart)


def _waterfall(runs: Runs) -> Html | None:
    rows: list[tuple[str, Mapping[str, float]]] = []
    for run in runs:
        if run.comparison is not None:
            name = f"{run.name}, " if len(runs) > 1 else ""
            rows.append((f"{name}predicted", run.comparison.predicted_waterfall.total))
            rows.append((f"{name}measured", run.comparison.measured_waterfall.total))
    if not rows:
        return None
    shown = [cause for cause in CAUSES if any(shares[cause] >= 5e-5 for _, shares in rows)]
    cells = [(cause, *(_percent(shares[cause], 2) for _, shares in rows), CAUSES[cause]) for cause in shown]
    colours = {cause: _CAUSE_COLOURS[cause] for cause in shown}
    return joined(
        stacked(rows, colours, "the waterfall of lost time"),
        table(["cause", *(name for name, _ in rows), "what it is"], cells),
    )


def _devices(runs: Runs) -> Html | None:
    def chart(run: RunData) -> Html | None:
        if run.comparison is None:
            return None
        used = set(run.state.devices)
        pairs = zip(run.comparison.predicted_devices, run.comparison.measured_devices, strict=True)
        rows = []
        for predicted, measured in [pair for pair in pairs if pair[1].device in used][:_MOST_ROWS]:
            for word, one in (("predicted", predicted), ("measured", measured)):
                shares = {share: getattr(one, f"{share}_ratio") for share in _SHARES}
                rows.append((f"{one.device} {word}", shares))
        more = len(used) - _MOST_ROWS
        return joined(
            stacked(rows, _SHARES, "where every device's time went"),
            element("p", f"and {more} devices more", class_="how") if more > 0 else None,
        )

    return _each(runs, chart)


def _memory(runs: Runs) -> Html | None:
    def chart(run: RunData) -> Html | None:
        if not run.peaks or run.plan is None:
            return None
        limits = {device.name: usable_bytes(device.type) for device in run.plan.cluster.devices()}
        rows = [
            Bar(
                device,
                {
                    word: None if size is None else size / _MIB
                    for word, size in zip(Peak._fields, peak, strict=True)
                },
                limits[device] / _MIB if device in limits else None,
            )
            for device, peak in list(run.peaks.items())[:_MOST_ROWS]
        ]
        return bars(rows, "MiB", "peak memory of every device")

    return _each(runs, chart)


def _loss(runs: Runs) -> Html | None:
    series: list[tuple[str, Sequence[float], Sequence[float]]] = []
    for run in runs:
        name = f"{run.name}, " if len(runs) > 1 else ""
        for word, points in (("training loss", run.losses), ("held-out loss", run.held_out)):
            if points:
                series.append((name + word, [x for x, _ in points], [y for _, y in points]))
    return lines(series, "steps done", "nats per token") if series else None


def _messages(runs: Runs) -> Html | None:
    def chart(run: RunData) -> Html | None:
        sizes = run.messages()
        if not sizes:
            return None
        names, level = _ends(sizes)
        place = {name: number for number, name in enumerate(names)}
        summed: dict[tuple[int, int], float] = {}
        for (source, destination), size in sizes.items():
            key = (place[_cut(source, level)], place[_cut(destination, level)])
            summed[key] = summed.get(key, 0.0) + size / _MIB
        origin = "as predicted" if run.comparison is None else f"in measured step {run.step}"
        words = f"{sum(summed.values()):,.1f} MiB {origin}; rows send to columns"
        return joined(element("p", words), heat_map(names, summed, "MiB a step", "bytes between devices"))

    return _each(runs, chart)


def _ends(sizes: Mapping[tuple[str, str], float]) -> tuple[list[str], int]:
    """The rows of the matrix, and how many parts of a device's name they keep: devices, or nodes, or groups where there
    are too many."""
    names: list[str] = []
    for level in (3, 2, 1):
        names = list(dict.fromkeys(_cut(name, level) for pair in sizes for name in pair))
        if len(names) <= _MOST_ROWS // 2:
            return sorted(names), level
    return sorted(names), 1


def _cut(device: str, level: int) -> str:
    return "/".join(device.split("/")[:level])


def _energy(runs: Runs) -> Html | None:
    def shown(run: RunData) -> Html | None:
        predicted = (run.plan.prediction if run.plan is not None else None) or {}
        rows = [
            ("joules per token", predicted.get("joules_per_token"), run.measured_joules_per_token()),
            (
                "USD per million tokens",
                predicted.get("usd_per_million_tokens"),
                run.measured_usd_per_million_tokens(),
            ),
        ]
        if all(before is None and after is None for _, before, after in rows):
            return element("p", "The cluster file gives neither power_watts nor usd_per_hour of all types.")
        cells = [
            (name, *("not known" if v is None else f"{v:.6g}" for v in values)) for name, *values in rows
        ]
        return table(["", "predicted", "at measured times"], cells)

    return _each(runs, shown)


def _events(runs: Runs) -> Html | None:
    def shown(run: RunData) -> Html | None:
        rows = []
        for event in run.events:
            words = [event.cause, event.device, event.action, event.reason]
            words += [f"without {', '.join(event.lost)}"] if event.lost else []
            words += [f"held-out loss {event.loss:.4f}"] if event.loss is not None else []
            words += [f"{key.replace('_', ' ')} {value:.3g}" for key, value in event.seconds.items()]
            told = ", ".join(word for word in words if word)
            rows.append(
                (_moment(event.at_unix_seconds), event.event.replace("_", " "), str(event.attempt),
                 str(event.step), told)
            )  # fmt: skip
        return table(["when", "what", "attempt", "step", ""], rows) if rows else None

    return _each(runs, shown)


def _environment(runs: Runs) -> Html | None:
    def shown(run: RunData) -> Html | None:
        told = run.mark.get("environment")
        rows = [("hethub", str(run.mark.get("hethub", "?")))]
        rows += [(str(k), str(v)) for k, v in told.items()] if isinstance(told, dict) else []
        job = run.mark.get("job_file")
        rows += [("job file", PurePath(str(job)).name)] if job is not None else []
        return table(["", "version or fact"], rows)

    return _each(runs, shown)


SECTIONS: Mapping[str, tuple[str, str, Callable[[Runs], Html | None]]] = {
    "summary": ("Summary", "Speeds are of the median of the steps that count.", _summary),
    "split": (
        "The split",
        "Who holds which layers and how many rows of every micro-batch; hover for the shares of each rank.",
        _split,
    ),
    "gantt": (
        "One step",
        "A lane a device, the predicted step above the measured one of median time; hover for what a bar is.",
        _gantt,
    ),
    "waterfall": (
        "Lost time",
        "What took the time of all devices together, weighed by their speed. Only busy and recompute are work.",
        _waterfall,
    ),
    "devices": ("Devices", "Shares of the measured steps, beside the prediction.", _devices),
    "memory": (
        "Memory",
        "Peak of every device in MiB, predicted and (where it is counted) measured; the line is what it can use.",
        _memory,
    ),
    "loss": ("Loss", "As all devices recorded it, over all attempts.", _loss),
    "messages": ("Communication", "Bytes that devices send each other in a step; darker is more.", _messages),
    "energy": (
        "Energy and money",
        "By the cluster file's powers and prices. At measured times: without what priced links cost.",
        _energy,
    ),
    "events": (
        "Events",
        "The driver's journal: attempts, failures, evaluations, drift and the end.",
        _events,
    ),
    "environment": ("Environment", "What the driver ran on.", _environment),
}
"""Section -> heading, how to read it, and what makes it."""
