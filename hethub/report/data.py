"""What a report is made of: all that a run folder holds so far. A part that is missing or damaged is None, and why is
told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hethub.errors import InputError
from hethub.launch.history import HISTORY, read_history
from hethub.launch.history_check import committed_steps
from hethub.launch.journal import Event, read_journal
from hethub.launch.run_folder import MARK, SUMMARY
from hethub.launch.run_state import RunState, read_run
from hethub.simulate.comparison import PREDICTED, Comparison, compare_run, load_timeline
from hethub.simulate.energy import joules_of
from hethub.specs.plan import Plan, load_plan
from hethub.telemetry.folder import TELEMETRY
from hethub.telemetry.peaks import Peak, peaks_in
from hethub.timeline.record import Kind, Timeline

__all__ = ["RunData", "load_run_data"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run folder's content. `step` is the one that charts show; `losses` are (steps done, training loss), `held_out`
    (steps done, loss); `peaks` are devices' most memory; `lacking` says in words what could not be shown."""

    name: str
    state: RunState
    mark: dict[str, Any]
    summary: dict[str, Any] | None
    plan: Plan | None
    predicted: Timeline | None
    comparison: Comparison | None
    step: int | None
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    peaks: Mapping[str, Peak]
    events: tuple[Event, ...]
    lacking: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        """Whether its devices are emulated."""
        return bool(self.plan is not None and self.plan.cluster.emulated_time_scale is not None)

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of a global batch."""
        if self.plan is None:
            return None
        return self.plan.workload.global_batch * self.plan.workload.sequence_length

    @property
    def step_seconds(self) -> float | None:
        """The measured step: the summary's, which leaves out steps after an evaluation, or the median of all."""
        found = (self.summary or {}).get("step_seconds")
        if isinstance(found, float):
            return found
        return None if self.comparison is None else self.comparison.measured_step_seconds

    def messages(self) -> dict[tuple[str, str], float]:
        """(sender, receiver) -> bytes of a step, as measured or, without that, as predicted; of messages only, not of
        collectives inside an island."""
        timeline = self.predicted if self.comparison is None else self.comparison.measured
        if timeline is None:
            return {}
        step = 0 if self.comparison is None or self.step is None else self.step
        records = timeline.records
        sends = records[(records["kind"] == Kind.SEND) & (records["step"] == step) & (records["peer"] >= 0)]
        found: dict[tuple[str, str], float] = {}
        pairs, place = np.unique(np.stack([sends["device"], sends["peer"]]), axis=1, return_inverse=True)
        sizes = np.bincount(place.reshape(-1), weights=sends["bytes"], minlength=pairs.shape[1])
        names = timeline.info.devices
        for (source, destination), size in zip(pairs.T.tolist(), sizes.tolist(), strict=True):
            found[names[source], names[destination]] = size
        return found

    def measured_joules_per_token(self) -> float | None:
        """By the spec's power figures and the measured times; None where a power or the times are not known."""
        if self.comparison is None or self.plan is None or self.tokens_per_step is None:
            return None
        used = set(self.state.devices)
        total = 0.0
        for summary in self.comparison.measured_devices:
            if summary.device in used:
                joules = joules_of(self.plan.cluster.device_types[summary.device_type], summary)
                if joules is None:
                    return None
                total += joules
        steps = self.comparison.last - self.comparison.first + 1
        return total / steps / self.tokens_per_step

    def measured_usd_per_million_tokens(self) -> float | None:
        """Rent of the devices in use for a measured step; None where a price or the step is not known."""
        seconds = self.step_seconds
        if self.comparison is None or self.plan is None or self.tokens_per_step is None or seconds is None:
            return None
        types = dict(
            zip(
                self.comparison.measured.info.devices, self.comparison.measured.info.device_types, strict=True
            )
        )
        prices = [self.plan.cluster.device_types[types[name]].usd_per_hour for name in self.state.devices]
        known = [price for price in prices if price is not None]
        if len(known) < len(prices) or not known:
            return None
        return sum(known) / 3600 * seconds / self.tokens_per_step * 1e6


def load_run_data(folder: Path, step: int | None = None) -> RunData:
    """Read a run folder; with `step` charts show that one, else the one of median time.

    Raises InputError where `folder` is no run's, or lacks the step that is asked for.
    """
    state = read_run(folder)
    lacking: list[str] = []

    def tried(what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (InputError, OSError, ValueError, KeyError, TypeError) as error:
            text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            lacking.append(f"{what}: {text}")
            return None

    plan = tried("the split", lambda: load_plan(folder / "plan.yaml")[0])
    predicted = tried("the prediction", lambda: load_timeline(folder, PREDICTED))
    comparison = tried("measured times", lambda: compare_run(folder))
    if step is not None and comparison is not None:
        compare_run(folder, step)
    chosen = comparison.typical_step if comparison is not None and step is None else step
    events, torn = read_journal(folder)
    lacking += torn
    losses = tried("the loss", lambda: _losses(folder)) or ()
    summary = _summary(folder / SUMMARY)
    peaks = tried("memory", lambda: _peaks(folder, summary)) or {}
    return RunData(
        name=folder.resolve().name,
        state=state,
        mark=json.loads((folder / MARK).read_text(encoding="utf-8")),
        summary=summary,
        plan=plan,
        predicted=predicted,
        comparison=comparison,
        step=chosen,
        losses=losses,
        held_out=tuple((e.step, e.loss) for e in events if e.event == "evaluated" and e.loss is not None),
        peaks=peaks,
        events=tuple(events),
        lacking=tuple(lacking),
    )


def _summary(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _peaks(folder: Path, summary: dict[str, Any] | None) -> Mapping[str, Peak]:
    """Of a run that has come to its end by its summary, else by what its devices have counted so far."""
    if summary is None:
        return peaks_in(folder / TELEMETRY)
    written = summary.get("peak_bytes") or {}
    return {name: Peak(peak["predicted"], peak["measured"]) for name, peak in written.items()}


def _losses(folder: Path) -> tuple[tuple[int, float], ...]:
    """From the histories, which know the steps of unfinished runs too."""
    entries, _ = read_history(folder / HISTORY)
    by_step = sorted(committed_steps(entries).items())
    return tuple((step + 1, float.fromhex(found[0].loss)) for step, found in by_step)
