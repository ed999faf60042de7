"""Predicted against measured, run by run: our own run folders and imported runs of other engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hethub.cost.compute import ComputeModel
from hethub.cost.engine_prices import Coefficients
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import Profile
from hethub.errors import InputError
from hethub.simulate.comparison import load_timelines, predicted_step_seconds
from hethub.simulate.engine_run import predict_engine_run
from hethub.simulate.imported_runs import MeasuredRun
from hethub.simulate.modelled import steady_step_seconds, steady_timeline
from hethub.specs.plan import Plan, load_plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import DeviceSummary, step_numbers, step_seconds, summarize

__all__ = [
    "Calibration",
    "OwnRun",
    "RunCheck",
    "check_imported_run",
    "check_own_run",
    "load_calibration",
    "load_own_run",
    "own_step_seconds",
]

_TERMS = ("busy", "recompute", "exposed_communication", "bubble", "idle", "unaccounted")
_SLOW, _PAUSE, _OVERHEAD = "slow_down.", "host_pause_seconds", "overhead_bytes."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCheck:
    """One run. `terms` are measured less predicted seconds of a step by cause, the mean over devices, where the run
    recorded causes; `substitutes` what stands in for missing profiles. Bytes are the fullest device's, of our own runs
    those of the device furthest off; None where they were not measured."""

    name: str
    emulated: bool
    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: float | None
    measured_bytes: float | None
    terms: Mapping[str, float]
    substitutes: tuple[str, ...] = ()

    @property
    def time_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def memory_error(self) -> float | None:
        """The same for bytes."""
        if self.predicted_bytes is None or self.measured_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def worst_term(self) -> str | None:
        """The cause whose seconds are furthest off."""
        return max(self.terms, key=lambda name: abs(self.terms[name])) if self.terms else None


@dataclass(frozen=True, slots=True)
class OwnRun:
    """A run folder: its plan, both timelines, the median measured step after the warm-up, and (predicted, measured)
    peak bytes of each device that counted them."""

    name: str
    plan: Plan
    predicted: Timeline
    measured: Timeline
    first_step: int
    last_step: int
    step_seconds: float
    peak_bytes: tuple[tuple[float, float], ...] = ()


def load_own_run(folder: Path) -> OwnRun:
    """Read a folder that `hethub launch` wrote. Raises InputError where it lacks something."""
    plan, _ = load_plan(folder / "plan.yaml")
    predicted, measured, first, last = load_timelines(folder)
    chosen = step_seconds(measured)[step_numbers(measured) >= first]
    return OwnRun(
        str(folder),
        plan,
        predicted,
        measured,
        first,
        last,
        float(np.median(chosen)),
        _peak_bytes(folder / "summary.json"),
    )


def _peak_bytes(path: Path) -> tuple[tuple[float, float], ...]:
    """What a run's summary has of peak memory; nothing where devices did not count it."""
    try:
        written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("peak_bytes", {})
        return tuple(
            (float(entry["predicted"]), float(entry["measured"]))
            for entry in written.values()
            if entry["measured"] is not None
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no summary of a run ({error}). Run the job again.") from None


def own_step_seconds(plan: Plan, slow_down: Mapping[str, float], profile: Profile | None = None) -> float:
    """A plan's step on slowed devices, between two others."""
    return steady_step_seconds(plan, _compute(plan, slow_down, profile))


def _compute(plan: Plan, slow_down: Mapping[str, float], profile: Profile | None) -> ComputeModel:
    return ComputeModel(CostGraph(plan.cluster), plan.workload, profile, slow_down=slow_down)


def check_own_run(
    run: OwnRun, coefficients: Coefficients | None = None, profile: Profile | None = None
) -> RunCheck:
    """Under the prediction that the run was launched with, or under `coefficients` or a profile: its seconds and their
    causes."""
    predicted = run.predicted
    if coefficients is not None or profile is not None:
        slow_down = coefficients.slow_down if coefficients else {}
        predicted = steady_timeline(run.plan, _compute(run.plan, slow_down, profile))
    before = _terms(summarize(predicted, 0, 0), 1)
    after = _terms(summarize(run.measured, run.first_step, run.last_step), run.last_step - run.first_step + 1)
    # of the device furthest off, which tells most
    peak = max(run.peak_bytes, key=lambda both: abs(both[0] / both[1] - 1), default=None)
    predicted_bytes, measured_bytes = peak or (None, None)
    return RunCheck(
        name=run.name,
        emulated=run.measured.info.emulated,
        predicted_seconds=predicted_step_seconds(predicted),
        measured_seconds=run.step_seconds,
        predicted_bytes=predicted_bytes,
        measured_bytes=measured_bytes,
        terms={name: after[name] - before[name] for name in _TERMS},
    )


def _terms(summaries: Sequence[DeviceSummary], steps: int) -> dict[str, float]:
    """Seconds of a step by cause, the mean over devices."""
    return {
        name: float(np.mean([getattr(s, f"{name}_ratio") * s.seconds / steps for s in summaries]))
        for name in _TERMS
    }


def check_imported_run(
    run: MeasuredRun, profile: Profile, coefficients: Coefficients, *, strict: bool = False
) -> RunCheck:
    """Another engine's run; the bytes are compared where an overhead is known for its devices."""
    predicted = predict_engine_run(run.run, profile, coefficients, strict=strict)
    types = {group.device_type for stage in run.run.stages for group in stage.replicas}
    known = types <= set(coefficients.overhead_bytes)
    return RunCheck(
        name=run.run.name,
        emulated=False,
        predicted_seconds=predicted.step_seconds,
        measured_seconds=run.seconds,
        predicted_bytes=predicted.peak_bytes if known else None,
        measured_bytes=run.peak_bytes,
        terms={},
        substitutes=predicted.substitutes,
    )


class Calibration(NamedTuple):
    """What `hethub calibrate` found: coefficients, whether beside a profile, and between which measured over predicted
    lies in a further run with 95 % (None in a file that does not say)."""

    coefficients: Coefficients
    profiled: bool
    ratio_interval: tuple[float, float] | None


def load_calibration(path: Path) -> Calibration:
    """What `hethub calibrate` wrote. Raises InputError, the file and the coefficient named."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        written: dict[str, Any] = content["coefficients"]
        values = {name: float(entry["value"]) for name, entry in written.items()}
        low, high = map(float, content.get("ratio_interval_95") or (0.0, 0.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no calibration ({error}). Name a file of `hethub calibrate`.") from None
    for name, value in values.items():
        if not np.isfinite(value) or value < 0 or not name.startswith((_SLOW, _PAUSE, _OVERHEAD)):
            raise InputError(f"{path}: coefficients.{name}: {value} is not usable. Calibrate again.")
    coefficients = Coefficients(
        slow_down={n.removeprefix(_SLOW): v for n, v in values.items() if n.startswith(_SLOW)},
        host_pause_seconds=values.get(_PAUSE, 0.0),
        overhead_bytes={n.removeprefix(_OVERHEAD): v for n, v in values.items() if n.startswith(_OVERHEAD)},
    )
    return Calibration(coefficients, bool(content.get("profiled")), (low, high) if 0 < low <= high else None)
