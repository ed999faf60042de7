"""What the driver sees of the last steps while a run goes on: who has moved, and a file that reports are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hethub.launch import step_watch
from hethub.launch.compiled import Compiled, compile_plan
from hethub.launch.step_watch import StepWatch
from hethub.timeline.record import Timeline
from hethub.timeline.summary import step_numbers
from tests.chaos.three_types import plan_by_rows

Records = npt.NDArray[np.void]
PAST_WARM_UP = 4


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_plan(plan_by_rows(tmp_path_factory.mktemp("cluster")))


def seen(compiled: Compiled, first: int, ahead: int = 0) -> Mapping[int, Records]:
    """Three predicted steps, from `first` on, by device; the first device is `ahead` steps further."""
    records = compiled.predicted.records.copy()
    records["step"] += first - records["step"].min()
    used = compiled.program.layout.used
    found = {device: records[records["device"] == device] for device in used}
    found[used[0]]["step"] += ahead
    return found


def look(watch: StepWatch, records: Mapping[int, Records], done: int = PAST_WARM_UP) -> int:
    def ask(devices: Collection[int]) -> Mapping[int, Records]:
        return {device: records[device] for device in devices if device in records}

    return watch.look(done, ask)[0]


def test_the_steps_that_all_devices_have_done_are_written(compiled: Compiled, tmp_path: Path) -> None:
    watch = StepWatch(compiled, 1.0, tmp_path, print, links=True)
    assert look(watch, seen(compiled, 7, ahead=1)) == 9
    written = Timeline.load(tmp_path / "measured.npz")
    assert step_numbers(written).tolist() == [8, 9] and written.info.origin == "measured"
    assert {int(d) for d in written.records["device"]} == set(compiled.program.layout.used)


def test_nothing_is_written_of_the_warm_up_or_while_a_device_does_not_answer(
    compiled: Compiled, tmp_path: Path
) -> None:
    watch = StepWatch(compiled, 1.0, tmp_path, print, links=True)
    look(watch, seen(compiled, 0), done=PAST_WARM_UP - 1)
    most = dict(seen(compiled, 7))
    most.pop(compiled.program.layout.used[-1])
    look(watch, most)
    watch.write()
    assert list(tmp_path.iterdir()) == []


def test_many_records_wait_for_the_end(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_watch, "_MOST_RECORDS", 10)
    watch = StepWatch(compiled, 1.0, tmp_path, print, links=True)
    look(watch, seen(compiled, 7))
    assert list(tmp_path.iterdir()) == []
    watch.write()
    assert step_numbers(Timeline.load(tmp_path / "measured.npz")).tolist() == [7, 8, 9]


def test_a_full_disk_is_told_once_and_ends_nothing(compiled: Compiled, tmp_path: Path) -> None:
    """Seeded bug: the error of the disk takes the place of the failure that ended the run."""
    file = tmp_path / "measured.npz"
    file.symlink_to("/dev/full")
    told: list[str] = []
    watch = StepWatch(compiled, 1.0, tmp_path, told.append, links=True)
    look(watch, seen(compiled, 7))
    watch.write()
    assert told == [f"warning: {file}: the last steps cannot be written (No space left on device)"]
    file.unlink()
    watch.write()
    assert step_numbers(Timeline.load(file)).tolist() == [7, 8, 9]
