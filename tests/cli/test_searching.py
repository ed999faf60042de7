"""The search's progress on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from hethub.cli.searching import shown_progress
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Progress
from tests.planners.examples import one_two_four


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _clock(step: float):  # type: ignore[no-untyped-def]
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += step
        return now

    return clock


def test_a_terminal_is_shown_the_gap_and_left_clean() -> None:
    terminal = _Terminal()
    with shown_progress(terminal, _clock(1.0)) as show:
        assert show is not None
        show(Progress(considered=12_000, best_seconds=4.0, lower_bound_seconds=3.0))
        assert terminal.getvalue().endswith("12,000 splits considered, best 4 s, none below 3 s, gap 25.0%")
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_short_search_and_a_pipe_are_shown_nothing() -> None:
    terminal = _Terminal()
    with shown_progress(terminal, _clock(1e-6)) as show:
        assert show is not None
        show(Progress(considered=1, best_seconds=None, lower_bound_seconds=0.0))
    assert terminal.getvalue() == ""
    with shown_progress(io.StringIO()) as show:
        assert show is None


def test_a_search_tells_a_best_that_falls_and_a_bound_below_it() -> None:
    told: list[Progress] = []
    problem = one_two_four()
    planner = FirstPlanner()
    found = planner.plan(replace(problem, progress=told.append))
    bests = [progress.best_seconds for progress in told if progress.best_seconds is not None]
    assert bests == sorted(bests, reverse=True)
    assert told[-1].lower_bound_seconds <= bests[-1]
    assert found.lower_bound_seconds is not None
