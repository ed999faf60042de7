from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.errors import InputError
from hethub.timeline.record import COMPUTE_KINDS, RECORD, Kind, Timeline, TimelineInfo
from hethub.timeline.summary import by_type, sent_seconds, step_seconds, summarize

SHARES = ("busy", "recompute", "exposed_communication", "bubble", "idle", "unaccounted")


def shares(summary):
    return {name: pytest.approx(getattr(summary, f"{name}_ratio"), abs=1e-12) for name in SHARES}


def test_a_known_step_is_split_as_by_hand(timeline, rows):
    first, second = summarize(timeline(rows(0, 0.0)), 0, 0)
    assert first.seconds == 10.0
    # 2.5 to 7 before the message was sent; 7 to 8, the send and the half second of collective are exposed
    assert shares(first) == dict(zip(SHARES, (0.35, 0, 0.2, 0.45, 0, 0), strict=True))
    assert shares(second) == dict(zip(SHARES, (0.4, 0, 0.15, 0.2, 0.25, 0), strict=True))
    assert (first.actions, second.actions) == (4, 4)


def test_later_steps_count_from_the_end_of_the_step_before(timeline, rows):
    line = timeline(rows(0, 0.0) + rows(1, 11.0) + rows(2, 21.0))
    assert step_seconds(line).tolist() == [10.0, 11.0, 10.0]
    both = summarize(line, 1, 2)[0]
    assert both.seconds == 21.0
    assert both.unaccounted_ratio == pytest.approx(1 / 21)  # nobody says what happened from 10 to 11


def test_a_message_of_the_step_before_is_known_by_its_time(timeline):
    def message(kind, step, start, end):
        return {
            "step": step,
            "device": int(kind == Kind.RECEIVE),
            "kind": kind,
            "start": start,
            "end": end,
            "message": 4,
        }

    line = timeline(
        [
            message(Kind.SEND, 0, 9.0, 9.5),
            message(Kind.RECEIVE, 1, 10.0, 12.0),
            message(Kind.SEND, 1, 19.0, 19.5),
            message(Kind.RECEIVE, 2, 20.0, 22.0),
            message(Kind.SEND, 2, 29.0, 29.5),
        ]
    )
    receives = line.records["kind"] == Kind.RECEIVE
    assert sent_seconds(line.records)[receives].tolist() == [9.0, 19.0]


def test_a_pause_inside_a_step_is_unaccounted(timeline):
    line = timeline(
        [
            {"step": 0, "device": 0, "kind": Kind.FORWARD, "start": 0.0, "end": 4.0},
            {"step": 0, "device": 0, "kind": Kind.BACKWARD, "start": 5.0, "end": 10.0},
        ]
    )
    busy, absent = summarize(line, 0, 0)
    assert (busy.busy_ratio, busy.unaccounted_ratio) == (0.9, 0.1)
    assert (absent.idle_ratio, absent.actions) == (1.0, 0)


def test_an_unsent_wait_after_the_last_backward_is_idle(timeline):
    wait = {
        "step": 0,
        "device": 0,
        "kind": Kind.RECEIVE,
        "start": 5.0,
        "end": 10.0,
        "sent": 9.0,
        "message": 1,
    }
    for kind, expected in ((Kind.BACKWARD, 0.4), (Kind.BACKWARD_WEIGHT, 0.4), (Kind.FORWARD, 0.4)):
        before = {"step": 0, "device": 0, "kind": kind, "start": 0.0, "end": 5.0}
        summary = summarize(timeline([before, wait]), 0, 0)[0]
        assert (summary.idle_ratio, summary.bubble_ratio) == (expected, 0.0)
        assert summary.exposed_communication_ratio == pytest.approx(0.1)


