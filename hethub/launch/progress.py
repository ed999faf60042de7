"""The progress of a run: one live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Progress"]

_PLAIN_EVERY_SECONDS = 10.0


@dataclass(slots=True)
class Progress:
    """Counts steps as they are reported and prints step, loss, tokens/s, share of the prediction and time left.

    `predicted_step_seconds` and tokens/s are in modelled time; `time_scale` turns it into wall time.
    """

    title: str
    steps: int
    tokens_per_step: int
    predicted_step_seconds: float
    time_scale: float
    emulated: bool
    write: Callable[[str], object] = field(default=sys.stderr.write)
    live: bool = field(default_factory=sys.stderr.isatty)
    _done: int = 0
    _walls: list[float] = field(default_factory=list)
    _last: float = 0.0
    _printed: float = 0.0

    def start(self) -> None:
        """Begin (or go on after an evaluation): the next step's time counts from here."""
        self._last = time.monotonic()

    def update(self, reports: list[tuple[int, float, float]]) -> None:
        """Take (step, loss, norm) of newly finished steps."""
        if not reports:
            return
        now = time.monotonic()
        self._walls.extend([(now - self._last) / len(reports)] * len(reports))
        self._last = now
        self._done = reports[-1][0] + 1
        finished = self._done >= self.steps
        if self.live:
            self.write("\r\x1b[2K" + self.line(reports[-1][1]) + ("\n" if finished else ""))
            sys.stderr.flush()
        elif finished or self._done == 1 or now - self._printed >= _PLAIN_EVERY_SECONDS:
            self.write(self.line(reports[-1][1]) + "\n")
            self._printed = now

    def line(self, loss: float) -> str:
        """The progress line after the last step reported."""
        wall = statistics.median(self._walls[-20:])
        modelled = wall / self.time_scale
        mark = " (emulated)" if self.emulated else ""
        left = (self.steps - self._done) * wall
        return (
            f"{self.title}  step {self._done}/{self.steps}  loss {loss:.4f}  "
            f"{self.tokens_per_step / modelled:,.0f} tokens/s{mark}  "
            f"{self.predicted_step_seconds / modelled:.0%} of prediction  {left:.0f} s left"
        )
