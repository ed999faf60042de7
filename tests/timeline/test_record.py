"""Timeline files: what is no timeline is refused, and nothing in one is ever run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hethub.errors import InputError
from hethub.timeline.record import RECORD, Timeline, TimelineInfo


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("column", ["info", "records"])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, column: str) -> None:
    """Row 18 of the matrix of faults. Seen to fail with allow_pickle=True."""
    marker, file = tmp_path / "marker", tmp_path / "measured.npz"
    info = TimelineInfo(origin="measured", devices=("a/0/0",), device_types=("fast",), emulated=True)
    Timeline(info, np.zeros(2, RECORD)).save(file)
    with np.load(file) as stored:
        columns = dict(stored)
    columns[column] = np.array([Payload(marker)], dtype=object)
    np.savez(file, **columns)
    with pytest.raises(InputError, match=r"measured\.npz: not a timeline file"):
        Timeline.load(file)
    assert not marker.exists()
