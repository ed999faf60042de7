"""Both timelines of a run folder, summarized over the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hethub.cost.bounds import physical_bound
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.errors import InputError
from hethub.simulate.pieces import piece_seconds
from hethub.specs.layout import lay_out
from hethub.specs.plan import load_plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import DeviceSummary, step_numbers, step_seconds, summarize
from hethub.timeline.waterfall import Waterfall, waterfall

__all__ = [
    "MEASURED",
    "PREDICTED",
    "WARM_UP_STEPS",
    "Comparison",
    "RunTimelines",
    "compare_run",
    "load_timeline",
    "load_timelines",
    "predicted_step_seconds",
]

PREDICTED, MEASURED = "predicted", "measured"
"""The origins of a run folder's timelines, and the names of their files. Of a run that goes on, or did not come to its
end, the measured one has some of the last steps."""

WARM_UP_STEPS = 3
"""Steps at the start of a run that are left out unless asked for: caches fill and memory is first touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both timelines of a run, summarized: the prediction's one step, and measured steps `first` to `last`.

    `measured_step_seconds` is the median of those steps, `typical_step` the one nearest to it.
    """

    predicted: Timeline
    measured: Timeline
    first: int
    last: int
    typical_step: int
    predicted_step_seconds: float
    measured_step_seconds: float
    predicted_devices: list[DeviceSummary]
    measured_devices: list[DeviceSummary]
    predicted_waterfall: Waterfall
    measured_waterfall: Waterfall

    @property
    def emulated(self) -> bool:
        """Whether its devices are emulated."""
        return self.measured.info.emulated


def compare_run(run: Path, step: int | None = None) -> Comparison:
    """Load and summarize; without a `step` all after the warm-up.

    Raises InputError when `run` is not the folder of a run or lacks the step.
    """
    predicted, measured, first, last = load_timelines(run)
    numbers, durations = step_numbers(measured), step_seconds(measured)
    if step is not None:
        first = last = step
    measured_devices = summarize(measured, first, last)
    chosen = (numbers >= first) & (numbers <= last)
    median = float(np.median(durations[chosen]))
    speeds, pieces = _speeds_and_pieces(run, measured)
    return Comparison(
        predicted=predicted,
        measured=measured,
        first=first,
        last=last,
        typical_step=int(numbers[chosen][np.argmin(np.abs(durations[chosen] - median))]),
        predicted_step_seconds=predicted_step_seconds(predicted),
        measured_step_seconds=median,
        predicted_devices=summarize(predicted, 0, 0),
        measured_devices=measured_devices,
        predicted_waterfall=waterfall(predicted, 0, 0, speeds, pieces),
        measured_waterfall=waterfall(measured, first, last, speeds, pieces),
    )


def _speeds_and_pieces(run: Path, measured: Timeline) -> tuple[list[float] | None, list[float] | None]:
    """The devices' relative speeds and their smallest pieces of work by the run's plan; None where the folder has no
    plan.yaml."""
    if not (run / "plan.yaml").is_file():
        return None, None
    plan, _ = load_plan(run / "plan.yaml")
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    shares = physical_bound(compute).shares
    types = measured.info.device_types
    names = (device.name for device in compute.graph.devices)
    pieces = dict(zip(names, piece_seconds(lay_out(plan), compute), strict=True))
    return (
        [shares[name] / types.count(name) for name in types],
        [pieces.get(name, 0.0) for name in measured.info.devices],
    )


class RunTimelines(NamedTuple):
    """Both timelines of a run, and which measured steps come after the warm-up: `first` to `last`, inclusive. Of a run
    that is shorter than the warm-up, its last step."""

    predicted: Timeline
    measured: Timeline
    first: int
    last: int


def load_timelines(run: Path) -> RunTimelines:
    """Read them from a run's folder. Raises InputError as `load_timeline` does, and where they are of other devices."""
    predicted, measured = load_timeline(run, PREDICTED), load_timeline(run, MEASURED)
    if predicted.info.devices != measured.info.devices:
        raise InputError(f"{run}: predicted.npz is of other devices than measured.npz. Run the job again.")
    numbers = step_numbers(measured)
    first = int(numbers[min(WARM_UP_STEPS, len(numbers) - 1)])
    return RunTimelines(predicted, measured, first, int(numbers[-1]))


def predicted_step_seconds(predicted: Timeline) -> float:
    """Seconds of a prediction's step 0, whatever neighbours it has."""
    return float(step_seconds(predicted)[step_numbers(predicted) == 0][0])


def load_timeline(run: Path, origin: str) -> Timeline:
    """A run's `predicted` or `measured` timeline. Raises InputError where it has none."""
    if not run.is_dir():
        raise InputError(f"{run}: no such folder. Give the folder of a run, as `hethub launch` writes it.")
    path = run / f"{origin}.npz"
    if not path.exists():
        raise InputError(
            f"{run}: holds no {path.name}: none of its steps has been measured. Give another folder."
        )
    loaded = Timeline.load(path)
    if not len(loaded.records):
        raise InputError(f"{path}: holds no action. Give the folder of a run that finished a step.")
    return loaded