def test_a_wait_for_the_next_step_is_idle_until_this_one_ends(timeline):
    line = timeline(
        [
            {"step": 0, "device": 0, "kind": Kind.BACKWARD, "start": 0.0, "end": 6.0},
            {"step": 0, "device": 1, "kind": Kind.BACKWARD, "start": 0.0, "end": 10.0},
            {
                "step": 1,
                "device": 0,
                "kind": Kind.RECEIVE,
                "start": 6.0,
                "end": 14.0,
                "sent": 14.0,
                "message": 0,
            },
            {"step": 1, "device": 0, "kind": Kind.BACKWARD, "start": 14.0, "end": 20.0},
        ]
    )
    assert summarize(line, 0, 0)[0].idle_ratio == pytest.approx(0.4)
    assert summarize(line, 1, 1)[0].bubble_ratio == pytest.approx(0.4)


def test_work_for_the_next_step_counts_where_it_happens(timeline):
    line = timeline(
        [
            {"step": 0, "device": 0, "kind": Kind.BACKWARD, "start": 0.0, "end": 6.0},
            {"step": 0, "device": 1, "kind": Kind.BACKWARD, "start": 0.0, "end": 10.0},
            {"step": 1, "device": 0, "kind": Kind.FORWARD, "start": 8.0, "end": 12.0},
        ]
    )
    first = summarize(line, 0, 0)[0]
    assert (first.busy_ratio, first.idle_ratio) == (pytest.approx(0.8), pytest.approx(0.2))
    assert summarize(line, 1, 1)[0].busy_ratio == 1.0


def test_recompute_is_not_useful(timeline):
    work = {"step": 0, "device": 0, "kind": Kind.RECOMPUTE, "start": 0.0, "end": 3.0}
    more = {"step": 0, "device": 0, "kind": Kind.BACKWARD, "start": 3.0, "end": 6.0}
    summary = summarize(timeline([work, more]), 0, 0)[0]
    assert (summary.busy_ratio, summary.recompute_ratio) == (0.5, 0.5)


def test_a_receive_that_does_not_say_takes_the_start_of_its_send(timeline, rows):
    line = timeline(rows(0, 0.0) + rows(1, 10.0))
    sent = sent_seconds(line.records)[line.records["kind"] == Kind.RECEIVE]
    assert sent.tolist() == [7.0, 2.0, 17.0, 12.0]


def test_overruns_and_real_math_are_shares_of_compute_actions(timeline):
    work = {"step": 0, "device": 0, "kind": Kind.FORWARD, "real": 0.5}
    line = timeline(
        [
            work | {"start": 0.0, "end": 1.0},
            work | {"start": 1.0, "end": 2.0, "overrun": 0.25},
            {"step": 0, "device": 0, "kind": Kind.SEND, "start": 2.0, "end": 3.0},
        ],
        emulated=True,
        time_scale=10.0,
    )
    summary = summarize(line, 0, 0)[0]
    assert (summary.overrun_ratio, summary.real_ratio, summary.actions) == (0.5, 0.05, 3)


def test_a_type_is_the_mean_of_its_devices(timeline, rows):
    devices = summarize(timeline(rows(0, 0.0), devices=3), 0, 0)
    fast, slow = by_type(devices)
    assert (fast.device_type, fast.devices, slow.devices) == ("fast", 2, 1)
    assert fast.busy_ratio == pytest.approx(0.35 / 2)
    assert fast.idle_ratio == pytest.approx(0.5)
    assert fast.actions == 4


def test_equal_records_give_an_equal_summary(timeline, rows):
    predicted = timeline(rows(0, 0.0), origin="predicted")
    measured = timeline([*rows(0, 0.0), *rows(1, 10.0)])
    assert summarize(predicted, 0, 0) == summarize(measured, 0, 0)
    expected = [shares(summary) for summary in summarize(predicted, 0, 0)]
    assert [shares(summary) for summary in summarize(measured, 1, 1)] == expected


