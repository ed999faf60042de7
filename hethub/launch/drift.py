"""Whether a run drifts from its prediction: which device or link moved, how far, and when it is back.

Each is judged against its own prediction, not against others: in a mixed cluster some are always slower. The median of
the last few steps that were looked at counts, so that one late step says nothing. What has been told is not told again
until it moves on, or back. A link is only seen where somebody waits for its messages: when nobody has for as many
steps, it holds nobody up any more, and that is told.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hethub.simulate.pace import MOVED, Pace

__all__ = ["DriftWatch", "Moved"]

WINDOW_STEPS = 5
LEAST_STEPS = 3  # with fewer that show it, nothing is said
NORMAL = 1.1  # closer to its prediction, it is back to normal


@dataclass(frozen=True, slots=True)
class Moved:
    """A device or link takes `ratio` times its predicted seconds (None: nobody waits for it, so that nobody knows);
    before it was `before`, as told last."""

    what: Literal["device", "link"]
    name: str
    ratio: float | None
    before: float

    @property
    def normal(self) -> bool:
        """Whether it is back to its prediction."""
        return self.ratio is None or 1.0 / NORMAL <= self.ratio <= NORMAL

    @property
    def words(self) -> str:
        """A line for people."""
        if self.ratio is None:
            return f"{self.what} {self.name}: nobody waits for its messages any more (before: {self.before:.2f} x)"
        of = "compute takes" if self.what == "device" else "messages take"
        if self.normal:
            return f"{self.what} {self.name}: back to its prediction ({self.ratio:.2f} x, after {self.before:.2f} x)"
        now = f"its {of} {self.ratio:.2f} x as long as predicted"
        return f"{self.what} {self.name}: {now} (before: {self.before:.2f} x)"


class DriftWatch:
    """Takes the pace of steps, one after the other, and tells who moved."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Literal["device", "link"], str], deque[float]] = {}
        self.told: dict[tuple[Literal["device", "link"], str], float] = {}
        # links that were told slow: steps in which nobody waited for them
        self._unseen: Counter[str] = Counter()

    def look(self, pace: Pace) -> list[Moved]:
        """Those that moved, by this step and the ones before."""
        self._take("device", pace.devices)
        self._take("link", pace.links)
        return [*self._moved(), *self._unwaited(pace.links)]

    def _unwaited(self, seen: Mapping[str, float]) -> Iterator[Moved]:
        for key, before in list(self.told.items()):
            what, name = key
            if what == "device" or name in seen or before <= NORMAL:
                self._unseen.pop(name, None)
                continue
            self._unseen[name] += 1
            if self._unseen[name] == WINDOW_STEPS:
                del self.told[key], self._seen[key]
                yield Moved(what, name, None, before)

    def _take(self, what: Literal["device", "link"], ratios: Mapping[str, float]) -> None:
        for name, ratio in ratios.items():
            self._seen.setdefault((what, name), deque(maxlen=WINDOW_STEPS)).append(ratio)

    def _moved(self) -> Iterator[Moved]:
        for key, seen in self._seen.items():
            if len(seen) < LEAST_STEPS:
                continue
            ratio, before = statistics.median(seen), self.told.get(key, 1.0)
            moved = Moved(*key, ratio, before)
            changed = max(ratio / before, before / ratio) > MOVED
            if changed or (moved.normal and not 1.0 / NORMAL <= before <= NORMAL):
                self.told[key] = ratio
                yield moved
