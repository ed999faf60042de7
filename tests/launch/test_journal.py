"""The driver's journal, and what the checker finds in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hethub.launch.attempts import next_attempt
from hethub.launch.history import HISTORY, Entry
from hethub.launch.history_check import check_journal
from hethub.launch.journal import JOURNAL, Event, Journal, read_journal


def entry(attempt: int, step: int, device: str = "a/0/0", plan: str = "p") -> Entry:
    return Entry(
        run="r",
        attempt=attempt,
        step=step,
        device=device,
        devices=1,
        plan=plan,
        batch=1,
        epoch=9,
        loss="0x1p0",
    )


ENTRIES = [entry(1, 0), entry(1, 1), entry(2, 1), entry(2, 2)]
EVENTS = [
    Event(event="began", attempt=1, step=0, plan="p", devices=("a/0/0",)),
    Event(
        event="failed",
        attempt=1,
        step=2,
        cause="worker",
        device="a/0/0",
        action="step 2, update",
        reason="died",
    ),
    Event(event="began", attempt=2, step=1, plan="p", devices=("a/0/0",)),
    Event(event="ended", attempt=2, step=3, counts={"restarts": 1}),
]


def test_a_journal_that_agrees_with_the_histories_is_without_fault() -> None:
    assert check_journal(ENTRIES, EVENTS, 3) == []


def changed(which: int, **changes: object) -> list[Event]:
    return [e.model_copy(update=changes) if n == which else e for n, e in enumerate(EVENTS)]


BUGS: dict[str, tuple[Callable[[], list[Event]], str]] = {
    "an attempt number used again": (lambda: changed(2, attempt=1), "attempt 1 begins after attempt 1"),
    "an attempt that never began": (
        lambda: [EVENTS[0], EVENTS[1], EVENTS[3]],
        "attempt 2 has a history and never",
    ),
    "another plan": (lambda: changed(0, plan="q"), "attempt 1: the plan of its history"),
    "a device of nobody": (lambda: changed(0, devices=("b/0/0",)), "attempt 1: others than its devices"),
    "another first step": (lambda: changed(2, step=2), "attempt 2 began at step 2, its history begins at 1"),
    "a failure without cause": (lambda: changed(1, cause=""), "attempt 1 failed without cause"),
    "a reason of two lines": (lambda: changed(1, reason="a\nb"), "a reason of one line"),
    "a restart not counted": (
        lambda: changed(3, counts={"restarts": 0}),
        "0 restarts are counted, 1 failures",
    ),
    "no end": (lambda: EVENTS[:3], "did not come to its end"),
    "an early end": (lambda: changed(3, step=2), "did not come to its end"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_checker_finds(bug: str) -> None:
    make, words = BUGS[bug]
    assert any(words in problem for problem in check_journal(ENTRIES, make(), 3))


def read_back(folder: Path) -> tuple[list[Event], list[str]]:
    """Without the times that the journal adds."""
    events, problems = read_journal(folder)
    assert all(event.at_unix_seconds > 0 for event in events)
    return [event.model_copy(update={"at_unix_seconds": 0.0}) for event in events], problems


def test_what_is_added_is_read_and_a_torn_line_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for event in EVENTS[:2]:
        journal.add(event)
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(b'{"event":"beg')
    assert read_back(tmp_path) == (EVENTS[:2], [])
    Journal(tmp_path).add(EVENTS[2])  # the next driver
    assert read_back(tmp_path) == (EVENTS[:3], [])


def test_a_line_that_is_no_event_is_told(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"event": "began"}\nnothing\n')
    events, problems = read_journal(tmp_path)
    assert events == [] and [p.split(": no event")[0] for p in problems] == [f"{JOURNAL}:1", f"{JOURNAL}:2"]


def test_an_attempt_has_a_number_that_neither_journal_nor_histories_know(tmp_path: Path) -> None:
    """A driver may die before its history begins, or its journal be lost."""
    assert next_attempt(tmp_path) == 1
    Journal(tmp_path).add(EVENTS[0])
    assert next_attempt(tmp_path) == 2
    (tmp_path / HISTORY).mkdir()
    (tmp_path / HISTORY / "a-0-0.jsonl").write_text(entry(6, 3).model_dump_json() + "\n")
    assert next_attempt(tmp_path) == 7