def test_an_absent_step_is_refused(timeline, rows):
    with pytest.raises(InputError, match=r"step 3: not in the timeline\. Choose from 0 to 0"):
        summarize(timeline(rows(0, 0.0)), 0, 3)


def test_no_records_are_refused(timeline):
    with pytest.raises(InputError, match="holds no action"):
        summarize(timeline([]), 0, 0)


# --- properties -------------------------------------------------------------------------------------------

KINDS = [kind for kind in Kind if kind != Kind.COLLECTIVE]


@st.composite
def legal_timelines(draw):
    """Devices that each run actions one after the other, with pauses, over one to three steps."""
    devices = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32 - 1))
    steps = draw(st.integers(1, 3))
    chance = np.random.default_rng(seed)
    parts = []
    for device in range(devices):
        count = int(chance.integers(0, 12))
        part = np.zeros(count, dtype=RECORD)
        part["device"] = device
        part["step"] = np.sort(chance.integers(0, steps, count))
        part["kind"] = chance.choice(KINDS, count)
        pauses = chance.exponential(1.0, count) * chance.integers(0, 2, count)
        lengths = chance.exponential(1.0, count) * chance.integers(0, 4, count)
        part["end"] = np.cumsum(pauses + lengths) + chance.uniform(-5, 5)
        part["start"] = part["end"] - lengths
        part["start"][1:] = np.maximum(part["start"][1:], part["end"][:-1])
        part["busy"] = chance.uniform(0, 1, count) * (part["end"] - part["start"])
        part["busy"] *= np.isin(part["kind"], list(COMPUTE_KINDS))
        part["message"] = chance.integers(-1, 6, count)
        part["sent"] = np.where(chance.integers(0, 2, count), chance.uniform(-5, 15, count), np.nan)
        parts.append(part)
    records = np.concatenate(parts)
    chance.shuffle(records)
    names = tuple(f"g/0/{device}" for device in range(devices))
    info = TimelineInfo(origin="measured", devices=names, device_types=("t",) * devices, emulated=False)
    return Timeline(info, records)


def ratios(summary):
    return np.array([getattr(summary, f"{name}_ratio") for name in SHARES])


@settings(max_examples=150)
@given(legal_timelines())
def test_shares_of_any_legal_timeline_sum_to_one(line):
    steps = np.unique(line.records["step"])
    if not len(steps) or not (step_seconds(line) > 1e-6).all():
        return
    for first in steps:
        for last in steps[steps >= first]:
            for summary in summarize(line, int(first), int(last)):
                assert abs(ratios(summary).sum() - 1) < 1e-9
                assert (ratios(summary) > -1e-9).all()


@settings(max_examples=80)
@given(legal_timelines())
def test_windows_add_up(line):
    steps = np.unique(line.records["step"])
    if not len(steps) or not (step_seconds(line) > 1e-6).all():
        return
    whole = summarize(line, int(steps[0]), int(steps[-1]))
    parts = [summarize(line, int(step), int(step)) for step in steps]
    for index, summary in enumerate(whole):
        total = sum(ratios(part[index]) * part[index].seconds for part in parts)
        assert total == pytest.approx(ratios(summary) * summary.seconds, abs=1e-9)


@settings(max_examples=80)
@given(legal_timelines())
def test_busy_is_the_sum_of_the_busy_column_over_the_whole_run(line):
    if not len(line.records) or not (step_seconds(line) > 1e-6).all():
        return
    steps = np.unique(line.records["step"])
    for index, summary in enumerate(summarize(line, int(steps[0]), int(steps[-1]))):
        own = line.records[line.records["device"] == index]
        useful = own["busy"][own["kind"] != Kind.RECOMPUTE].sum()
        # the window opens with the earliest record of the first step
        early = (
            own["start"].min(initial=np.inf) < line.records["start"][line.records["step"] == steps[0]].min()
        )
        assert early or summary.busy_ratio * summary.seconds == pytest.approx(useful, abs=1e-9)
