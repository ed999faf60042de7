"""What a run gave: its figures, its files, its pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hethub.launch.compiled import Compiled
from hethub.simulate.comparison import WARM_UP_STEPS
from hethub.timeline.gantt import write_gantt
from hethub.timeline.record import Timeline
from hethub.timeline.summary import DeviceSummary, step_numbers, step_seconds, summarize
from hethub.timeline.trace import write_chrome_trace

__all__ = ["RunOutcome", "draw", "median_step_seconds", "summary_of", "write_metrics"]


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One plan's run: per step loss and norm, the timeline of its last attempt, the held-out losses by steps done, and
    each device's peak memory where it is counted.

    `stopped` is set where it was asked to stop before its end.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    timeline: Timeline
    held_out: tuple[tuple[int, float], ...]
    step_seconds: float
    peak_bytes: Mapping[int, int | None]
    stopped: bool = False


def median_step_seconds(timeline: Timeline, held_out: Sequence[tuple[int, float]]) -> float:
    """Median over the steps after the third, leaving out those that begin with an evaluation before them."""
    seconds = step_seconds(timeline)
    after_evaluation = {step for step, _ in held_out}
    warm = min(WARM_UP_STEPS, len(seconds) - 1)
    numbered = list(zip(step_numbers(timeline).tolist(), seconds.tolist(), strict=True))[warm:]
    counted = [s for number, s in numbered if number not in after_evaluation]
    return float(statistics.median(counted or seconds[-1:].tolist()))


def summary_of(run: RunOutcome, compiled: Compiled, scale: float, unigram: float | None) -> dict[str, Any]:
    """The figures of one run; tokens per second and shares are in modelled time where devices are emulated. Losses are
    those of the whole run, times those of its last attempt."""
    workload = compiled.plan.workload
    tokens = workload.global_batch * workload.sequence_length
    numbers = step_numbers(run.timeline).tolist()
    devices = summarize(run.timeline, numbers[min(WARM_UP_STEPS, len(numbers) - 1)], numbers[-1])
    used = [devices[d] for d in compiled.program.layout.used]
    speed = tokens / run.step_seconds
    bound = compiled.figures["bounds"]["homogeneous_tokens_per_second"]
    physical = compiled.figures["bounds"]["physical_tokens_per_second"]
    return {
        "steps": len(run.losses),
        "loss_first": _finite(run.losses[0]),
        "loss_last": _finite(run.losses[-1]),
        "heldout_loss": run.held_out[-1][1] if run.held_out else None,
        "unigram_loss": unigram,
        "step_seconds": run.step_seconds,
        "predicted_step_seconds": compiled.predicted_step_seconds,
        "tokens_per_second": speed,
        "predicted_tokens_per_second": tokens / compiled.predicted_step_seconds,
        "wall_tokens_per_second": speed / scale,
        "share_of_prediction": compiled.predicted_step_seconds / run.step_seconds,
        "share_of_homogeneous_bound": speed / bound if bound else None,
        "share_of_physical_bound": speed / physical,
        "busy_ratio": statistics.fmean(d.busy_ratio for d in used),
        "emulated": compiled.plan.cluster.emulated_time_scale is not None,
        "time_scale": scale,
        "overrun_ratio": _weighted(used, "overrun_ratio"),
        "real_math_ratio": max(d.real_ratio for d in used),
        "unaccounted_ratio": max(d.unaccounted_ratio for d in used),
        "devices": [asdict(d) for d in devices],
        "peak_bytes": {
            devices[d].device: {"predicted": peak, "measured": run.peak_bytes.get(d)}
            for d, peak in compiled.peak_bytes.items()
        },
    }


def _finite(number: float) -> float | None:
    """JSON has no other numbers; None is a step whose loss was none."""
    return number if math.isfinite(number) else None


def _weighted(devices: Sequence[DeviceSummary], ratio: str) -> float:
    """Mean over devices, each counting by its actions."""
    total = sum(d.actions for d in devices)
    return sum(float(getattr(d, ratio)) * d.actions for d in devices) / total if total else 0.0


def write_metrics(path: Path, outcome: RunOutcome) -> None:
    """One line of JSON per step: step, loss, gradient norm, and the held-out loss where it was measured after it."""
    held_out = {step - 1: loss for step, loss in outcome.held_out}
    lines = [
        json.dumps(
            {
                "step": i,
                "loss": _finite(loss),
                "grad_norm": _finite(norm),
                **({"heldout_loss": held_out[i]} if i in held_out else {}),
            }
        )
        for i, (loss, norm) in enumerate(zip(outcome.losses, outcome.norms, strict=True))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(folder: Path, compiled: Compiled, outcome: RunOutcome) -> None:
    """timeline.html and trace.json of the step whose time is the median."""
    seconds = step_seconds(outcome.timeline)
    typical = int(step_numbers(outcome.timeline)[np.argmin(np.abs(seconds - outcome.step_seconds))])
    write_chrome_trace(folder / "trace.json", [compiled.predicted, outcome.timeline], [typical])
    write_gantt(
        folder / "timeline.html", compiled.predicted, outcome.timeline, typical, compiled.plan.cluster.name
    )
