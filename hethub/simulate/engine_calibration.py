"""Calibration of other engines' runs: the few coefficients of `Coefficients`, from measured steps and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from hethub.cost.engine_prices import Coefficients
from hethub.cost.footprint import stage_footprint
from hethub.cost.profiles.profile import Profile
from hethub.simulate.engine_run import predict_engine_run
from hethub.simulate.imported_runs import MeasuredRun
from hethub.simulate.least_squares import Coefficient, Fit, Vector, fit

__all__ = [
    "EngineCalibration",
    "MemoryFit",
    "calibrate_memory",
    "calibrate_overhead",
    "calibrate_time",
    "platforms",
]

_PAUSE = "host_pause_seconds"
# A pause is a wake-up, one engine instruction in Python and a first launch: less than launching a whole layer, whose
# forward takes 1.2 ms where launches bound it (GH200, degree 1, one row).
_LONGEST_PAUSE = 1.2e-3


@dataclass(frozen=True, slots=True)
class EngineCalibration:
    """What was fitted: coefficients for predictions, and the fit behind them."""

    coefficients: Coefficients
    fit: Fit


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """Bytes beside the allocator's peak (median over runs), and each run's error under the others' median."""

    overhead_bytes: float
    left_out_errors: tuple[float, ...]


def _device_types(run: MeasuredRun) -> tuple[str, ...]:
    """The device types that a run uses, in order of first use."""
    return tuple(dict.fromkeys(g.device_type for s in run.run.stages for g in s.replicas))


def calibrate_time(runs: Sequence[MeasuredRun], profile: Profile) -> EngineCalibration:
    """Fit a slow-down for each device type that the runs use, and the host's pause after a received message.

    Raises InputError where the runs cannot bear them.
    """
    types = tuple(dict.fromkeys(name for run in runs for name in _device_types(run)))
    coefficients = [Coefficient(f"slow_down.{name}", 1.0, 0.5, 2.0, 1.0) for name in types]
    coefficients.append(Coefficient(_PAUSE, 5e-4, 0.0, _LONGEST_PAUSE, 1e-3))
    known: dict[tuple[int, tuple[float, ...]], float] = {}

    def errors(values: Vector, numbers: Sequence[int]) -> Vector:
        return np.array([error(number, values) for number in numbers])

    def error(number: int, values: Vector) -> float:
        measured = runs[number]
        slow = {name: float(values[types.index(name)]) for name in _device_types(measured)}
        key = (number, (*slow.values(), float(values[-1])))
        if key not in known:
            chosen = Coefficients(slow, float(values[-1]))
            predicted = predict_engine_run(measured.run, profile, chosen)
            known[key] = predicted.step_seconds / measured.seconds - 1
        return known[key]

    found = fit(errors, len(runs), coefficients)
    slow = dict(zip(types, found.values[:-1], strict=True))
    return EngineCalibration(Coefficients(slow, found.values[-1]), found)


def calibrate_memory(runs: Sequence[MeasuredRun]) -> MemoryFit:
    """One overhead for runs of one platform: context, communication libraries and the allocator's reserve."""
    measured = [run for run in runs if run.peak_bytes is not None]
    rest = [run.peak_bytes - _allocated(run) for run in measured if run.peak_bytes is not None]
    errors = []
    for number, run in enumerate(measured):
        others = median(rest[:number] + rest[number + 1 :])
        assert run.peak_bytes is not None
        errors.append((_allocated(run) + others) / run.peak_bytes - 1)
    return MemoryFit(median(rest), tuple(errors))


def platforms(runs: Sequence[MeasuredRun]) -> tuple[frozenset[str], ...]:
    """Device types that runs use together, directly or by way of others: one installation, one overhead."""
    found: list[frozenset[str]] = []
    for run in runs:
        types = frozenset(_device_types(run))
        joined = [group for group in found if group & types]
        found = [group for group in found if group not in joined]
        found.append(types.union(*joined))
    return tuple(found)


def calibrate_overhead(runs: Sequence[MeasuredRun]) -> dict[str, MemoryFit]:
    """An overhead for every device type of each platform that has two runs with a measured peak."""
    fits: dict[str, MemoryFit] = {}
    for group in platforms(runs):
        chosen = [run for run in runs if group & set(_device_types(run)) and run.peak_bytes is not None]
        if len(chosen) > 1:
            fits |= dict.fromkeys(sorted(group), calibrate_memory(chosen))
    return fits


def _allocated(run: MeasuredRun) -> float:
    return max(stage_footprint(run.run, n).allocated_bytes for n in range(len(run.run.stages)))
