from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.cost.profiles.curve import Curve, fit_link

points = st.dictionaries(st.integers(1, 256).map(float), st.floats(1e-6, 10.0), min_size=1, max_size=8)
sizes = st.floats(0.5, 2000)


@given(points, sizes, sizes)
def test_more_work_never_takes_less_time_and_no_time_is_negative(measured, one, other):
    """Seeded bug: points above a later one kept in `Curve.through`; two points sufficed."""
    curve = Curve.through(measured)
    low, high = sorted((one, other))
    assert 0 < curve.at(low) <= curve.at(high) * (1 + 1e-9)


@given(points)
def test_the_curve_passes_through_every_point_that_is_below_all_later_ones(measured):
    curve = Curve.through(measured)
    for size, seconds in measured.items():
        if all(seconds <= later for place, later in measured.items() if place > size):
            assert curve.at(size) == pytest.approx(seconds)


@given(points, st.floats(0.01, 1.0))
def test_less_work_than_was_measured_is_not_done_more_efficiently(measured, share):
    """Seeded bug: straight extrapolation without the floor; failed where the line meets zero above size zero."""
    curve = Curve.through(measured)
    first = curve.sizes[0]
    assert curve.at(first * share) >= curve.seconds[0] * share * (1 - 1e-9)


def test_a_disturbed_first_point_is_replaced_by_the_line_of_the_next_two():
    assert Curve.through({1: 2.4, 2: 1.5, 4: 1.9}).at(1) == pytest.approx(1.3)


@given(points, sizes, st.floats(1.0, 2.0))
def test_a_slow_device_takes_longer_but_launches_do_not(measured, size, slow):
    curve = Curve.through(measured)
    assert curve.at(size) <= curve.slowed(size, slow) <= slow * curve.at(size) * (1 + 1e-9)


@given(st.floats(0, 1e-2), st.floats(1e6, 1e12))
def test_a_link_that_follows_the_law_is_found(latency, bandwidth):
    """Seeded bug: `u1 * vv + v1 * uv` in the latency; failed."""
    exact = {2.0**n: latency + 2.0**n / bandwidth for n in range(10, 31, 4)}
    found = fit_link(exact)
    for size, seconds in exact.items():
        assert found.latency_seconds + size / found.bandwidth_bytes_per_second == pytest.approx(
            seconds, rel=1e-3
        )
