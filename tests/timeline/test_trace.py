from __future__ import annotations

import json

import pytest

from hethub.timeline.trace import write_chrome_trace


@pytest.fixture
def events(tmp_path, timeline, rows):
    """The trace of step 1 of a two-step emulated run beside its prediction."""
    predicted = timeline(rows(0, 0.0), origin="predicted")
    measured = timeline(rows(0, 5.0) + rows(1, 15.0), emulated=True, time_scale=4.0)
    write_chrome_trace(tmp_path / "trace.json", [predicted, measured], [1])
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    return json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_processes_and_threads_are_named(events):
    names = [event["args"]["name"] for event in events if event["name"].endswith("_name")]
    threads = ["g/0/0 (fast)", "g/0/1 (slow)"]
    assert names == ["predicted", *threads, "measured (emulated)", *threads]


def test_both_processes_start_at_zero_and_hold_one_step(events):
    complete = [event for event in events if event["ph"] == "X"]
    twins = [[event for event in complete if event["pid"] == process] for process in (1, 2)]
    assert [event["ts"] for event in twins[0]] == [event["ts"] for event in twins[1]]
    assert min(event["ts"] for event in complete) == 0
    assert {event["args"]["step"] for event in twins[1]} == {1}
    assert [event["name"] for event in twins[1] if event["tid"] == 1][:2] == ["forward 0", "send 0"]


def test_a_collective_lies_inside_its_action_and_after_it_in_the_file(events):
    names = [
        event["name"] for event in events if event["ph"] == "X" and event["tid"] == 1 and event["pid"] == 1
    ]
    assert names.index("backward 0") < names.index("collective 0")
    outer, inner = (
        next(event for event in events if event["name"] == name) for name in ("backward 0", "collective 0")
    )
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_every_send_has_an_arrow_to_its_receive(events):
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == 4
    for number, start in starts.items():
        for kind, arrow in (("send", start), ("receive", ends[number])):
            assert any(
                event["ph"] == "X"
                and event["cat"] == kind
                and (event["pid"], event["tid"]) == (arrow["pid"], arrow["tid"])
                and event["ts"] <= arrow["ts"] <= event["ts"] + event["dur"]
                for event in events
            )


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, timeline, rows):
    target = tmp_path / "trace.json"
    target.mkdir()
    with pytest.raises(OSError):
        write_chrome_trace(target, [timeline(rows(0, 0.0))], [0])
    assert list(tmp_path.iterdir()) == [target]
