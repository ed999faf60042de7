"""Robust least squares of few named coefficients, with intervals and leave-one-out errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError, MachineError

__all__ = ["Coefficient", "Fit", "fit", "ratio_interval"]

Vector = npt.NDArray[np.float64]
Errors = Callable[[Vector, Sequence[int]], Vector]
"""Relative errors (predicted / measured - 1) of the runs with these numbers, under these coefficients."""

_RUNS_PER_COEFFICIENT = 3  # as many runs a coefficient as leave a mean error that means something
_OUTLIER = (
    0.05  # relative error from which a run counts linearly, not squared: about the runs' own repeatability
)
_STEP = 0.02  # relative step of the differences; predictions are piecewise linear, so a visible one
_EVALUATIONS = 12


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A figure to fit: where it starts, its bounds, and what a step of it is measured in."""

    name: str
    start: float
    low: float
    high: float
    scale: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients and how sure they are: `half_widths` of the 95 % intervals; errors with all runs in the fit, and of
    each run under the coefficients of the others."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    half_widths: tuple[float, ...]
    errors: tuple[float, ...]
    left_out_errors: tuple[float, ...]


def fit(errors: Errors, runs: int, coefficients: Sequence[Coefficient]) -> Fit:
    """Fit `coefficients` to the runs numbered 0 to `runs` - 1.

    Minimises the sum of soft-L1 losses of the relative errors (scipy). Raises InputError when there are fewer than
    three runs a coefficient or when the runs do not tell a coefficient, MachineError without scipy.
    """
    wanted = _RUNS_PER_COEFFICIENT * len(coefficients)
    if runs < wanted:
        raise InputError(
            f"{runs} runs cannot bear {len(coefficients)} coefficients: {wanted} are needed. "
            f"Measure more, or fit fewer."
        )
    every = list(range(runs))
    start = np.array([c.start for c in coefficients])
    values, jacobian = _solve(errors, every, coefficients, start)
    _require_told(jacobian, coefficients)
    found = errors(values, every)
    left_out = [
        float(errors(_solve(errors, [r for r in every if r != run], coefficients, values)[0], [run])[0])
        for run in every
    ]
    return Fit(
        tuple(c.name for c in coefficients),
        tuple(float(v) for v in values),
        _half_widths(jacobian, found, coefficients),
        tuple(float(e) for e in found),
        tuple(left_out),
    )


def ratio_interval(left_out_errors: Sequence[float]) -> tuple[float, float]:
    """Between which measured over predicted lies in a further run, with 95 %.

    From runs that were predicted without having been fitted to: log ratios are taken as normal, so their mean
    +- t x s x sqrt(1 + 1 / n), the interval of one more of them. Needs two runs at least.
    """
    from scipy.stats import t

    ratios = -np.log1p(np.asarray(left_out_errors))
    count = len(ratios)
    half = float(t.ppf(0.975, count - 1)) * float(ratios.std(ddof=1)) * math.sqrt(1 + 1 / count)
    middle = float(ratios.mean())
    return math.exp(middle - half), math.exp(middle + half)


def _solve(
    errors: Errors, runs: Sequence[int], coefficients: Sequence[Coefficient], start: Vector
) -> tuple[Vector, Vector]:
    """The coefficients of least loss, and the Jacobian there, by coefficient in its scale."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MachineError("calibration needs scipy. Install hethub[calibrate].") from None
    scales = np.array([c.scale for c in coefficients])
    solved = least_squares(
        lambda scaled: errors(np.asarray(scaled) * scales, runs),
        start / scales,
        bounds=(
            [c.low / c.scale for c in coefficients],
            [c.high / c.scale for c in coefficients],
        ),
        loss="soft_l1",
        f_scale=_OUTLIER,
        diff_step=_STEP,
        max_nfev=_EVALUATIONS,
        xtol=1e-4,
        ftol=1e-4,
    )
    return np.asarray(solved.x) * scales, np.asarray(solved.jac)


def _require_told(jacobian: Vector, coefficients: Sequence[Coefficient]) -> None:
    """Refuse a coefficient that no run depends on, and such as only act together."""
    for coefficient, column in zip(coefficients, jacobian.T, strict=True):
        if not np.any(np.abs(column) > 1e-6):
            raise InputError(f"no run depends on {coefficient.name}. Leave it out, or add a run that does.")
    if np.linalg.matrix_rank(jacobian, tol=1e-3 * float(np.linalg.norm(jacobian, 2))) < len(coefficients):
        names = ", ".join(c.name for c in coefficients)
        raise InputError(f"the runs do not tell {names} from each other. Fit fewer, or add unlike runs.")


def _half_widths(jacobian: Vector, errors: Vector, coefficients: Sequence[Coefficient]) -> tuple[float, ...]:
    """95 % intervals of the linearised fit: t x sqrt(diagonal of s^2 (J'J)^-1), s^2 from the residuals."""
    from scipy.stats import t

    free = len(errors) - len(coefficients)
    variance = float(errors @ errors) / free
    covariance = variance * np.linalg.inv(jacobian.T @ jacobian)
    quantile = float(t.ppf(0.975, free))
    return tuple(quantile * math.sqrt(float(covariance[n, n])) * c.scale for n, c in enumerate(coefficients))
