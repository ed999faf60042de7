"""How far a search is, on one line of a terminal that is rewritten and at last wiped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from hethub.planners.interface import Progress

__all__ = ["shown_progress"]

_FIRST_SECONDS = 0.5  # shorter searches show nothing
_EACH_SECONDS = 0.1
_WIPE = "\r\x1b[K"


@contextmanager
def shown_progress(
    stream: TextIO, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Progress], None] | None]:
    """A function that shows a search's progress on `stream`; None where that is no terminal."""
    if not stream.isatty():
        yield None
        return
    due = clock() + _FIRST_SECONDS
    shown = False

    def show(progress: Progress) -> None:
        nonlocal due, shown
        if clock() >= due:
            due, shown = clock() + _EACH_SECONDS, True
            stream.write(_WIPE + _words(progress))
            stream.flush()

    try:
        yield show
    finally:
        if shown:
            stream.write(_WIPE)
            stream.flush()


def _words(progress: Progress) -> str:
    parts = [f"{progress.considered:,} splits considered"]
    best, lower = progress.best_seconds, progress.lower_bound_seconds
    if best is not None:
        parts.append(f"best {best:.4g} s")
    if lower > 0:
        parts.append(f"none below {lower:.4g} s")
        if best is not None:
            parts.append(f"gap {max(0.0, 1 - lower / best):.1%}")
    return ", ".join(parts)
