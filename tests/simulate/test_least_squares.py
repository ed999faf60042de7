from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.errors import InputError
from hethub.simulate.least_squares import Coefficient, fit

COEFFICIENTS = (
    Coefficient("rate", 1.0, 0.1, 10.0, 1.0),
    Coefficient("pause", 0.0, 0.0, 5.0, 1.0),
)


def law(rate, pause, noise, sizes, counts):
    """Runs that take rate x size + pause x count, measured with `noise`."""
    measured = (rate * sizes + pause * counts) * (1 + noise)

    def errors(values, runs):
        chosen = list(runs)
        predicted = values[0] * sizes[chosen] + values[1] * counts[chosen]
        return predicted / measured[chosen] - 1

    return errors


@settings(max_examples=25)
@given(rate=st.floats(0.5, 4), pause=st.floats(0.1, 2), seed=st.integers(0, 99))
def test_coefficients_of_a_known_law_are_found_within_their_intervals(rate, pause, seed):
    """Seeded bug: `quantile` 0, so that intervals are points; failed."""
    random = np.random.default_rng(seed)
    sizes, counts = random.uniform(1, 10, 24), random.uniform(1, 10, 24)
    found = fit(law(rate, pause, random.normal(0, 0.01, 24), sizes, counts), 24, COEFFICIENTS)
    for value, half, true in zip(found.values, found.half_widths, (rate, pause), strict=True):
        assert abs(value - true) < 2.5 * half + 1e-4
    assert max(map(abs, found.left_out_errors)) < 0.06


def test_an_outlier_does_not_carry_the_fit_away_and_shows_when_left_out():
    random = np.random.default_rng(1)
    sizes, counts = random.uniform(1, 10, 12), random.uniform(1, 10, 12)
    noise = np.zeros(12)
    noise[5] = 1.0
    found = fit(law(2.0, 1.0, noise, sizes, counts), 12, COEFFICIENTS)
    assert found.values == pytest.approx((2.0, 1.0), rel=0.02)
    assert found.left_out_errors[5] == pytest.approx(-0.5, abs=0.03)


def test_more_coefficients_than_the_runs_bear_are_refused():
    sizes, counts = np.ones(5), np.arange(1.0, 6)
    with pytest.raises(InputError, match="5 runs cannot bear 2 coefficients: 6 are needed"):
        fit(law(1, 1, 0, sizes, counts), 5, COEFFICIENTS)


def test_a_coefficient_that_no_run_depends_on_is_refused():
    sizes = np.arange(1.0, 13)
    with pytest.raises(InputError, match="no run depends on pause"):
        fit(law(1.5, 0, 0, sizes, np.zeros(12)), 12, COEFFICIENTS)


def test_coefficients_that_only_act_together_are_refused():
    sizes = np.arange(1.0, 13)
    with pytest.raises(InputError, match="do not tell rate, pause from each other"):
        fit(law(1.5, 0.5, 0, sizes, sizes), 12, COEFFICIENTS)
