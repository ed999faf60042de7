from __future__ import annotations

import pytest

from hethub.planners.baselines.prices import meetings, price_split, split_fits
from hethub.planners.baselines.split import Band, Group, Side, Split
from tests.planners.baselines.made_up import MadeUpPrices, kind

A, B = Group(0, 1), Group(1, 1)
KINDS = (kind("a", 4), kind("b", 4))


def test_a_stage_waits_for_its_slowest_replica():
    prices = MadeUpPrices(KINDS, [4.0, 1.0])
    split = Split((0, 6), (Band(((Side(A, 1, 2), Side(B, 1, 2)),), 3),))
    assert price_split(prices, split).step_seconds == pytest.approx(3 * 4.0)


def test_the_step_is_the_slowest_pipelines_and_then_the_reduction():
    prices = MadeUpPrices(KINDS, [4.0, 1.0], ring=0.5)
    bands = (Band(((Side(A, 1),),), 12), Band(((Side(B, 1),),), 2))
    price = price_split(prices, Split((0, 6), bands))
    assert price.pipeline_seconds == pytest.approx((12.0, 8.0))
    assert price.step_seconds == pytest.approx(12.0 + 0.5 * 6)


def test_a_replica_sends_its_own_rows():
    """Seeded bug: a message of the whole micro-batch; failed."""
    prices = MadeUpPrices(KINDS, [1e9, 1e9], hop=1.0)
    split = Split((0, 3, 6), (Band(((Side(A, 2),), (Side(B, 1, 2),)), 1),))
    # forth two rows of one replica, and twice back (the last stage) one row of each of two
    assert price_split(prices, split).step_seconds == pytest.approx(2.0 + 2 * 1.0)


def test_replicas_meet_where_their_rows_do():
    before = (Side(A, 2, 2), Side(B, 1, 2))  # rows 0-3 and 4-5
    after = (Side(A, 1, 3), Side(B, 3, 1))  # rows 0-2 and 3-5
    assert set(meetings(before, after)) == {
        (before[0], after[0]),
        (before[0], after[1]),
        (before[1], after[1]),
    }


def test_what_does_not_fit_is_refused():
    one = Split((0, 6), (Band(((Side(A, 1, 4),),), 4),))
    assert split_fits(MadeUpPrices(KINDS, [1.0, 1.0]), one)
    assert not split_fits(MadeUpPrices(KINDS, [1.0, 1.0], room=5), one)
    assert not split_fits(MadeUpPrices((kind("a", 3), KINDS[1]), [1.0, 1.0]), one)
