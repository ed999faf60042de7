"""Calibration of our own runs: a slow-down for each device type, from measured steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hethub.cost.profiles.profile import Profile
from hethub.simulate.least_squares import Coefficient, Fit, Vector, fit
from hethub.simulate.validation import OwnRun, own_step_seconds
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan

__all__ = ["calibrate_own_runs"]


def calibrate_own_runs(runs: Sequence[OwnRun], profile: Profile | None = None) -> Fit:
    """Fit how much longer each device type that worked in a run takes than its figures, or its profile, say; each step
    is simulated anew.

    Raises InputError where the runs cannot bear a coefficient for each of these types.
    """
    used = [_used_types(run.plan) for run in runs]
    types = tuple(dict.fromkeys(name for own in used for name in own))
    known: dict[tuple[int, tuple[float, ...]], float] = {}

    def error(number: int, values: Vector) -> float:
        run = runs[number]
        slow = {n: float(v) for n, v in zip(types, values, strict=True) if n in used[number]}
        key = (number, tuple(slow.values()))
        if key not in known:
            known[key] = own_step_seconds(run.plan, slow, profile) / run.step_seconds - 1
        return known[key]

    def errors(values: Vector, numbers: Sequence[int]) -> Vector:
        return np.array([error(number, values) for number in numbers])

    return fit(errors, len(runs), [Coefficient(f"slow_down.{n}", 1.0, 0.05, 20.0, 1.0) for n in types])


def _used_types(plan: Plan) -> tuple[str, ...]:
    """The types of the devices that a plan uses: a cluster may have others, of which its step tells nothing."""
    devices = plan.cluster.devices()
    return tuple(dict.fromkeys(devices[d].type.name for d in lay_out(plan).used))
