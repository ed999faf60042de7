"""Whole shares by the largest remainder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.apportion import apportion

weights = st.lists(st.floats(0.0, 1e300), min_size=1, max_size=12).filter(lambda w: max(w) > 1e-300)


@given(total=st.integers(0, 10_000), weights=weights, minimum=st.integers(0, 3))
def test_shares_add_up_and_stay_near_their_quota(total: int, weights: list[float], minimum: int) -> None:
    left = total - minimum * len(weights)
    if left < 0:
        with pytest.raises(ValueError, match="cannot be split"):
            apportion(total, weights, minimum)
        return
    shares = apportion(total, weights, minimum)
    assert sum(shares) == total
    whole = sum(w / max(weights) for w in weights)
    for share, weight in zip(shares, weights, strict=True):
        quota = left * (weight / max(weights)) / whole
        assert quota - 1.001 < share - minimum < quota + 1.001


@given(total=st.integers(0, 1000), count=st.integers(1, 50))
def test_equal_weights_differ_by_one_and_the_first_have_more(total: int, count: int) -> None:
    shares = apportion(total, [1.0] * count)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_without_meaning_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|split"):
        apportion(10, bad)
