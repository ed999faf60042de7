"""A run that drifts from its prediction: who moved is named, once, and when it is back."""

from __future__ import annotations

import json
from pathlib import Path

from hethub.launch.drift import DriftWatch, Moved
from hethub.launch.journal import read_journal
from hethub.launch.run_state import read_run
from hethub.simulate.pace import Pace
from tests.launch.small_job import edit, launched, write_job


def told(watch: DriftWatch, *ratios: float) -> list[Moved]:
    """What is said over steps in which a device has these ratios."""
    return [moved for ratio in ratios for moved in watch.look(Pace({"a/0/0": ratio, "b/0/0": 1.0}))]


def test_a_device_that_stays_slow_is_told_once_and_once_when_it_is_back() -> None:
    watch = DriftWatch()
    assert told(watch, 1.0, 1.0, 1.05, 1.0, 1.0) == []
    (moved,) = told(watch, *[2.0] * 10)
    assert (moved.what, moved.name, moved.ratio, moved.before) == ("device", "a/0/0", 2.0, 1.0)
    assert "device a/0/0: its compute takes 2.00 x as long as predicted" in moved.words
    (back,) = told(watch, *[1.0] * 10)
    assert back.normal and "back to its prediction" in back.words
    assert told(watch, *[1.0] * 10) == []


def test_a_late_step_says_nothing() -> None:
    assert told(DriftWatch(), 1.0, 1.0, 9.0, 1.0, 9.0, 1.0, 1.0) == []


def test_nothing_is_said_of_few_steps() -> None:
    watch = DriftWatch()
    assert told(watch, 3.0, 3.0) == []
    assert [moved.ratio for moved in told(watch, 3.0)] == [3.0]


def test_a_device_that_gets_worse_is_told_again() -> None:
    watch = DriftWatch()
    assert [moved.ratio for moved in told(watch, *[2.0] * 6, *[4.0] * 6)] == [2.0, 4.0]


def test_one_that_is_slower_than_others_and_as_predicted_is_not_named() -> None:
    """Paces are of each one's own prediction; a link is judged like a device."""
    watch = DriftWatch()
    found = [m for _ in range(6) for m in watch.look(Pace({"slow/0/0": 1.0}, {"desk-shelf": 4.0}))]
    assert [(m.what, m.name, m.ratio) for m in found] == [("link", "desk-shelf", 4.0)]
    assert "link desk-shelf: its messages take 4.00 x" in found[0].words


def test_a_slow_link_that_nobody_waits_for_any_more_is_told_once() -> None:
    """It may be quick again or not: seen to stay slow in the journal for ever, as its last few messages told."""
    watch = DriftWatch()

    def look(links: dict[str, float]) -> list[float | None]:
        return [moved.ratio for moved in watch.look(Pace({}, links))]

    assert [look({"desk-shelf": 9.0}) for _ in range(5)] == [[], [], [9.0], [], []]
    assert [look({}) for _ in range(4)] == [[]] * 4
    assert look({"desk-shelf": 9.0}) == []
    assert [look({}) for _ in range(6)] == [[], [], [], [], [None], []]
    assert [look({"desk-shelf": 1.0}) for _ in range(3)] == [[]] * 3
    assert [look({"desk-shelf": 9.0}) for _ in range(4)] == [[], [], [9.0], []]


FOR, STEPS = 45, 220
# Its messages are so small that a quarter of the bandwidth would be lost in latency (`benchmarks/replan.py` has a
# quarter).
FAULTS = (
    ({"device": "b/0/0", "action": "compute", "factor": 2.0, "step": 15}, (1.9, 2.1)),
    ({"link": "desk-shelf", "factor": 30.0, "step": 95}, (4.0, 16.0)),
)


def test_a_running_job_names_who_moved_and_that_it_is_back_and_nobody_else(tmp_path: Path) -> None:
    """A device at half its speed for some steps, later a link at a thirtieth."""
    write_job(tmp_path)
    faults = [{**fault, "do": "slow", "steps": FOR} for fault, _ in FAULTS]
    edit(
        tmp_path / "job.yaml",
        ("steps: 3", f"steps: {STEPS}"),
        ("evaluate: {every: 3, rows: 16}\n", ""),
        ("output: run", f"output: run\nfault: {json.dumps(faults)}"),
    )
    with launched(tmp_path) as launch:
        result = launch.end(240.0)
    assert result.exit_code == 0, result.err
    events, problems = read_journal(tmp_path / "run")
    moved = [event for event in events if event.event == "moved"]
    expected = [("b/0/0", ""), ("b/0/0", ""), ("", "desk-shelf"), ("", "desk-shelf")]
    assert problems == [] and [(e.device, e.link) for e in moved] == expected, result.err
    for (fault, (low, high)), slow, back in zip(FAULTS, moved[::2], moved[1::2], strict=True):
        begin = int(str(fault["step"]))
        assert slow.ratio is not None and low < slow.ratio < high and begin < slow.step < begin + FOR
        assert (back.ratio or 1.0) < 1.1 and back.step >= begin + FOR
        assert slow.reason in result.err and back.reason in result.err
    assert read_run(tmp_path / "run").drift == {}
