from __future__ import annotations

import pytest
from hypothesis import given, settings

from hethub.errors import InputError
from hethub.simulate.engine import simulate
from hethub.timeline.record import Kind, Lane
from hethub.timeline.summary import summarize
from hethub.timeline.waterfall import CAUSES, waterfall
from tests.plan_strategies import compile_plan, compute_model, plans


def nonzero(shares):
    return {name: pytest.approx(share) for name, share in shares.items() if share > 1e-12}


def one(kind, start, end, **more):
    return {
        "step": 0,
        "device": 0,
        "stage": 0,
        "micro_batch": 0,
        "kind": kind,
        "start": start,
        "end": end,
    } | more


def message(kind, start, end, *, lane=Lane.PARAMETERS, **more):
    return one(kind, start, end, lane=int(lane), stage=-1, micro_batch=-1, message=1, **more)


def test_a_known_step_is_split_as_by_hand(timeline, rows):
    first, second = waterfall(timeline(rows(0, 0.0)), 0, 0).devices
    # The first works 3.5 s of 10 and the second 4: half a second of the first's wait is less work.
    assert nonzero(first) == {
        "busy": 0.35, "imbalance": 0.05, "bubble": 0.4, "collectives": 0.05, "activations": 0.05, "gradients": 0.1,
    }  # fmt: skip
    assert nonzero(second) == {
        "busy": 0.4,
        "bubble": 0.2,
        "activations": 0.1,
        "gradients": 0.05,
        "idle": 0.25,
    }


def test_less_work_than_a_whole_piece_is_rounding(timeline, rows):
    """Half a second less than the busiest: with pieces of 0.2 s two more fit and 0.1 s is left; of 0.6 s none fits."""
    for piece, rounding in ((0.2, 0.01), (0.25, 0.0), (0.6, 0.05)):
        first, second = waterfall(timeline(rows(0, 0.0)), 0, 0, pieces=[piece, piece]).devices
        assert first["rounding"] == pytest.approx(rounding)
        assert first["rounding"] + first["imbalance"] == pytest.approx(0.05)
        assert second["rounding"] == 0.0


def test_devices_weigh_by_their_speed(timeline, rows):
    found = waterfall(timeline(rows(0, 0.0)), 0, 0, [3.0, 1.0])
    assert found.seconds == 10.0
    for name in CAUSES:
        one_share, other = (device[name] for device in found.devices)
        assert found.total[name] == pytest.approx(0.75 * one_share + 0.25 * other)


def test_the_tail_is_told_apart(timeline):
    line = timeline(
        [
            one(Kind.FORWARD, 0.0, 1.0),
            one(Kind.BACKWARD, 1.0, 3.0),
            message(Kind.SEND, 3.0, 3.5),
            message(Kind.RECEIVE, 3.5, 5.0, sent=4.0),
            one(Kind.REDUCE, 5.0, 5.5, stage=-1),
            one(Kind.NORM, 5.5, 6.0, stage=-1),
            message(Kind.RECEIVE, 6.0, 7.0, sent=6.5),
            one(Kind.UPDATE, 7.0, 8.0, stage=-1),
            message(Kind.RECEIVE, 8.0, 9.5, sent=7.0),
            one(Kind.GATHER, 9.5, 10.0, stage=-1),
        ],
        devices=1,
    )
    assert nonzero(waterfall(line, 0, 0).total) == {
        "busy": 0.3, "reduction": 0.25, "norm": 0.15, "update": 0.1, "gather": 0.2,
    }  # fmt: skip


def test_weights_that_arrive_under_the_next_forward_belong_to_the_gather(timeline):
    line = timeline(
        [
            message(Kind.RECEIVE, 0.0, 2.0, sent=0.0),
            one(Kind.GATHER, 2.0, 3.0, stage=-1),
            one(Kind.FORWARD, 3.0, 5.0),
            message(Kind.RECEIVE, 5.0, 6.0, sent=0.0),
            one(Kind.FORWARD, 6.0, 10.0),
        ],
        devices=1,
    )
    assert nonzero(waterfall(line, 0, 0).total) == {"busy": 0.6, "gather": 0.4}


def test_a_late_end_without_a_collective_is_unaccounted(timeline):
    late = one(Kind.FORWARD, 0.0, 10.0, busy=9.0)
    again = one(Kind.RECOMPUTE, 10.0, 20.0)
    joint = one(Kind.BACKWARD, 20.0, 30.0, busy=7.0, stage=1)
    inside = one(Kind.COLLECTIVE, 27.0, 29.0, busy=0.0, stage=1)
    found = waterfall(timeline([late, again, joint, inside], devices=1), 0, 0)
    assert nonzero(found.total) == {
        "busy": 16 / 30, "recompute": 1 / 3, "collectives": 0.1, "unaccounted": 1 / 30,
    }  # fmt: skip


def test_an_unused_device_is_all_imbalance(timeline):
    found = waterfall(timeline([one(Kind.FORWARD, 0.0, 4.0)]), 0, 0)
    assert nonzero(found.devices[1]) == {"imbalance": 1.0}


def test_a_step_that_is_not_there_is_refused(timeline, rows):
    with pytest.raises(InputError, match="step 7: not in the timeline"):
        waterfall(timeline(rows(0, 0.0)), 0, 7)


@settings(max_examples=25)
@given(plan=plans())
def test_shares_add_up_and_agree_with_the_summary(plan):
    compute = compute_model(plan)
    line = simulate(compile_plan(plan), compute, steps=3).timeline
    found = waterfall(line, 0, 0)
    assert sum(found.total.values()) == pytest.approx(1.0)
    for shares, summary in zip(found.devices, summarize(line, 0, 0), strict=True):
        assert min(shares.values()) >= -1e-12
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares["recompute"] == pytest.approx(summary.recompute_ratio, abs=1e-9)
        assert shares["unaccounted"] == pytest.approx(summary.unaccounted_ratio, abs=1e-9)
        # what the summary calls busy includes the work after the pipeline
        assert shares["busy"] <= summary.busy_ratio + 1e-9
