"""Looks at the last steps of an attempt while it trains: who drifts from its prediction, and a file of these steps, so
that a run can be reported and planned anew before its end, and after an end that no worker lived to tell of."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hethub.launch.compiled import Compiled
from hethub.launch.drift import DriftWatch, Moved
from hethub.simulate.comparison import MEASURED, WARM_UP_STEPS
from hethub.simulate.pace import Expected, Pace

__all__ = ["StepWatch"]

Records = npt.NDArray[np.void]

_LOOK_SECONDS = 1.0  # between looks, or where one takes long:
_LOOK_SHARE = 50.0  # times as long
_WRITE_SECONDS = 10.0  # between writings while training, or where one takes long _LOOK_SHARE times as long
_MOST_RECORDS = 200_000  # that are written while training; more take so long that they wait for the end


class StepWatch:
    """The last steps that all devices of an attempt have done. With `links` the pace of links is judged too: when a
    message was sent must be told by the clock of when it came."""

    def __init__(
        self, compiled: Compiled, scale: float, folder: Path, say: Callable[[str], None], *, links: bool
    ) -> None:
        self._compiled, self._scale, self._links = compiled, scale, links
        self._file = folder / f"{MEASURED}.npz"
        self._expected = Expected(compiled.predicted, compiled.graph)
        self._drift = DriftWatch()
        self._next_look = self._next_write = time.monotonic()
        self._unwritten: Records | None = None
        self._say, self._told = say, False

    def look(
        self, done: int, ask: Callable[[Collection[int]], Mapping[int, Records]]
    ) -> tuple[int, list[Moved]]:
        """The last step that all have done and who has moved by then, where it is time to look and `done` steps are
        past the warm-up. `ask` gets devices' records of their last steps, of those that answer."""
        begin = time.monotonic()
        if begin < self._next_look or done <= WARM_UP_STEPS:
            return 0, []
        used = self._compiled.program.layout.used
        found = ask(used)
        now = time.monotonic()
        self._next_look = now + max(_LOOK_SECONDS, _LOOK_SHARE * (now - begin))
        if len(found) < len(used) or not all(len(records) for records in found.values()):
            return 0, []
        last = min(int(records["step"].max()) for records in found.values())
        first = max(int(records["step"].min()) for records in found.values())
        records = np.concatenate([found[device] for device in sorted(found)])
        if first < last:
            self._keep(records[(records["step"] >= first) & (records["step"] <= last)])
        pace = self._expected.pace(records, last, self._scale)
        return last, self._drift.look(pace if self._links else Pace(pace.devices))

    def _keep(self, records: Records) -> None:
        self._unwritten = records
        begin = time.monotonic()
        if begin >= self._next_write and len(records) <= _MOST_RECORDS:
            self.write()
            now = time.monotonic()
            self._next_write = now + max(_WRITE_SECONDS, _LOOK_SHARE * (now - begin))

    def write(self) -> None:
        """Write what was seen last as the run's measured steps, unless that stands there. Where it cannot be written,
        that is told once, and nothing ends for want of it."""
        if self._unwritten is None:
            return
        try:
            self._compiled.measured(self._unwritten, self._scale).save(self._file)
        except OSError as error:
            if not self._told:
                self._say(f"warning: {self._file}: the last steps cannot be written ({error.strerror})")
            self._told = True
        else:
            self._unwritten = None
