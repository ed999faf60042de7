"""A run that drifts from its prediction: who moved is named, once, and when it is back."""

from __future__ import annotations

from pathlib import Path

import pytest

from hethub.launch.drift import DriftWatch, Moved
from hethub.launch.journal import Event, read_journal
from hethub.launch.run_state import read_run
from hethub.simulate.pace import Pace
from tests.launch.small_job import Launch, edit, launched, write_job


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


STEPS, FROM, FOR = 130, 15, 60
FAULTS = {
    "a device twice as slow": ("device: b/0/0, action: compute, factor: 2", "device", "b/0/0", (1.9, 2.1)),
    # Its messages are so small that a quarter would be lost in latency (`benchmarks/replan.py` has a quarter).
    "a link at a thirtieth": ("link: desk-shelf, factor: 30", "link", "desk-shelf", (4.0, 16.0)),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_running_job_names_who_moved_and_that_it_is_back(tmp_path: Path, case: str) -> None:
    words, what, name, (low, high) = FAULTS[case]
    write_job(tmp_path)
    edit(
        tmp_path / "job.yaml",
        ("steps: 3", f"steps: {STEPS}"),
        ("evaluate: {every: 3, rows: 16}\n", ""),
        ("output: run", f"output: run\nfault: {{{words}, do: slow, step: {FROM}, steps: {FOR}}}"),
    )
    with launched(tmp_path) as launch:
        result = launch.end(240.0)
    assert result.exit_code == 0, result.err
    events, problems = read_journal(tmp_path / "run")
    moved = [event for event in events if event.event == "moved"]
    assert problems == [] and [named(event) for event in moved] == [(what, name)] * 2, result.err
    slow, back = moved
    assert slow.ratio is not None and low < slow.ratio < high and FROM < slow.step < FROM + FOR
    assert back.ratio is not None and back.ratio < 1.1 and back.step >= FROM + FOR
    assert slow.reason in result.err and back.reason in result.err
    assert read_run(tmp_path / "run").drift == {}


def named(event: Event) -> tuple[str, str]:
    return ("device", event.device) if event.device else ("link", event.link)


def test_a_run_as_predicted_names_nobody(tmp_path: Path) -> None:
    write_job(tmp_path)
    edit(tmp_path / "job.yaml", ("steps: 3", "steps: 60"))
    launch = Launch(tmp_path)
    try:
        assert launch.end().exit_code == 0
    finally:
        launch.close()
    events, _ = read_journal(tmp_path / "run")
    assert [event for event in events if event.event == "moved"] == []
